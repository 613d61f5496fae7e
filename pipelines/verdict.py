"""The first paragraph of a search's report: which setting wins, and is that to be believed."""

from collections import Counter

from droppos.draw.trials import words
from pipelines.findings import Findings, Lead, Row

LARGE, SMALL = 1.0, 0.5
"""A lead of so many standard deviations is called large, or small. Were all settings equally good,
the best of 10 to 100 trials would lead by 0.4 to 0.5 on average."""

EQUAL = 1e-12
"""A spread below which objectives do not differ."""

FIGURES = {
    "position_skill": "position skill",
    "knn": "k-NN accuracy",
    "effective_rank": "effective rank",
    "train_excess_nats": "training excess nats",
}
STATES = {"finished": "finished", "early": "ended early", "failed": "failed", "stopped": "stopped"}


def figure_label(name: str) -> str:
    """Write a figure's name in words."""
    return FIGURES.get(name, name.replace("_", " "))


def verdict(findings: Findings) -> list[str]:
    """Say which trial is best, by how much, whether that is much, and how all trials ended."""
    best = findings.winner
    lead = findings.lead
    equal = lead is not None and lead.spread < EQUAL
    told = [] if best is None or equal else [_best(findings, best)]
    return [*told, _belief(findings), _counts(findings)]


def setting(row: Row) -> str:
    """Write a trial's values, by the fields' last names."""
    return ", ".join(
        f"{name.rpartition('.')[2]} {words(value)}" for name, value in row.point.items()
    )


def short_names(findings: Findings) -> dict[str, str]:
    """Leave out of each name the values, which stand beside it: ratios-002, if one is so."""
    cut = {
        row.name: row.name.partition("=")[0].rpartition("-")[0] if "=" in row.name else row.name
        for row in findings.rows
    }
    distinct = len(set(cut.values())) == len(cut) and all(cut.values())
    return cut if distinct else {name: name for name in cut}


def _best(findings: Findings, best: Row) -> str:
    value = findings.objective_of(best)
    label = figure_label(findings.objective)
    reached = f"{label} {value:.4f}" if value is not None else f"no {label} measured"
    name = short_names(findings)[best.name]
    return f"Best is {setting(best) or best.name}: {reached} (trial {name})."


def _belief(findings: Findings) -> str:
    lead = findings.lead
    done = findings.finished
    if not done:
        return "No trial finished with a measured objective, so there is no best setting yet."
    if lead is None:
        return "Only one setting has finished, so there is nothing to compare it with."
    if lead.spread < EQUAL:
        return f"All {len(done)} finished trials have the same objective, so none is better."
    ratio = lead.by / lead.spread
    size = "large" if ratio >= LARGE else "small" if ratio < SMALL else "moderate"
    behind = f"It leads the next setting, {setting(lead.second)}, by {lead.by:.4f}"
    against = f"{ratio:.2g} of the standard deviation of finished trials ({lead.spread:.4f})"
    return f"{behind}, which is {size}: {against}. {_chance(findings, lead)}"


def _chance(findings: Findings, lead: Lead) -> str:
    best = findings.winner
    top = None if best is None else findings.objective_of(best)
    if lead.repeats is not None:
        clear = lead.by > 3 * lead.repeats
        among = "stands clear of" if clear else "is within"
        return (
            f"Equal settings run again differ by {lead.repeats:.4f} (standard deviation), so the "
            f"lead {among} what chance does."
        )
    unknown = (
        "No setting was run twice, so how much chance alone changes is not known; run the best "
        "ones with other values of run.seed before you build on it."
    )
    near = [
        row
        for row in findings.finished
        if top is not None and top - (findings.objective_of(row) or 0) <= SMALL * lead.spread
    ]
    if lead.by >= SMALL * lead.spread or len(near) < 2:
        return unknown
    return f"{len(near)} trials lie that close to the top, the best among them. {unknown}"


def _counts(findings: Findings) -> str:
    states = Counter(row.state for row in findings.rows)
    ended = [f"{states[state]} {words}" for state, words in STATES.items() if states[state]]
    many = f"{len(findings.rows)} trial" + ("" if len(findings.rows) == 1 else "s")
    return f"{many}: {', '.join(ended)}." if ended else "No trial was run."
