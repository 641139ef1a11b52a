"""One self-contained HTML page of text, tables and pictures: no file beside it, no address it loads from."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmm_bg.analysis import style
from openmm_bg.errors import InputError
from openmm_bg.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Paragraph", "Picture", "Row", "Section", "Table", "render_page", "write_page"]


@dataclass(frozen=True)
class Paragraph:
    """Plain text; ``note`` sets it apart as a remark or warning."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned and heads its row, the last is left-aligned if ``text_last``."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    text_last: bool = False


@dataclass(frozen=True)
class Picture:
    """A matplotlib figure with its alternative text and a caption that says what to see."""

    figure: Figure
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """Pictures of half the page's width beside one another, and one below the other where the screen is narrow."""

    pictures: Sequence[Picture]


Block = Paragraph | Table | Picture | Row


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    blocks: Sequence[Block] = field(default_factory=tuple)


_CSS = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #59626c; --paper: #ffffff; --card: #f4f6f8; --line: #d9dee3;
  --accent: #0072b2; --warn: #b85c00; --shade: rgb(0 0 0 / 0.22); }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #a3acb5; --paper: #15181c; --card: #20252b;
  --line: #39414a; --accent: #63b5e8; --warn: #f0a04b;
  --shade: rgb(0 0 0 / 0.8); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 2.5rem 1.75rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; text-wrap: balance; margin: 0 0 0.8rem; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 0.6rem; padding-top: 0.9rem; border-top: 1px solid var(--line); }
p { margin: 0.6rem 0; max-width: 46rem; }
.lead p { font-size: 1.08rem; }
.note { border-left: 4px solid var(--warn); background: var(--card); padding: 0.6rem 0.9rem;
  border-radius: 0 6px 6px 0; }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.8rem;
  margin: 1.4rem 0 0.6rem; padding: 0; }
.key div { background: var(--card); border-radius: 8px; padding: 0.75rem 0.9rem; }
.key dt { font-size: 0.85rem; color: var(--soft); }
.key dd { margin: 0.1rem 0 0; font-size: 1.15rem; font-weight: 650; font-variant-numeric: tabular-nums; }
/* A table wider than the screen moves sideways in its box; shadows at the box's edges say that there is more of it. */
.scroll { overflow-x: auto; margin: 0.9rem 0; background:
  linear-gradient(to right, var(--paper) 40%, transparent) left / 3rem 100% local no-repeat,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 3rem 100% local no-repeat,
  linear-gradient(to right, var(--shade), transparent) left / 1rem 100% scroll no-repeat,
  linear-gradient(to left, var(--shade), transparent) right / 1rem 100% scroll no-repeat; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.95rem; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.4rem; font-size: 0.9rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(46rem, 100vw - 2rem); }
