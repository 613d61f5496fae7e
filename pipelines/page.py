"""Pieces of a report that is one HTML file: nothing in it is fetched, nothing in it runs."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO

from matplotlib import rc_context
from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; --ink: #1d1f24; --soft: #5d626b; --rule: #e3e5e8; --best: #b84f00; }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
html { font-size: 16px; }
body { margin: 0 auto; padding: 3rem 2rem 5rem; max-width: 1140px; background: #fff;
  color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 3.2rem 0 .4rem; }
p { max-width: 74ch; margin: .4rem 0 .8rem; overflow-wrap: anywhere; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.verdict { font-size: 1.16rem; border-left: 4px solid var(--best); padding: .1rem 0 .1rem 1.1rem;
  margin: 1.6rem 0; }
.verdict p { max-width: 68ch; } .verdict p:first-child { font-weight: 650; }
.missing { color: var(--soft); font-style: italic; }
figure { margin: .8rem 0 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption, caption { max-width: 80ch; margin-top: .5rem; text-align: left; }
caption { caption-side: bottom; padding-top: .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: right; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
td.text { white-space: nowrap; }
thead th { vertical-align: bottom; border-bottom: 1.5px solid var(--soft); line-height: 1.25; }
th { font-weight: 600; }
tbody th { font-weight: 400; }
.text { text-align: left; overflow-wrap: break-word; max-width: 26em; }
tr.best th, tr.best td { font-weight: 700; background: #fdf1e7; }
tr.best th { box-shadow: inset 4px 0 var(--best); }
tr.pale th, tr.pale td { color: var(--soft); }
pre { background: #f6f7f8; padding: 1rem 1.2rem; font-size: .84rem; line-height: 1.45;
  white-space: pre-wrap; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; max-width: 80ch; font-size: .95rem; overflow-wrap: anywhere; }
@media print {
  @page { size: A4; margin: 14mm; }
  html { font-size: 11px; } body { padding: 0; max-width: none; }
  .wide { overflow: visible; }
  table { font-size: .72rem; } th, td { padding: .2rem .35rem; }
  h2 { margin-top: 2rem; }
  figure, tr, .verdict { break-inside: avoid; } h2 { break-after: avoid; }
}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Assemble a page; parts are HTML, the title is not."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            *parts,
            "</body>",
            "</html>",
            "",
        ]
    )


def section(title: str, *parts: str) -> str:
    """Put HTML under a heading, which is plain text."""
    return "\n".join([f"<section><h2>{escape(title)}</h2>", *parts, "</section>"])


def missing(reason: str) -> str:
    """Tell in a sentence why a part is not there."""
    return f'<p class="missing">{escape(reason)}</p>'


def paragraph(text: str, kind: str = "") -> str:
    """Write a paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(texts: Sequence[str]) -> str:
    """List plain texts."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def picture(figure: Figure, alt: str, caption: str) -> str:
    """Put a figure in, as an image that holds all it needs.

    Args:
        figure: What to draw.
        alt: What it shows, for those who do not see it.
        caption: How to read it.
    """
    encoded = b64encode(svg(figure)).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{encoded}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def image(png: bytes, alt: str, caption: str) -> str:
    """Put a PNG in; see `picture`."""
    encoded = b64encode(png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{encoded}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def svg(figure: Figure) -> bytes:
    """Draw as SVG: letters are outlines, and the same figure gives the same bytes."""
    buffer = BytesIO()
    with rc_context({"svg.hashsalt": "droppos", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table."""

    text: str
    style: str = ""
    """CSS of its own; from no user."""
    title: str = ""
    """More words, on hovering."""
    wide: bool = False
    """Whether it holds words rather than a number."""


def table(
    head: Sequence[Cell], rows: Sequence[tuple[str, Sequence[Cell]]], caption: str = ""
) -> str:
    """Write a table whose first column names the rows.

    Args:
        head: Names of the columns.
        rows: CSS class and cells of each.
        caption: Words below it.
    """
    lines = ['<div class="wide"><table>']
    if caption:
        lines.append(f"<caption>{escape(caption)}</caption>")
    lines.append(f"<thead><tr>{''.join(_cell(cell, 'th', 'col') for cell in head)}</tr></thead>")
    lines.append("<tbody>")
    for kind, cells in rows:
        inner = _cell(cells[0], "th", "row") + "".join(_cell(cell, "td") for cell in cells[1:])
        lines.append(f'<tr class="{kind}">{inner}</tr>' if kind else f"<tr>{inner}</tr>")
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def _cell(cell: Cell, tag: str, scope: str = "") -> str:
    attributes = {
        "scope": scope,
        "class": "text" if cell.wide else "",
        "style": cell.style,
        "title": cell.title,
    }
    said = "".join(f' {key}="{escape(text)}"' for key, text in attributes.items() if text)
    return f"<{tag}{said}>{escape(cell.text)}</{tag}>"
