"""Figures for print: they hold the records' numbers, in letters that can be read at the width of a column, without colour."""

from __future__ import annotations

import builtins
import json
import math
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import typer
from test_inspector_terminal import FIVE, make_run, summary_of
from typer.testing import CliRunner

from p2pfl.cli.inspect import inspect
from p2pfl.errors import MissingExtraError, StoreError
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.print_figures import write_figures
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from thorough import first_fast

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.image import imread

ALL = ["graph", "agreement", "loss", "worth", "matrix"]
STRANGE = ("$\\frac$", "日本 hospital", "basel\x1b[31m", "a name that is longer than any column", "zürich_$x^2$")
TWENTY = tuple(f"hospital-{number:02}" for number in range(20))


def run_of(path, nodes=FIVE, metric="auroc"):
    """A ring with a link that failed twice, what the network is worth, and a matrix."""
    make_run(path, nodes=nodes, summary=summary_of(nodes), skips=[(3, nodes[1], nodes[0]), (4, nodes[1], nodes[0])])
    count = len(nodes)
    edges = [[i, (i + step) % count, 1 / 3] for i in range(count) for step in (1, count - 1)]
    (path / "topology.json").write_text(json.dumps({"nodes": list(nodes), "edges": edges, "lambda_2": 0.5, "laplacian_lambda_2": 1.38}))
    folder = RunFolder.open(path)
    folder.write_found(
        "worth",
        [
            {"site": node, "metric": metric, "gain": 0.1 * i - 0.1, "low": 0.1 * i - 0.15, "high": 0.1 * i, "rows": 50, "confidence": 0.95}
            for i, node in enumerate(nodes)
        ],
    )
    values = [[round(0.5 + (i + j) / 100, 3) for j in range(count)] for i in range(count + 1)]
    sites = [{"name": node, "rows": 50, "support": None} for node in nodes]
    folder.write_found("cross_site", {"metric": metric, "models": [*nodes, "mean model"], "sites": sites, "value": values})
    return read_run(path)


