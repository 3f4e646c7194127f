"""Pieces of HTML that every page about runs is made of. What comes from other machines is escaped here and nowhere else."""

from __future__ import annotations

import html
from collections.abc import Sequence

MAX_ROWS = 200

_LIGHT = "color-scheme: light; --ink: #1a202c; --paper: #fff; --line: #cbd5e0; --faint: #5a6578; --good: #276749; --bad: #9b2c2c;"
_DARK = "color-scheme: dark; --ink: #e2e8f0; --paper: #171c26; --line: #3d4757; --faint: #a0aec0; --good: #68d391; --bad: #fc8181;"

COLOURS = f"""
:root {{ {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {_DARK} }} }}
:root[data-theme=dark] {{ {_DARK} }}
"""
"""Ink and paper of a page as its reader's machine prefers them, or as data-theme of the root says."""

STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.facts, .note { color: var(--faint); } .short li { margin: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); }
th { text-align: left; font-weight: 600; } td.number, th.number { text-align: right; }
.good { color: var(--good); } .bad { color: var(--bad); }
.state.lost, .state.late, .state.slow { font-weight: 600; } .state.lost { color: var(--bad); } .state.unknown { color: var(--faint); }
.state.lost::before { content: "\\2715\\a0"; } .state.late::before, .state.slow::before { content: "\\25c6\\a0"; }
.state.well::before, .state.finished::before { content: "\\25cf\\a0"; } .state.unknown::before { content: "\\25cb\\a0"; }
tr.mean td { border-top: 2px solid var(--line); font-weight: 600; } pre { overflow-x: auto; padding: 1rem; border: 1px solid var(--line); }
"""

Cell = str | tuple[str, str]
"""One cell of a table: a text, or a text and classes of the style sheet."""


def escaped(text: str, *, quotes: bool = True) -> str:
    """A text as HTML, without control characters; plotly, which reads a few entities only, would show escaped quotes as they are."""
    return html.escape("".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in text), quote=quotes)


def listed(sentences: Sequence[str]) -> str:
    """Sentences, one below the other."""
    return f'<ul class="short">{"".join(f"<li>{escaped(sentence)}</li>" for sentence in sentences)}</ul>'


def note(text: str) -> str:
    """A paragraph with a remark."""
    return f'<p class="note">{escaped(text)}</p>'


def table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], last: Sequence[Cell] | None = None, *, about: str) -> str:
    """A table that scrolls within itself where it is too wide, its last row set off; *about* says what it holds to who does not see it."""

    def line(cells: Sequence[Cell], kind: str = "") -> str:
        pairs = [cell if isinstance(cell, tuple) else (cell, "") for cell in cells]
        return f'<tr class="{kind}">' + "".join(f'<td class="{kinds}">{escaped(text)}</td>' for text, kinds in pairs) + "</tr>"

    kinds = [cell[1].split(" ")[0] if isinstance(cell, tuple) else "" for cell in rows[0]] if rows else [""] * len(heads)
    top = "".join(f'<th scope="col" class="{kind}">{escaped(head)}</th>' for head, kind in zip(heads, kinds, strict=True))
    body = "".join(map(line, rows)) + (line(last, "mean") if last is not None else "")
    named = f'aria-label="{escaped(about)}"'
    return f'<div class="scroll"><table {named}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def value_text(value: float | None) -> str:
    """A metric with three digits."""
    return "-" if value is None else f"{value:.3f}"
