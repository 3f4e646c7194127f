"""A sweep's curves: the consensus distance and how good they are after each round, with bands over the seeds; needs the `plot` extra.

Shapes: S seeds, R rounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.errors import MissingExtraError, StoreError
from p2pfl.inspector.convergence import CONSENSUS, DISAGREEMENT
from p2pfl.runs.records import read_rounds
from p2pfl.runs.text import Row

FloatArray = NDArray[np.float64]

CONFIDENCE = 0.95
MOST_CURVES = 20
_COLOURS = 10
_AT_MOST_ONE = frozenset({"accuracy", "balanced_accuracy", "auroc"})
_MAX_LABEL = 40  # characters


@dataclass(frozen=True, kw_only=True)
class Course:
    """Course of one value in one run."""

    rounds: list[int]
    """After so many; increasing."""
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class Band:
    """Several runs of a cell in one curve."""

    rounds_R: FloatArray
    mean_R: FloatArray
    low_R: FloatArray
    """Not a number where there are less than two runs."""
    high_R: FloatArray


def distances_of(rows: Sequence[Row], key: str) -> Course:
    """One of the two distances of a run round by round; zero and unknown ones are left out."""
    known = [row for row in rows if row.get(key)]
    return Course(rounds=[row["round"] + 1 for row in known], values=[row[key] for row in known])


def metric_course(run: Path, metric: str) -> Course:
    """A metric on average over the sites, after each round in which it was evaluated."""
    values: dict[int, list[float]] = {}
    for row in _lines(run / "nodes.jsonl", having='"metrics"'):
        value = row["metrics"].get(metric)
        if value is not None:
            values.setdefault(row["round"] + 1, []).append(value)
    rounds = sorted(values)
    return Course(rounds=rounds, values=[sum(values[number]) / len(values[number]) for number in rounds])


def band_of(courses: Sequence[Course], *, logarithmic: bool = False) -> Band | None:
    """Mean and confidence band over runs, which are independent: Student's t, as there are few. None where there is no value at all.

    A run that has stopped stays where it stopped. The band begins where all runs have a value. On a logarithmic scale the mean is the
    geometric one, and the band stays above zero.
    """
    courses = [course for course in courses if course.rounds]
    if not courses:
        return None
    rounds_R = np.unique(np.concatenate([course.rounds for course in courses]))
    rounds_R = rounds_R[rounds_R >= max(course.rounds[0] for course in courses)]
    # the newest value that a run had after so many rounds
    places = [np.searchsorted(course.rounds, rounds_R, side="right") - 1 for course in courses]
    values_SR = np.stack([np.array(course.values)[place_R] for course, place_R in zip(courses, places, strict=True)])
    if logarithmic:
        values_SR = np.log(values_SR)
    mean_R, half_R = values_SR.mean(axis=0), _half_widths(values_SR)
    lines = (mean_R, mean_R - half_R, mean_R + half_R)
    mean_R, low_R, high_R = (np.exp(line_R) for line_R in lines) if logarithmic else lines
    return Band(rounds_R=rounds_R.astype(np.float64), mean_R=mean_R, low_R=low_R, high_R=high_R)


def draw_curves(path: Path, runs: Mapping[str, Sequence[Path]], metric: str | None, title: str, keys: str, measured_on: str) -> None:
    """Draw the curves of all cells: their runs' folders by the cells' labels, whose keys are the legend's title.

    The metric, if there is any, is drawn beside the distance; its axis names the rows that it is measured on.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StoreError: the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plot.png needs matplotlib: pip install 'p2pfl-mesh[plot]'") from error
    shown = dict(list(runs.items())[:MOST_CURVES])
    figure = Figure(figsize=(11 if metric is None else 14, 5), layout="constrained")
    panels = figure.subplots(1, 1 if metric is None else 2, squeeze=False)[0]
    if metric is not None:
        courses = {label: [metric_course(run, metric) for run in places] for label, places in shown.items()}
        _draw(panels[0], courses, logarithmic=False)
        if metric in _AT_MOST_ONE:  # a band may reach further than any value can
            low, high = panels[0].get_ylim()
            panels[0].set_ylim(max(low, 0.0), min(high, 1.0))
        panels[0].set_ylabel(f"{metric} on {measured_on}, mean over the sites")
    rounds = {label: [read_rounds(run) for run in places] for label, places in shown.items()}
    # runs of earlier versions know the one before mixing only
    has_all = all(row.get("consensus_distance") is not None for runs_rows in rounds.values() for rows in runs_rows for row in rows)
    key, name = ("consensus_distance", CONSENSUS) if has_all else ("rms_disagreement", DISAGREEMENT)
    _draw(panels[-1], {label: [distances_of(rows, key) for rows in of_cell] for label, of_cell in rounds.items()}, logarithmic=True)
    panels[-1].set_ylabel(name)
    panels[-1].set_yscale("log")
    several = max((len(places) for places in shown.values()), default=0)
    over = f"; mean and {CONFIDENCE:.0%} confidence over {several} seeds" if several > 1 else ""
    hidden = f"; the first {len(shown)} of {len(runs)} cells" if len(runs) > len(shown) else ""
    figure.suptitle(f"{title}{over}{hidden}", fontsize=11)
    handles, labels = panels[-1].get_legend_handles_labels()
    if not handles:
        handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, title=keys, title_fontsize=8)
    temporary = path.with_name(f".{path.name}")
    try:
        figure.savefig(temporary, dpi=130, format="png")
        temporary.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror}") from error


def _draw(axes: Any, courses: Mapping[str, Sequence[Course]], *, logarithmic: bool) -> None:
    for number, (label, of_cell) in enumerate(courses.items()):
        band = band_of(of_cell, logarithmic=logarithmic)
        if band is None:
            continue
        style = {"color": f"C{number % _COLOURS}", "linestyle": "-" if number < _COLOURS else "--"}
        short = label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL - 1]}…"
        axes.plot(band.rounds_R, band.mean_R, label=short.replace("$", r"\$"), **style)
        if np.isfinite(band.low_R).any():
            axes.fill_between(band.rounds_R, band.low_R, band.high_R, color=style["color"], alpha=0.2, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("rounds")
    axes.grid(visible=True, alpha=0.3)


def _half_widths(values_SR: FloatArray) -> FloatArray:
    num_seeds = len(values_SR)
    if num_seeds < 2:  # noqa: PLR2004
        return np.full(values_SR.shape[1], np.nan)
    from scipy.special import stdtrit

    return np.asarray(stdtrit(num_seeds - 1, (1 + CONFIDENCE) / 2) * values_SR.std(axis=0, ddof=1) / np.sqrt(num_seeds))


def _lines(path: Path, having: str = "") -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, read one by one: those of the nodes may be many."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if having in line]
