"""Pictures of statistics as SVG within a page: forest plots, and survival curves with numbers at risk below them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from p2pfl.inspector.markup import escaped

_WIDTH, _ROW, _LEFT, _RIGHT, _TOP = 760, 26, 210, 200, 12
_PLOT_HEIGHT = 300
_MOST_TICKS = 6
_APART = 48.0
_COLOURS = ("#1f6feb", "#c2410c", "#15803d", "#7c3aed", "#b91c1c", "#0e7490", "#a16207", "#be185d")
_DASHES = ("", "6 3", "2 3", "9 3 2 3")


@dataclass(frozen=True, kw_only=True, slots=True)
class ForestRow:
    """One line of a forest plot."""

    name: str
    value: float
    low: float
    high: float
    is_total: bool = False
    """Whether it combines others, and is drawn as a diamond."""


def forest(rows: Sequence[ForestRow], *, about: str, neutral: float, is_ratio: bool) -> str:
    """A forest plot: estimates with their intervals, and a line where nothing matters.

    Args:
        rows: finite estimates; ratios are above 0.
        about: what it shows, for those who do not see it.
        neutral: value without an effect.
        is_ratio: whether the axis is logarithmic.
    """
    place = math.log if is_ratio else float
    ends = [place(each) for row in rows for each in (row.low, row.high)] + [place(neutral)]
    least, largest = min(ends), max(ends)
    margin = 0.05 * (largest - least or 1.0)
    least, largest = least - margin, largest + margin
    width, height = _WIDTH - _LEFT - _RIGHT, _TOP + _ROW * len(rows) + 40

    def x(value: float) -> float:
        return _LEFT + width * (place(value) - least) / (largest - least)

    bottom = _TOP + _ROW * len(rows)
    parts = [_line(x(neutral), _TOP - 6, x(neutral), bottom, "var(--faint)", "4 3")]
    for tick in ticks(math.exp(least), math.exp(largest), is_ratio=True) if is_ratio else ticks(least, largest):
        parts += [_line(x(tick), bottom, x(tick), bottom + 5, "var(--faint)"), _text(x(tick), bottom + 19, f"{tick:g}", "middle")]
    parts.append(_line(_LEFT, bottom, _LEFT + width, bottom, "var(--faint)"))
    for number, row in enumerate(rows):
        y = _TOP + _ROW * (number + 0.5)
        weight = ' font-weight="600"' if row.is_total else ""
        parts.append(_text(_LEFT - 12, y + 4, _cut(row.name), "end", weight))
        parts.append(_text(_WIDTH - _RIGHT + 12, y + 4, f"{row.value:.3g} ({row.low:.3g} to {row.high:.3g})", "start", weight))
        if row.is_total:
            corners = f"{x(row.low):.1f},{y:.1f} {x(row.value):.1f},{y - 7:.1f} {x(row.high):.1f},{y:.1f} {x(row.value):.1f},{y + 7:.1f}"
            parts.append(f'<polygon points="{corners}" fill="{_COLOURS[0]}"/>')
            continue
        parts.append(_line(x(row.low), y, x(row.high), y, _COLOURS[0]))
        parts.append(f'<rect x="{x(row.value) - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{_COLOURS[0]}"/>')
    return _picture(parts, height, about)


def survival(curves: Sequence[tuple[str, Sequence[dict[str, Any]]]], *, about: str) -> str:
    """Survival curves as steps, and below them how many were at risk.

    Args:
        curves: name of each group, and its rows with time, at_risk and survival.
        about: what it shows, for those who do not see it.
    """
    last = max(float(row["time"]) for _, rows in curves for row in rows)
    left, right, top = 170, 30, 24
    width, bottom = _WIDTH - left - right, top + _PLOT_HEIGHT
    height = bottom + 62 + 18 * len(curves)

    def x(time: float) -> float:
        return left + width * time / last

    def y(fraction: float) -> float:
        return bottom - _PLOT_HEIGHT * fraction

    parts = []
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        parts += [
            _line(left, y(fraction), left + width, y(fraction), "var(--line)"),
            _text(left - 8, y(fraction) + 4, f"{fraction:g}", "end"),
        ]
    times = spread_out(sorted({0.0, *(float(row["time"]) for _, rows in curves for row in rows)}), last * _APART / width)
    for time in times:
        parts += [_line(x(time), bottom, x(time), bottom + 5, "var(--faint)"), _text(x(time), bottom + 19, f"{time:g}", "middle")]
    parts.append(_text(left - 30, bottom + 44, "at risk", "end", ' font-weight="600"'))
    for number, (name, rows) in enumerate(curves):
        colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)]
        points, level = [f"{x(0):.1f},{y(1):.1f}"], 1.0
        for row in rows:
            points += [f"{x(row['time']):.1f},{y(level):.1f}", f"{x(row['time']):.1f},{y(row['survival']):.1f}"]
            level = row["survival"]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
        under = bottom + 62 + 18 * number
        parts.append(_text(left - 30, under, _cut(name, 20), "end", f' style="fill:{colour}"'))
        for time in times[:-1]:
            parts.append(_text(x(time), under, f"{at_risk(rows, time):,}", "middle"))
    return _picture(parts, height, about)


def calibration(groups: Sequence[dict[str, Any]], *, about: str) -> str:
    """Observed against predicted risk in groups, with intervals, and the line on which both are the same.

    Args:
        groups: predicted and observed risk of each, with ends of the interval.
        about: what it shows, for those who do not see it.
    """
    most = min(1.0, 1.1 * max(max(float(each["high"]), float(each["predicted"])) for each in groups))
    left, top, size = 70, 16, 360
    bottom = top + size

    def x(risk: float) -> float:
        return left + size * risk / most

    def y(risk: float) -> float:
        return bottom - size * risk / most

    parts = [_line(x(0), y(0), x(most), y(most), "var(--faint)", "4 3")]
    for tick in ticks(0.0, most):
        parts += [_line(x(tick), bottom, x(tick), bottom + 5, "var(--faint)"), _text(x(tick), bottom + 19, f"{tick:g}", "middle")]
        parts += [_line(left, y(tick), left + size, y(tick), "var(--line)"), _text(left - 8, y(tick) + 4, f"{tick:g}", "end")]
    parts.append(_text(left + size / 2, bottom + 40, "predicted risk", "middle"))
    parts.append(_text(left, top - 4, "observed risk", "start"))
    for each in groups:
        place = x(float(each["predicted"]))
        parts.append(_line(place, y(float(each["low"])), place, y(float(each["high"])), _COLOURS[0]))
        parts.append(f'<circle cx="{place:.1f}" cy="{y(float(each["observed"])):.1f}" r="4" fill="{_COLOURS[0]}"/>')
    return _picture(parts, bottom + 52, about)


def at_risk(rows: Sequence[dict[str, Any]], time: float) -> int:
    """Patients at risk after a time: those when the next cell begins."""
    return next((int(row["at_risk"]) for row in rows if row["time"] > time), 0)


def spread_out(times: Sequence[float], least: float) -> list[float]:
    """Some of ascending times, the first and the last among them, that are at least so far apart."""
    found = [times[0]]
    for time in times[1:-1]:
        if time - found[-1] >= least and times[-1] - time >= least:
            found.append(time)
    return [*found, times[-1]]


def ticks(least: float, largest: float, *, is_ratio: bool = False) -> list[float]:
    """Round numbers between two ends, a few of them."""
    if is_ratio:
        powers = range(math.floor(math.log10(least)) - 1, math.ceil(math.log10(largest)) + 1)
        for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**power for power in powers for step in steps if least <= step * 10.0**power <= largest]
            if len(found) <= _MOST_TICKS:
                return found
        return found[:: math.ceil(len(found) / _MOST_TICKS)]
    rough = (largest - least) / _MOST_TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(each * size for each in (1, 2, 2.5, 5, 10) if each * size >= rough)
    first = math.ceil(least / step)
    return [round(number * step, 12) for number in range(first, math.floor(largest / step) + 1)]


def _picture(parts: Sequence[str], height: float, about: str) -> str:
    inner = "".join(parts)
    return f'<svg class="drawn" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escaped(about)}">{inner}</svg>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} style="stroke:{colour}" stroke-dasharray="{dash}"/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escaped(text)}</text>'


def _cut(text: str, most: int = 32) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
