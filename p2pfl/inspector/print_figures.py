"""A run's figures for a paper: one PNG each, one column wide, readable without colour. Needs matplotlib (extra `plot`).

Names come from other machines: none is read as a formula, and a letter that the font lacks becomes a question mark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from p2pfl.errors import MissingExtraError, StoreError
from p2pfl.inspector.convergence import BASES, Convergence, convergence
from p2pfl.inspector.figures import MAX_DRAWN, laid_out
from p2pfl.inspector.gaps import broken_line, certified_pieces, gaps, isolated_points
from p2pfl.inspector.health import node_health
from p2pfl.inspector.link_health import WINDOW, edge_health
from p2pfl.inspector.verdict import betterness
from p2pfl.runs.records import RunRecords
from p2pfl.runs.summary_fields import lower_is_better
from p2pfl.runs.text import Row

_MM = 1 / 25.4  # inches
_WIDTH = 85 * _MM
_HEIGHT = 60 * _MM
_LINE = 4.2 * _MM  # a row with a name
_POINTS = 8
_DPI = 300
_MAX_NAMED = 12
_MAX_NUMBERED_NODES = 40
_STEEP = 0.35
_MAX_SITES = 40
_MAX_NUMBERED = 8  # sites whose numbers have room in a matrix
_MAX_COLUMNS = 7  # whose numbers have room below
_LONGEST = 18  # characters of a name
_MAX_GAPS = 40
_ROOM = 0.08  # of the axis, for a line of letters
_INK, _GREY, _PALE = "black", "0.45", "0.85"
_DARK = 0.5  # shade from which on white ink is read
_LEAST_SPAN = 0.1  # between white and black, of figures between 0 and 1: smaller differences are no contrast


def write_figures(run: RunRecords, folder: Path) -> list[Path]:
    """graph, agreement, loss, worth and matrix as PNG, 85 mm wide, 300 dots an inch, letters of 8 points; what is empty is left out.

    The folder is made where it is not there; pictures there are replaced. The answer is the files written.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StoreError: a file cannot be written.
    """
    try:
        import matplotlib as mpl  # an extra
    except ImportError as error:
        raise MissingExtraError("--png needs matplotlib: pip install 'p2pfl-mesh[plot]'") from error
    course, written = convergence(run), []
    style: dict[Any, Any] = {"font.size": _POINTS, "font.family": "DejaVu Sans", "axes.linewidth": 0.6, "lines.linewidth": 1.2}
    sizes = dict.fromkeys(("axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), _POINTS)
    with mpl.rc_context(style | sizes):
        figures = {
            "graph": _graph(run, course),
            "agreement": _agreement(run, course),
            "loss": _loss(run),
            "worth": _gains(run.gains),
            "matrix": _matrix(run.cross_site),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, figure in figures.items():
                if figure is not None:
                    figure.savefig(folder / f"{name}.png", dpi=_DPI)
                    written.append(folder / f"{name}.png")
        except OSError as error:
            raise StoreError(f"{folder}: cannot be written: {error.strerror}") from error
    return written


def _figure(height: float = _HEIGHT) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _graph(run: RunRecords, course: Convergence) -> Any:
    """Nodes the darker the more disagreement is left at them, links dashed that failed, with how often."""
    graph = run.topology or {}
    names, edges = graph.get("nodes") or [], graph.get("edges") or []
    if not edges or len(names) > MAX_DRAWN:
        return None
    drawn, places = laid_out(len(names), tuple((i, j) for i, j, _ in edges))
    nodes = node_health(run)
    failed = {ends: edge.missed for ends, edge in edge_health(run, nodes).items() if edge.state in ("slow", "lost")}
    fractions = {slow.node: slow.fraction for slow in course.slowest}
    most = max(fractions.values(), default=0.0) or 1.0
    greys = [str(1 - 0.5 * fractions.get(name, 0.0) / most) for name in names]
    points = np.array(places)
    are_named, are_numbered = len(names) <= _MAX_NAMED, _MAX_NAMED < len(names) <= _MAX_NUMBERED_NODES
    figure, axes = _figure(_WIDTH)
    for i, j in drawn.edges:
        has_failed = (ends := frozenset((names[i], names[j]))) in failed
        count = failed.get(ends, 0)
        axes.plot(*points[[i, j]].T, color=_INK if has_failed else _GREY, linestyle=(0, (4, 2)) if has_failed else "-", zorder=1)
        if count and len(names) <= _MAX_NUMBERED_NODES:
            halo = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(*points[[i, j]].mean(axis=0), f"{count}\N{MULTIPLICATION SIGN}", ha="center", va="center", bbox=halo, zorder=2)
    size = 160 if are_numbered else 60 if are_named else 15
    known = np.array([name in nodes and nodes[name].state in ("well", "late", "finished") for name in names])
    axes.scatter(*points[known].T, s=size, c=np.array(greys)[known], edgecolors=_INK, linewidths=0.8, zorder=3)
    for state, style in (("unknown", ":"), ("paused", "--"), ("lost", "-")):
        some = np.array([name in nodes and nodes[name].state == state for name in names])
        if not some.any():
            continue
        axes.scatter(*points[some].T, s=size, c="white", edgecolors=_INK, linewidths=0.8, linestyle=style, zorder=3)
        if state == "lost":
            axes.scatter(*points[some].T, s=size / 3, c=_INK, marker="x", linewidths=0.8, zorder=4)
    for place, (name, point) in enumerate(zip(names, points, strict=True)):
        if are_numbered:
            axes.text(*point, str(place + 1), ha="center", va="center_baseline", zorder=4)
        elif are_named:
            _name_beside(axes, _readable(name), point, point - points.mean(axis=0))
    axes.margins(0.25 if are_named else 0.08)
    axes.set_axis_off()
    said = ["numbers: the sites in the order of their names"] if are_numbered else []
    said += ["darker: more of the disagreement left"] if fractions else []
    said += [f"dashed: messages missed, last {WINDOW} rounds"] if failed else []
    states = {health.state for health in nodes.values()}
    said += ["crossed: lost"] if "lost" in states else []
    said += ["dashed ring: paused"] if "paused" in states else []
    said += ["dotted: nothing known"] if "unknown" in states else []
    axes.set_title("\n".join(said))
    return figure


def _name_beside(axes: Any, name: str, point: np.ndarray, outward: np.ndarray) -> None:
    """A node's name on the side where no links go: away from the middle."""
    across, up = outward / (np.hypot(*outward) or 1.0)
    beside = "center" if abs(across) < _STEEP else "left" if across > 0 else "right"
    above = "center" if abs(up) < _STEEP else "bottom" if up > 0 else "top"
    offset = (8 * across, 8 * up)
    axes.annotate(name, point, offset, textcoords="offset points", ha=beside, va=above, zorder=4, parse_math=False)