def remember_saved(found, patched):
    save = Figure.savefig

    def remember(figure, path, **options):
        found[path.stem] = figure
        save(figure, path, **options)

    patched.setattr(Figure, "savefig", remember)


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they were saved, by name."""
    found = {}
    remember_saved(found, monkeypatch)
    return found


@pytest.fixture(scope="module")
def print_once(tmp_path_factory):
    """Paths and figures of a run with some nodes, which each worker prints once."""

    @cache
    def print_once(nodes):
        place, figures = tmp_path_factory.mktemp("printed"), {}
        with pytest.MonkeyPatch.context() as patched:
            remember_saved(figures, patched)
            return write_figures(run_of(place / "run", nodes), place / "figures"), figures

    return print_once


def texts(figure):
    """What is seen to be written in a figure."""
    found = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [*axes.texts, axes.title]
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            found += [axis.label, *(label for tick in ticks if low <= tick.get_loc() <= high for label in (tick.label1, tick.label2))]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


@pytest.mark.no_cover
@pytest.mark.parametrize("nodes", first_fast([FIVE, STRANGE, FIVE[:2], TWENTY], 2, alone=True), ids=["five", "strange", "two", "twenty"])
def test_they_are_one_column_wide_without_colour_and_can_be_read(print_once, nodes):
    written, drawn = print_once(nodes)

    assert [path.stem for path in written] == list(drawn) == ALL
    for path in written:
        pixels = imread(path)
        assert pixels.shape[1] == math.floor(85 / 25.4 * 300)
        assert np.array_equal(pixels[..., 0], pixels[..., 1])
        assert np.array_equal(pixels[..., 1], pixels[..., 2])
        assert pixels[..., 0].min() < 0.1  # there is ink
        edge = np.concatenate([pixels[0, :, 0], pixels[-1, :, 0], pixels[:, 0, 0], pixels[:, -1, 0]])
        assert edge.min() > 0.9  # and none that was cut off
    for figure in drawn.values():
        assert min(text.get_fontsize() for text in texts(figure)) >= 8


@pytest.mark.no_cover
@pytest.mark.parametrize("nodes", [FIVE, STRANGE, TWENTY], ids=["five", "strange", "twenty"])
def test_no_letters_lie_on_others_and_none_are_outside(print_once, nodes):
    _, drawn = print_once(nodes)

    for name, figure in drawn.items():
        figure.set_dpi(300)  # as it was saved
        boxes, page = [(text.get_text(), text.get_window_extent()) for text in texts(figure)], figure.bbox.padded(1)
        for text, box in boxes:
            assert page.x0 <= box.x0 <= box.x1 <= page.x1, (name, text)
            assert page.y0 <= box.y0 <= box.y1 <= page.y1, (name, text)
        for (one, box), (other, beside) in combinations(boxes, 2):
            assert not box.padded(4, -2).overlaps(beside.padded(4, -2)), (name, one, other)
    [nodes] = drawn["graph"].axes[0].collections
    for x, y in nodes.get_offset_transform().transform(nodes.get_offsets()):
        over = [text.get_text() for text in texts(drawn["graph"]) if text.get_window_extent().contains(x, y)]
        assert over == [] or over[0].isdigit()


def test_they_hold_the_records_numbers(drawn, tmp_path):
    run = run_of(tmp_path / "run")
    write_figures(run, tmp_path)
    course = convergence(run)
    [agreement], [loss], [worth], [matrix] = (drawn[name].axes for name in ALL[1:])

    curves = {line.get_label(): line.get_ydata() for line in agreement.lines}
    np.testing.assert_array_equal(curves["disagreement (before mixing)"], course.distance)
    np.testing.assert_array_equal(curves["bound from the spectrum"], np.array(course.bound, dtype=float))
    band = agreement.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (min(course.low), max(course.high))
    assert list(loss.lines[0].get_ydata()) == [0.5] * 8
    points = [line for line in worth.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in points] == pytest.approx([row["gain"] for row in run.gains])
    ends = [list(line.get_xdata()) for line in worth.lines if line.get_marker() == "|"]
    assert ends == [[row["low"], row["high"]] for row in run.gains]
    assert [line.get_markerfacecolor() != "white" for line in points] == [False, False, True, True, True]
    np.testing.assert_array_equal(matrix.images[0].get_array(), run.cross_site["value"])
    assert [text.get_text() for text in matrix.texts] == [f"{value:.2f}" for row in run.cross_site["value"] for value in row]
    assert [text.get_text() for text in drawn["graph"].axes[0].texts if "×" in text.get_text()] == ["2×"]  # noqa: RUF001


def test_a_metrics_name_is_no_formula(drawn, tmp_path):
    write_figures(run_of(tmp_path / "run", metric="$\\frac$"), tmp_path)

    assert "$\\frac$" in drawn["worth"].axes[0].get_xlabel()


@pytest.mark.no_cover
def test_darker_is_better_also_where_less_is(drawn, tmp_path):
    write_figures(run_of(tmp_path / "one", metric="auroc"), tmp_path)
    better = drawn["matrix"].axes[0].images[0]
    write_figures(run_of(tmp_path / "two", metric="log_loss"), tmp_path)
    less = drawn["matrix"].axes[0].images[0]

    assert sum(better.cmap(better.norm(0.59))[:3]) < sum(better.cmap(better.norm(0.5))[:3])
    assert sum(less.cmap(less.norm(0.5))[:3]) < sum(less.cmap(less.norm(0.59))[:3])


def test_what_is_empty_is_left_out(tmp_path):
    make_run(tmp_path / "run", settling=0)

    assert [path.name for path in write_figures(read_run(tmp_path / "run"), tmp_path)] == ["agreement.png", "loss.png"]


def test_the_command_says_what_it_wrote(tmp_path):
    run_of(tmp_path / "run")
    app = typer.Typer()
    app.command()(inspect)
    done = CliRunner().invoke(app, [str(tmp_path / "run"), "--png", str(tmp_path / "figures")])

    assert done.stdout.split() == [str(tmp_path / "figures" / f"{name}.png") for name in ALL]


def test_a_folder_that_cannot_be_made_is_the_disks_fault(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match="cannot be written"):
        write_figures(run_of(tmp_path / "run"), tmp_path / "file" / "figures")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    really = builtins.__import__

    def without(name, *others):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return really(name, *others)

    run = run_of(tmp_path / "run")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"p2pfl-mesh\[plot\]"):
        write_figures(run, tmp_path)
