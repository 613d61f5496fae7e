"""The tables of a search's report: all trials, and which figures rank them alike."""

from collections.abc import Sequence

from droppos.draw.trials import words
from pipelines.findings import Findings, Row
from pipelines.page import Cell, bullets, missing, paragraph, section, table
from pipelines.ranking import FEWEST_RANKED, correlations, could_be_chance, smaller_is_better
from pipelines.verdict import STATES, figure_label, short_names


def trials_table(findings: Findings) -> str:
    """List all trials, best first, with all that was measured."""
    if not findings.rows:
        return section("All trials", missing("No trial was run."))
    names = [dimension.field for dimension in findings.dimensions]
    others = dict.fromkeys(name for row in findings.rows for name in row.figures)
    figures = [findings.objective, *(name for name in others if name != findings.objective)]
    head = [
        Cell("trial", wide=True),
        Cell("state", wide=True),
        *(Cell(name.rpartition(".")[2].replace("_", "_\u200b"), title=name) for name in names),
        *(Cell(figure_label(name), title=name) for name in figures),
        *(Cell(text) for text in ("steps", "time")),
    ]
    values = [value for row in findings.rows if (value := findings.objective_of(row)) is not None]
    best = findings.winner
    names_shown = short_names(findings)
    rows = [
        (
            "best" if row is best else "" if row.state == "finished" else "pale",
            [
                Cell(names_shown[row.name], title=_identity(row), wide=True),
                Cell(STATES[row.state], wide=True),
                *(Cell(words(row.point[name]) if name in row.point else "") for name in names),
                *(
                    Cell(_figure(row, name), _bar(row, name, values) if not at else "")
                    for at, name in enumerate(figures)
                ),
                Cell(f"{row.step:,}/{row.steps:,}"),
                Cell(_time(row.seconds)),
            ],
        )
        for row in findings.ranked
    ]
    errors = [f"{names_shown[row.name]}: {row.error}" for row in findings.ranked if row.error]
    caption = (
        "Best first. The bar behind the objective runs from the worst trial's to the best's. "
        "Hovering over a trial shows its full name and MLflow run."
    )
    wrong = [paragraph("What went wrong:"), bullets(errors)] if errors else []
    return section("All trials", table(head, rows, caption), *wrong)


def _identity(row: Row) -> str:
    return row.name + (f", MLflow run {row.tracking_run}" if row.tracking_run else "")


def _figure(row: Row, name: str) -> str:
    value = row.figure(name)
    return "–" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"  # noqa: RUF001


def _bar(row: Row, name: str, values: Sequence[float]) -> str:
    """Draw the objective behind its number, from the worst trial's to the best's."""
    value = row.figure(name)
    if value is None or max(values) <= min(values):
        return ""
    share = 100 * (value - min(values)) / (max(values) - min(values))
    return f"background:linear-gradient(90deg,#cfe0f1 {share:.0f}%,transparent 0)"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"  # noqa: RUF001
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def agreement_table(findings: Findings) -> str:
    """Correlate how each pair of figures ranks the finished trials."""
    title = "Do cheap figures rank trials as dear ones do?"
    figures = [
        {name: value for name in row.figures if (value := row.figure(name)) is not None}
        for row in findings.rows
        if row.state == "finished"
    ]
    pairs = correlations(figures)
    if not pairs:
        return section(
            title,
            missing(f"It takes two figures that {FEWEST_RANKED} finished trials have both."),
        )
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    both = pairs | {(second, first): found for (first, second), found in pairs.items()}
    head = [Cell("", wide=True), *(Cell(_signed(name)) for name in names)]
    rows = [
        ("", [Cell(_signed(name), wide=True), *(_agreed(both, name, other) for other in names)])
        for name in names
    ]
    return section(
        title,
        table(
            head,
            rows,
            "Spearman's rank correlation over finished trials, and how many have both figures: 1 "
            "is the same order, 0 none, -1 the opposite. Smaller is better for training excess "
            "nats and losses, so their sign is turned. In brackets: so few trials could agree so "
            "well by chance.",
        ),
    )


def _signed(name: str) -> str:
    return figure_label(name) + (" (sign turned)" if smaller_is_better(name) else "")


def _agreed(
    pairs: dict[tuple[str, str], tuple[float | None, int]], first: str, second: str
) -> Cell:
    if first == second:
        return Cell("1", "color:#a3a8b0")
    found, trials = pairs.get((first, second), (None, 0))
    if trials == 0:
        return Cell("too few")
    if found is None:
        return Cell(f"equal values, n {trials}")
    if could_be_chance(found, trials):
        return Cell(f"({found:.2f}), n {trials}", "color:#5d626b")
    colour = "47,109,181" if found > 0 else "213,94,0"
    return Cell(f"{found:.2f}, n {trials}", f"background:rgba({colour},{0.45 * abs(found):.2f})")


def sharing_table(findings: Findings) -> str:
    """Tell what a shared stream cost."""
    title = "One stream for many trials"
    if not findings.sharing:
        return section(title, missing("Trials did not share a stream of pictures."))
    rows = [
        ("", [Cell(name.replace("_", " "), wide=True), Cell(f"{number:,.4g}")])
        for name, number in findings.sharing.items()
    ]
    return section(title, table([Cell("what", wide=True), Cell("number")], rows))