def _agreement(run: RunRecords, course: Convergence) -> Any:
    """How far the models are apart, what the records certify and the spectrum allows; lines and bands break where nothing is known."""
    if not any(course.distance):
        return None
    from matplotlib.ticker import LogFormatter

    figure, axes = _figure()
    if course.certified:
        label = "certified by the nodes' records"
        for piece in certified_pieces(course):
            axes.fill_between(*zip(*piece, strict=True), color=_PALE, linewidth=0 if len(piece) > 1 else 1.5, label=label)
            label = ""
        _shade(axes, run, course)
    rounds, distances = broken_line(course.rounds, course.distance)
    axes.plot(_numbers(rounds), _numbers(distances, above=0), color=_INK, label=BASES[course.basis])
    if single := isolated_points(course.rounds, course.distance):
        axes.plot(*zip(*single, strict=True), color=_INK, marker=".", markersize=3, linestyle="")
    if any(value is not None for value in course.bound):
        axes.plot(course.rounds, _numbers(course.bound, above=0), color=_INK, linestyle=":", label="bound from the spectrum")
    axes.set_yscale("log")
    # 1e-03: the raised digits of 10^-3 are too small in print
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    _along_rounds(figure, axes, "distance")
    figure.legend(loc="outside upper left", frameon=False)
    return figure


def _shade(axes: Any, run: RunRecords, course: Convergence) -> None:
    """Hatch the rounds of which nothing is certified; the longest gap has its reason."""
    spans = sorted(gaps(run, course), key=lambda gap: gap.first - gap.last)[:_MAX_GAPS]
    for gap in spans:
        axes.axvspan(gap.first - 0.5, gap.last + 0.5, facecolor="0.93", edgecolor="0.8", hatch="////", linewidth=0, zorder=0)
    if spans and spans[0].last - spans[0].first >= _ROOM * (course.rounds[-1] - course.rounds[0]):
        middle = (spans[0].first + spans[0].last) / 2
        halo = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        why = _readable(spans[0].why.removeprefix("not certified: "))
        place = axes.get_xaxis_transform()
        axes.text(middle, 0.5, why, transform=place, rotation=90, ha="center", va="center", bbox=halo, parse_math=False)


def _loss(run: RunRecords) -> Any:
    points = [(row["round"], row["loss"]) for row in run.rounds if row.get("loss") is not None]
    if not points:
        return None
    figure, axes = _figure()
    rounds, values = broken_line(*zip(*points, strict=True))
    axes.plot(_numbers(rounds), _numbers(values), color=_INK)
    if single := isolated_points(*zip(*points, strict=True)):
        axes.plot(*zip(*single, strict=True), color=_INK, marker=".", linestyle="")
    _along_rounds(figure, axes, "training loss, mean")
    return figure


