"""The report of a search: one HTML file that says which setting wins, and shows why."""

from html import escape

from matplotlib.figure import Figure

from pipelines.findings import Findings
from pipelines.page import bullets, missing, page, paragraph, picture, section
from pipelines.search_figures import Part, search_parts
from pipelines.search_tables import agreement_table, sharing_table, trials_table
from pipelines.verdict import short_names, verdict


def search_report(findings: Findings) -> str:
    """Write what a search found as a page that needs nothing else."""
    return page(
        f"Search {findings.name}",
        [
            "<header>",
            f"<h1>Search {escape(findings.name)}</h1>",
            paragraph(findings.protocol, "soft"),
            '<div class="verdict">',
            *(paragraph(sentence) for sentence in verdict(findings)),
            "</div>",
            *([bullets(findings.notes)] if findings.notes else []),
            "</header>",
            "<main>",
            *(_pictured(part) for part in search_parts(findings).values()),
            agreement_table(findings),
            trials_table(findings),
            sharing_table(findings),
            _best(findings),
            "</main>",
        ],
    )


def _pictured(part: Part) -> str:
    if isinstance(part.drawn, Figure):
        return section(part.title, picture(part.drawn, part.alt, part.caption))
    return section(part.title, missing(part.drawn))


def _best(findings: Findings) -> str:
    title = "The best config"
    best = findings.winner
    if best is None or findings.best_yaml is None:
        return section(title, missing("No trial is the best yet, so there is no config to take."))
    return section(
        title,
        paragraph(
            f"Of trial {short_names(findings)[best.name]}. `droppos pretrain` takes it as it is.",
            "soft",
        ),
        f"<pre>{escape(findings.best_yaml)}</pre>",
    )
