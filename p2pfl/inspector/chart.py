"""A curve on a logarithmic scale in plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from p2pfl.inspector.gaps import pieces

Curve = Sequence[float | None]

_LABEL_WIDTH = 8
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # rows by columns of one character, as Unicode numbers them


def log_chart(
    rounds: Sequence[int], curve: Curve, reference: Curve, *, width: int = 78, height: int = 10, ascii_only: bool = False
) -> list[str]:
    """Lines of text with a curve (braille dots, or stars) before a reference (dots in the middle of the line, or full stops).

    The plot has powers of ten at its left and rounds, which increase, beneath; it is empty where the curve has fewer than two points. Lines
    break where rounds are missing or have no value; zero and below are left out. The width is that of the longest line, labels included,
    the height that of the plot itself; ASCII is for terminals that are not UTF-8.
    """
    xs, ys = _points(rounds, curve)
    if len(xs) < 2 or xs[0] == xs[-1]:  # noqa: PLR2004  # one point is no curve
        return []
    reference_xs, reference_ys = _points(rounds, reference)
    inner = width - _LABEL_WIDTH - 1
    logs = np.concatenate([ys, reference_ys[reference_ys > ys.min() - 1]])
    low = math.floor(logs.min())
    high = max(math.ceil(logs.max()), low + 1)  # whole decades, at least one
    across, down = (1, 1) if ascii_only else (2, 4)

    def rows_of(points_x: NDArray[np.float64], points_y: NDArray[np.float64], columns: int, rows: int) -> list[tuple[int, int]]:
        grid = np.linspace(rounds[0], rounds[-1], columns)
        inside = (grid >= points_x[0] - 1e-9) & (grid <= points_x[-1] + 1e-9)
        at = (high - np.interp(grid, points_x, points_y)) / (high - low) * (rows - 1)
        found = [(column, int(row)) for column, row in enumerate(np.rint(at)) if inside[column] and 0 <= row < rows]
        if found or not len(points_x):
            return found
        # between two columns: the nearest one shows it
        column = int(np.abs(grid - points_x[0]).argmin())
        row = int(np.rint((high - points_y[0]) / (high - low) * (rows - 1)))
        return [(column, row)] if 0 <= row < rows else []

    canvas = [[" "] * inner for _ in range(height)]
    if len(reference_xs):
        for column, row in rows_of(reference_xs, reference_ys, inner, height):
            canvas[row][column] = "." if ascii_only else "·"
    dots: list[tuple[int, int]] = []
    for piece in pieces(rounds, [value if value is None or value > 0 else None for value in curve]):
        piece_xs, piece_ys = np.array([(number, math.log10(value)) for number, value in piece], dtype=np.float64).T
        dots += _joined(rows_of(piece_xs, piece_ys, inner * across, height * down))
    for (column, row), bits in _cells(dots, across, down).items():
        canvas[row][column] = "*" if ascii_only else chr(_BRAILLE + bits)
    corner, floor, wall = ("+", "-", "|") if ascii_only else ("└", "─", "│")
    lines = [
        f"{label:>{_LABEL_WIDTH}}{wall}{''.join(cells)}".rstrip() for label, cells in zip(_labels(low, high, height), canvas, strict=True)
    ]
    ends = f"{rounds[0]}{rounds[-1]:>{inner - len(str(rounds[0]))}}"
    return [*lines, " " * _LABEL_WIDTH + corner + floor * inner, " " * (_LABEL_WIDTH + 1) + ends]


def _points(rounds: Sequence[int], curve: Curve) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rounds and decimal logarithms of what has one."""
    pairs = [(t, math.log10(value)) for t, value in zip(rounds, curve, strict=True) if value is not None and value > 0]
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _labels(low: float, high: float, height: int) -> list[str]:
    """A power of ten on each line that one falls on, as many as there is room for."""
    labels = [""] * height
    step = math.ceil((high - low) / max(1, height // 2))
    for power in range(int(high), int(low) - 1, -step):
        labels[round((high - power) / (high - low) * (height - 1))] = f"1e{power:+03d} "
    return labels


def _joined(dots: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The dots with the gaps of a steep curve filled downwards or upwards."""
    filled = list(dots)
    for (_, row), (next_column, next_row) in pairwise(dots):
        step = 1 if next_row > row else -1
        filled += [(next_column, between) for between in range(row + step, next_row, step)]
    return filled


def _cells(dots: Sequence[tuple[int, int]], across: int, down: int) -> dict[tuple[int, int], int]:
    """Which character cells hold dots, and which bits of a braille sign those are."""
    cells: dict[tuple[int, int], int] = {}
    for column, row in dots:
        cell = (column // across, row // down)
        cells[cell] = cells.get(cell, 0) | _DOTS[row % down][column % across]
    return cells
