"""Self-contained HTML pages: headings, tables, pictures and folded text, readable on a phone.

These functions return `Html`.  Any other string passed to them is text, and is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from fastrl.report.plots import Picture

CSS = """
:root { color-scheme: light; --ink: #1f2328; --dim: #59636e; --line: #d1d9e0; --wash: #f6f8fa;
  --good: #00664b; --bad: #a63d00 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line) }
p { margin: .5rem 0; max-width: 48rem }
.dim, figcaption, caption { color: var(--dim); font-size: .875rem }
.lead { font-size: 1.1rem }
.figures { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
figure { margin: 0; max-width: 34rem }
figure.wide { max-width: 38rem }
figure img { display: block; width: 100%; height: auto }
figure h3 { font-size: 1rem; margin: 0 0 .25rem }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; font-size: .9375rem }
caption { text-align: left; padding-bottom: .4rem; caption-side: top }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem .4rem 0;
  border-bottom: 1px solid var(--line) }
thead th { font-weight: 600; white-space: nowrap }
tbody th { font-weight: 500 }
.number { text-align: right; font-variant-numeric: tabular-nums }
.sample { font: .8125rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap }
.good { color: var(--good); font-weight: 600 } .bad { color: var(--bad); font-weight: 600 }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 6px; padding: .75rem;
  margin: .5rem 0;
  font: .8125rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap }
summary { cursor: pointer; padding: .35rem 0 }
@media (max-width: 44rem) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
  tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line) }
  th, td { display: block; border: 0; padding: .1rem 0; text-align: left !important }
  td[data-label]::before { content: attr(data-label) ": "; color: var(--dim);
  font: .875rem/1.45 system-ui, sans-serif }
  td.sample::before { display: block }
  td:empty { display: none }
}
"""
SPACES = "\n\t\u00a0\u2009\u202f\u3000"  # not printable to Python, but part of ordinary text
REPLACEMENT = "\ufffd"


class Html(str):
    """Markup that is complete and escaped."""


def text(value: object) -> Html:
    """`value` as escaped text; invisible characters (controls, lone surrogates) become replacement marks."""
    if isinstance(value, Html):
        return value
    characters = str(value).replace("\r\n", "\n")
    visible = [c if c.isprintable() or c in SPACES else REPLACEMENT for c in characters]
    return Html(html.escape("".join(visible)))


def page(title: str, lead: str, *sections: Html) -> str:
    """A whole document: a heading, a leading paragraph and `sections`."""
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{text(title)}</title><style>{CSS}</style>'
    body = f'<main><h1>{text(title)}</h1><p class="lead">{text(lead)}</p>{"".join(sections)}</main>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def section(heading: str, *blocks: Html) -> Html:
    """A second-level heading with its blocks; nothing if all blocks are empty."""
    inside = "".join(blocks)
    if not inside:
        return Html("")
    return Html(f"<section><h2>{text(heading)}</h2>{inside}</section>")


def paragraph(value: str) -> Html:
    """Text in small, dim print."""
    return Html(f'<p class="dim">{text(value)}</p>')


def figures(pictures: Sequence[tuple[str, Picture]], *, wide: bool = False) -> Html:
    """Pictures with their titles, side by side if there is room."""
    if not pictures:
        return Html("")
    kind = ' class="wide"' if wide else ""
    cells = []
    for title, picture in pictures:
        image = f'<img src="{picture.uri}" alt="{text(picture.alt)}">'
        caption = f"<figcaption>{text(picture.note)}</figcaption>" if picture.note else ""
        cells.append(f"<figure{kind}><h3>{text(title)}</h3>{image}{caption}</figure>")
    return Html(f'<div class="{"" if wide else "figures"}">{"".join(cells)}</div>')


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    caption: str = "",
    numbers: bool = False,
    sample: bool = False,
) -> Html:
    """A table; the first column names the row.  On a narrow screen each row is a card.

    numbers  right-align the other columns
    sample   set every cell in the monospaced type of the model's answers
    """
    if not rows:
        return Html("")
    row_kind = ' class="sample"' if sample else ""
    head_kind = ' class="number"' if numbers else ""
    cell_kind = head_kind or row_kind

    first, *others = header
    top = f'<th scope="col">{text(first)}</th>'
    for label in others:
        top += f'<th scope="col"{head_kind}>{text(label)}</th>'

    lines = []
    for name, *values in rows:
        cells = f'<th scope="row"{row_kind}>{text(name)}</th>'
        for label, value in zip(others, values, strict=True):
            cells += f'<td{cell_kind} data-label="{text(label)}">{text(value)}</td>'
        lines.append(f"<tr>{cells}</tr>")
    note = f"<caption>{text(caption)}</caption>" if caption else ""
    return Html(f"<table>{note}<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>")


def folded(summary: str, content: str) -> Html:
    """Preformatted text that a click on `summary` unfolds; nothing for empty text."""
    if not content.strip():
        return Html("")
    return Html(f"<details><summary>{text(summary)}</summary><pre>{text(content)}</pre></details>")


def verdict(correct: bool | None) -> Html:
    """`correct` or `wrong`, in words and not by colour alone; nothing when unknown."""
    if correct is None:
        return Html("")
    return Html('<span class="good">correct</span>' if correct else '<span class="bad">wrong</span>')