def _along_rounds(figure: Any, axes: Any, label: str) -> None:
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=True, color=_PALE, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)


def _gains(rows: Sequence[Row]) -> Any:
    """How much better each site is than alone, with its interval, to the right where it is better; a full mark where that excludes 0."""
    known = [(row, gain, low, high) for row in rows for gain, low, high in (betterness(row),) if gain is not None]
    if len(known) > _MAX_SITES:
        ranked = sorted(known, key=lambda each: each[1])
        chosen = {each[0]["site"] for each in (*ranked[: _MAX_SITES // 2], *ranked[-_MAX_SITES // 2 :])}
        known = [each for each in known if each[0]["site"] in chosen]
    if not known:
        return None
    figure, axes = _figure(22 * _MM + _LINE * len(known))
    for place, (_, gain, low, high) in enumerate(known):
        is_sure = low is not None and high is not None and not low <= 0 <= high
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=_INK, marker="|", markersize=4)
        axes.plot(gain, place, color=_INK, marker="o", markersize=4.5, markerfacecolor=_INK if is_sure else "white")
    axes.axvline(0, color=_GREY, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
    axes.set_yticks(range(len(known)), [f"{_readable(row['site'])} ({row['rows']:,})" for row, *_ in known])
    _plain_ticks(axes.get_yticklabels())
    axes.set_ylim(len(known) - 0.4, -0.6)
    metric, confidence = known[0][0]["metric"], known[0][0]["confidence"]
    what = f"better than alone by, in {_readable(metric)}"
    has_intervals = any(low is not None for _, _, low, _ in known)
    sure = f"{confidence:.0%} interval; full: it excludes 0" if has_intervals else "no interval is known"
    axes.set_xlabel(f"{what}\n{sure}", parse_math=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _matrix(found: Row | None) -> Any:
    if not found or not any(value is not None for row in found["value"] for value in row):
        return None
    values = [[math.nan if value is None else value for value in row] for row in found["value"]]
    names, models = [site["name"] for site in found["sites"]], found["models"]
    figure, axes = _figure(26 * _MM + _LINE * len(models) * (1.3 if len(names) <= _MAX_NUMBERED else 1))
    defined = [value for row in values for value in row if not math.isnan(value)]
    low, high = min(defined), max(defined)
    if low >= 0 and high <= 1:
        low = min(low, high - _LEAST_SPAN)
    palette = "Greys_r" if lower_is_better(found["metric"]) else "Greys"
    image = axes.imshow(values, cmap=palette, aspect="auto", vmin=low - 0.25 * (high - low or 1), vmax=high)
    numbered = len(names) <= _MAX_NUMBERED
    if numbered:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                shade = sum(image.cmap(image.norm(value))[:3]) / 3
                text = "-" if math.isnan(value) else f"{value:.2f}" if abs(value) < 100 else f"{value:.2g}"  # noqa: PLR2004
                axes.text(x, y, text, ha="center", va="center", color="white" if shade < _DARK else _INK)
    else:
        figure.colorbar(image, ax=axes, label=_readable(found["metric"]))
    short = [_readable(name) for name in names]
    fits = numbered and len(names) * max(map(len, short)) <= 30  # noqa: PLR2004  # characters of 8 points that stand beside each other
    if numbered:
        axes.set_xticks(range(len(names)), short, rotation=0 if fits else 90)
    else:
        step = -(-len(names) // _MAX_COLUMNS)
        axes.set_xticks(range(0, len(names), step), [str(number + 1) for number in range(0, len(names), step)])
    rows = [
        _readable(model) if numbered or place == len(names) else f"{_readable(model)}  {place + 1}" for place, model in enumerate(models)
    ]
    axes.set_yticks(range(len(models)), rows)
    _plain_ticks([*axes.get_xticklabels(), *axes.get_yticklabels()])
    axes.set_xlabel(f"{_readable(found['metric'])}, measured at; darker: better", parse_math=False)
    axes.set_ylabel("model of")
    axes.tick_params(length=0)
    return figure


def _plain_ticks(labels: Sequence[Any]) -> None:
    for label in labels:
        label.set_parse_math(False)


def _numbers(values: Sequence[float | None], above: float = -math.inf) -> list[float]:
    """Values that are shown, on a logarithmic scale those above zero; gaps elsewhere."""
    return [math.nan if value is None or value <= above else value for value in values]


def _readable(text: str) -> str:
    """A name as the font can write it, in the room there is."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    letters = "".join(sign if sign.isprintable() and font.get_char_index(ord(sign)) else "?" for sign in text)
    return letters if len(letters) <= _LONGEST else f"{letters[: _LONGEST - 1]}…"