th, td { padding: 0.4rem 1.1rem 0.4rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tbody td { white-space: nowrap; }
.text-last tbody tr > :last-child { white-space: normal; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; white-space: nowrap; }
th:first-child, td:first-child, .text-last tr > :last-child { text-align: left; }
tbody th { font-weight: 600; }
figure { margin: 1.2rem 0; }
figure img { display: block; width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
@media (prefers-color-scheme: dark) { figure img { padding: 0.5rem; } }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 0 1.6rem; }
/* Type in a wide picture would be too small on a phone: there it keeps its size and is moved sideways. */
@media (max-width: 640px) { main { padding: 1.4rem 1rem 3rem; } .wide { overflow-x: auto; }
  .wide img { width: 42rem; max-width: none; } th, td { padding-right: 0.7rem; }
  /* What a row says in words stands below its figures. */
  .text-last { display: grid; grid-template-columns: minmax(6rem, 1fr) repeat(var(--figures), auto); }
  .text-last :is(thead, tbody, tr) { display: contents; }
  .text-last :is(caption, tr > :last-child) { grid-column: 1 / -1; }
  .text-last tbody tr > :not(:last-child) { border-bottom: 0; padding-bottom: 0; }
  .text-last tbody tr > :last-child { padding-top: 0.1rem; color: var(--soft); }
  .text-last thead tr > :not(:last-child) { border-bottom: 0; padding-bottom: 0; } }
figcaption { color: var(--soft); font-size: 0.92rem; margin-top: 0.5rem; max-width: 50rem; }
@media print { h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
"""


#: Inches; a wider picture is too wide for a phone.
_WIDE = 6.0


def _svg(figure: Figure) -> bytes:
    """A figure as SVG; parts that ask for it as pixels inside. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    style.styled(figure.savefig)(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _cell(tag: str, text: Any, scope: str = "") -> str:
    attribute = f' scope="{scope}"' if scope else ""
    return f"<{tag}{attribute}>{html.escape(str(text))}</{tag}>"


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        attribute = ' class="note"' if block.note else ""
        return f"<p{attribute}>{html.escape(block.text)}</p>"
    if isinstance(block, Picture):
        source = "data:image/svg+xml;base64," + base64.b64encode(_svg(block.figure)).decode("ascii")
        caption = f"<figcaption>{html.escape(block.caption)}</figcaption>" if block.caption else ""
        wide = ' class="wide"' if block.figure.get_figwidth() > _WIDE else ""
        return f'<figure><div{wide}><img alt="{html.escape(block.alt)}" src="{source}"></div>{caption}</figure>'
    if isinstance(block, Row):
        return '<div class="row">' + "\n".join(_block(picture) for picture in block.pictures) + "</div>"
    for row in block.rows:
        if len(row) != len(block.columns):
            raise InputError(f"A table of {len(block.columns)} columns has a row of {len(row)}: {list(row)}.")
    caption = f"<caption><span>{html.escape(block.caption)}</span></caption>" if block.caption else ""
    head = "".join(_cell("th", name, "col") for name in block.columns)
    body = "\n".join(
        "<tr>" + _cell("th", row[0], "row") + "".join(_cell("td", cell) for cell in row[1:]) + "</tr>"
        for row in block.rows
    )
    # The number of columns between the first and the last.
    attribute = f' class="text-last" style="--figures: {len(block.columns) - 2}"' if block.text_last else ""
    return (
        f'<div class="scroll" tabindex="0"><table{attribute}>{caption}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def render_page(
    title: str,
    lead: str | Sequence[str],
    sections: Iterable[Section],
    highlights: Sequence[tuple[str, str]] = (),
    warnings: Sequence[str] = (),
) -> str:
    """The page as text; see `write_page`."""
    paragraphs = [lead] if isinstance(lead, str) else list(lead)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # The browser itself is told to load nothing from anywhere.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>",
        f"<body><main><h1>{html.escape(title)}</h1>",
        '<div class="lead">' + "".join(f"<p>{html.escape(text)}</p>" for text in paragraphs) + "</div>",
    ]
    if highlights:
        cards = "".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in highlights
        )
        parts.append(f'<dl class="key">{cards}</dl>')
    parts += [_block(Paragraph(text, note=True)) for text in warnings]
    for section in sections:
        parts.append(f"<section><h2>{html.escape(section.heading)}</h2>")
        parts += [_block(block) for block in section.blocks]
        parts.append("</section>")
    parts.append("</main></body></html>\n")
    return "\n".join(parts)


def write_page(
    path: str | os.PathLike[str],
    title: str,
    lead: str | Sequence[str],
    sections: Iterable[Section],
    highlights: Sequence[tuple[str, str]] = (),
    warnings: Sequence[str] = (),
) -> Path:
    """Write one HTML file that holds everything it shows; an existing file is replaced in one step.

    Parameters
    ----------
    path
        The file; its folder must exist.
    title, lead
        Heading, and the paragraph(s) below it. This and all other text is escaped: markup shows as it is typed.
    sections
        What follows, in order; an iterator is asked for one at a time.
    highlights
        (name, value) pairs shown large below the lead.
    warnings
        Sentences set apart below them.

    Returns
    -------
    Path
        Of the file.

    Raises
    ------
    InputError
        The file cannot be written (an earlier one is left as it was), or a table's row has not its number of columns.
    """
    target = Path(path)
    text = render_page(title, lead, sections, highlights, warnings)
    try:
        write_atomically(target, text)
    except OSError as error:
        raise InputError(
            f"Cannot write the page {target} ({error.strerror or error}): make room or choose another folder."
        ) from error
    return target
