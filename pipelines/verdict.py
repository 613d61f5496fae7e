"""The first paragraph of a search's report: which setting wins, and is that to be believed."""

from collections import Counter

from droppos.draw.trials import words
from droppos.measure.intervals import student_95
from pipelines.findings import Findings, Lead, Row
from pipelines.ranking import chance_of_lead
from pipelines.words import counted

RARE, COMMON = 0.05, 0.5
"""A lead is called large that so few searches over equally good settings would show, and small that
so many would."""

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


def setting(row: Row, *, seed: bool = True) -> str:
    """Write a trial's values, by the fields' last names; without its seed, of all its setting."""
    return ", ".join(
        f"{name.rpartition('.')[2]} {words(value)}"
        for name, value in row.point.items()
        if seed or name != "run.seed"
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
    label = figure_label(findings.objective)
    name = short_names(findings)[best.name]
    first = next(iter(findings.settings), None)
    if first is not None and len(first.values) > 1:
        return (
            f"Best is {setting(best, seed=False) or 'the one setting'}: {label} {first.mean:.4f}, "
            f"the mean of {len(first.values)} seeds (trial {name} has {first.values[0]:.4f})."
        )
    value = findings.objective_of(best)
    reached = f"{label} {value:.4f}" if value is not None else f"no {label} measured"
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
    behind = f"It leads the next setting, {setting(lead.second, seed=False)}, by {lead.by:.4f}"
    return f"{behind}{_size(lead)}. {_chance(lead)}"


def _size(lead: Lead) -> str:
    """Hold a lead against those that equally good settings would have: the best is the luckiest."""
    if lead.settings == 2:
        return ""  # their lead is always the same number of their deviations
    chance = chance_of_lead(lead.by / lead.spread, lead.settings)
    size = "large" if chance < RARE else "small" if chance > COMMON else "moderate"
    return (
        f", which is {size}: the best of {lead.settings} equally good settings would lead by so "
        f"much of their spread in {chance:.0%} of searches"
    )


def _chance(lead: Lead) -> str:
    if lead.repeats is None:
        return (
            "No setting was run twice, so how much chance alone changes is not known; run the best "
            "ones with other values of run.seed before you build on it. The best of several is "
            "lucky, too: expect less when it runs anew."
        )
    beyond = student_95(lead.repeats.freedom) * lead.repeats.deviation * lead.error
    among = "stands clear of" if lead.by > beyond else "is within"
    return (
        f"Equal settings run again differ by {lead.repeats.deviation:.4f} (standard deviation), so "
        f"the lead {among} what chance does: two equally good ones lie within {beyond:.4f} of each "
        "other 19 times of 20."
    )


def _counts(findings: Findings) -> str:
    states = Counter(row.state for row in findings.rows)
    ended = [f"{states[state]} {words}" for state, words in STATES.items() if states[state]]
    many = counted(len(findings.rows), "trial")
    return f"{many}: {', '.join(ended)}." if ended else "No trial was run."
