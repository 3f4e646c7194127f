"""Names, numbers and tables as text of a terminal: nothing in them is read as markup or as a control sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from p2pfl.inspector.run_state import names_text, printable
from p2pfl.inspector.verdict import SAME, Scores, mean_scores, of_rows, scores
from p2pfl.runs.summary_fields import lower_is_better, primary_metric

MAX_NODES = 40
"""Nodes that a table of nodes has a row for."""
_REGULAR = 3  # steps of the same size that are no chance
_MAX_RANGES = 12
_ANY_WIDTH = 10_000
_METRICS_BESIDE = 2  # what 80 columns hold
_HEADING = 9


def table_of(first: str, *others: str) -> Table:
    """Two blanks between columns, a line under the heading; long words fold instead of being cut."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, header_style="dim")
    for column in (first, *others):
        table.add_column(column, overflow="fold")
    return table


def name_cell(text: str) -> Text:
    """Cell with a name, which folds where it is too long."""
    return Text(printable(text), overflow="fold")


def ranges_text(rounds: Sequence[int]) -> str:
    """4, 5, 6, 9, 20, 22, 24, 26 as "4-6, 9, every 2nd of 20-26"; some of many."""
    found, place = list[str](), 0
    while place < len(rounds):
        step = rounds[place + 1] - rounds[place] if place + 1 < len(rounds) else 1
        last = place
        while last + 1 < len(rounds) and rounds[last + 1] == rounds[last] + step:
            last += 1
        if step > 1 and last - place < _REGULAR:
            last = place
        between = f"{rounds[place]}-{rounds[last]}"
        found.append(str(rounds[place]) if last == place else between if step == 1 else f"every {_ordinal(step)} of {between}")
        place = last + 1
    return names_text(found, _MAX_RANGES)


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def number_text(value: float | None) -> str:
    """Write a number in at most six signs; "-" for none."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or SAME <= abs(value) < 1000 else f"{value:.1e}"  # noqa: PLR2004  # what six signs can show


def seconds_text(value: float | None) -> str:
    """Write a duration in seconds or milliseconds."""
    if value is None:
        return "-"
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def bytes_text(value: float | None) -> str:
    """Write a number of bytes with its unit."""
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if value < 1000:  # noqa: PLR2004
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def hospital_table(summary: Mapping[str, Any]) -> RenderableType:
    """Every node's metrics: alone, in the network, with all data pooled, and how much better the network is; the primary metric first.

    A baseline that was not computed has no column. "mean model" is the mean of all models, on all test rows together. Above 40 nodes those
    with the largest and the smallest gain are shown, above 1,000 the mean alone.

    Raises:
        ValueError: the summary has no metrics.
    """
    if not summary["metrics"]:
        raise ValueError("a summary without metrics has no table")
    first = primary_metric(summary["metrics"])
    ordered = sorted(summary["metrics"], key=lambda name: name != first)
    said = [Text(printable(sentence), style="dim") for sentence in of_rows(summary)]
    return Group(_MetricTables(summary=summary, metrics=ordered), *said)


@dataclass(frozen=True, kw_only=True, slots=True)
class _MetricTables:
    """Every node's metrics, two in a table where that many fit beside each other without folding a name."""

    summary: Mapping[str, Any]
    metrics: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for start in range(0, len(self.metrics), _METRICS_BESIDE):
            pair = self.metrics[start : start + _METRICS_BESIDE]
            together = _metric_table(self.summary, pair)
            fits = console.measure(together, options=options.update(max_width=_ANY_WIDTH)).maximum <= options.max_width
            for place, table in enumerate([together] if fits else [_metric_table(self.summary, [metric]) for metric in pair]):
                yield from (Text(), table) if start + place else (table,)


def _metric_table(summary: Mapping[str, Any], metrics: Sequence[str]) -> Table:
    table = table_of("node")
    table.columns[0].vertical = "bottom"  # the metrics' names have several lines
    at = {metric: scores(summary, metric) for metric in metrics}
    means = {metric: mean_scores(summary, metric) for metric in metrics}
    columns = {metric: _columns([*at[metric].values(), means[metric]]) for metric in metrics}
    for metric in metrics:
        for number, column in enumerate(columns[metric]):
            named = column.split(" ") if column == "better by" else [column]
            heading = [*_heading(metric), *named] if number == 0 else named
            table.add_column(Text("\n".join(heading)), justify="right", vertical="bottom", no_wrap=True)
    nodes, hidden = _shown_nodes(at[metrics[0]])
    for node in nodes:
        table.add_row(name_cell(node), *(cell for m in metrics for cell in _score_cells(at[m][node], columns[m])))
    if hidden:
        table.add_row(Text(f"({hidden} more)", style="dim"))
    table.add_section()
    table.add_row(Text("mean"), *(cell for m in metrics for cell in _score_cells(means[m], columns[m])))
    of_mean_model = summary.get("mean_model") or {}
    if any(of_mean_model.get(metric) is not None for metric in metrics):
        model_cells = (Text(number_text(of_mean_model.get(m)) if column == "network" else "") for m in metrics for column in columns[m])
        table.add_row(Text("mean model"), *model_cells)
    return table


def _heading(metric: str) -> list[str]:
    """A metric's name on lines narrow enough for the column that it stands above, and whether less of it is better."""
    down = ["(lower is", "better)"] if lower_is_better(metric) else []
    return [piece[start : start + _HEADING] for piece in printable(metric).split("_") for start in range(0, len(piece), _HEADING)] + down


def _columns(rows: Sequence[Scores]) -> list[str]:
    alone = ["alone"] if any(row.alone is not None for row in rows) else []
    pooled = ["pooled"] if any(row.pooled is not None for row in rows) else []
    return [*alone, "network", *pooled, *(["better by"] if alone else [])]


def _score_cells(row: Scores, columns: Sequence[str]) -> list[Text]:
    cells = []
    for column in columns:
        if column != "better by":
            cells.append(Text(number_text(getattr(row, column)), style="bold" if column == "network" else ""))
        elif row.better_by is None:
            cells.append(Text("-"))
        else:
            style = "green" if row.better_by >= SAME else "red" if row.better_by <= -SAME else "dim"
            cells.append(Text(f"{row.better_by:+.3f}" if style != "dim" else "0.000", style=style))
    return cells


def _shown_nodes(rows: Mapping[str, Scores]) -> tuple[list[str], int]:
    """All nodes, or the two ends of the list by what they gained, in the order of their names."""
    if len(rows) <= MAX_NODES:
        return list(rows), 0
    ranked = sorted(rows, key=lambda node: rows[node].better_by or 0.0)
    half = MAX_NODES // 4
    return sorted(ranked[:half] + ranked[-half:]), len(rows) - 2 * half
