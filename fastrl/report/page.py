"""Self-contained HTML pages: headings, tables, pictures, folded text; escaped, readable on a phone, nothing
fetched.

What these functions return is `Html`; any other string given to them is text, and is escaped.
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


SPACES = "\n\t\u00a0\u2009\u202f\u3000"  # not printable by Python's rule, but they belong into text


class Html(str):
    """Markup that is whole and escaped already."""


def text(value: object) -> Html:
    """`value` as escaped text; a character no one can see (a control, a lone surrogate) is shown as a
    replacement mark.
    """
    if isinstance(value, Html):
        return value
    return Html(
        html.escape(
            "".join(
                c if c.isprintable() or c in SPACES else "\ufffd" for c in str(value).replace("\r\n", "\n")
            )
        )
    )


def page(title: str, lead: str, *sections: Html) -> str:
    """A whole document of one heading, a leading paragraph and `sections`."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{text(title)}</title>'
    )
    body = f'<main><h1>{text(title)}</h1><p class="lead">{text(lead)}</p>{"".join(sections)}</main>'
    return (
        "<!DOCTYPE html>\n<html "
        f'lang="en"><head>{head}<style>{CSS}</style></head><body>{body}</body></html>\n'
    )


def section(heading: str, *blocks: Html) -> Html:
    """A second-level heading and what stands under it; nothing at all where no block has content."""
    inside = "".join(blocks)
    return Html(f"<section><h2>{text(heading)}</h2>{inside}</section>" if inside else "")


def paragraph(value: str) -> Html:
    """Text in the page's dim small print."""
    return Html(f'<p class="dim">{text(value)}</p>')


def figures(pictures: Sequence[tuple[str, Picture]], *, wide: bool = False) -> Html:
    """Pictures with their titles, side by side where there is room."""
    kind = ' class="wide"' if wide else ""
    cells = [
        f'<figure{kind}><h3>{text(title)}</h3><img src="{p.uri}" alt="{text(p.alt)}">'
        + (f"<figcaption>{text(p.note)}</figcaption>" if p.note else "")
        + "</figure>"
        for title, p in pictures
    ]
    return Html(f'<div class="{"" if wide else "figures"}">{"".join(cells)}</div>' if cells else "")


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    caption: str = "",
    numbers: bool = False,
    sample: bool = False,
) -> Html:
    """A table whose first column names the row; on a narrow screen each row is a card.

    numbers right-aligns the other columns; sample sets every cell in the type of the model's answers.
    """
    if not rows:
        return Html("")
    kind = ' class="number"' if numbers else ' class="sample"' if sample else ""
    first = ' class="sample"' if sample else ""
    top = "".join(
        f'<th scope="col"{kind if i and numbers else ""}>{text(h)}</th>' for i, h in enumerate(header)
    )
    lines = []
    for row in rows:
        cells = "".join(
            f'<td{kind} data-label="{text(label)}">{text(value)}</td>'
            for label, value in zip(header[1:], row[1:], strict=True)
        )
        lines.append(f'<tr><th scope="row"{first}>{text(row[0])}</th>{cells}</tr>')
    note = f"<caption>{text(caption)}</caption>" if caption else ""
    return Html(f"<table>{note}<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>")


def folded(summary: str, content: str) -> Html:
    """Preformatted text behind a line to click; nothing for no text."""
    return Html(
        f"<details><summary>{text(summary)}</summary><pre>{text(content)}</pre></details>"
        if content.strip()
        else ""
    )


def verdict(correct: bool | None) -> Html:
    """Right or wrong, in words and not by colour alone; nothing when unknown."""
    return Html(
        ""
        if correct is None
        else '<span class="good">correct</span>'
        if correct
        else '<span class="bad">wrong</span>'
    )
