"""Curves and bands break where nothing is known of a round."""

from __future__ import annotations

import pytest
from test_killed_hospital import BACK, own, whole

from killed_hospital import KILLED, NEIGHBOURS
from p2pfl.inspector.chart import log_chart
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.gaps import Gap, certified_pieces, gaps, jumps, pieces


def test_the_band_breaks_where_nothing_is_certified_and_the_reason_is_said(tmp_path):
    for place, run in {"up": whole(tmp_path / "up", BACK, died=False), "near": own(tmp_path / "near", NEIGHBOURS[0], BACK)}.items():
        course = convergence(run)
        word = "offline" if place == "up" else "unheard"

        assert [(piece[0][0], piece[-1][0]) for piece in certified_pieces(course)] == [(0, 165), (500, course.rounds[-1])]
        assert gaps(run, course) == [Gap(first=166, last=499, why=f"not certified: hospital-5 {word}")]


def test_a_figure_has_nothing_in_the_gap_but_its_shade(tmp_path):
    pytest.importorskip("plotly")
    from p2pfl.inspector import figures

    run = whole(tmp_path / "up", BACK, died=False)
    course = convergence(run)
    drawn = figures.agreement({"": course}, gaps(run, course)).to_dict()

    for trace in drawn["data"]:
        assert not [x for x, y in zip(trace["x"], trace["y"], strict=True) if x is not None and y is not None and 165 < x < 500], trace[
            "name"
        ]
    [shape] = drawn["layout"]["shapes"]
    assert (shape["x0"], shape["x1"]) == (165.5, 499.5)
    assert [note["text"] for note in drawn["layout"]["annotations"]] == ["not certified: hospital-5 offline"]
    band = next(trace for trace in drawn["data"] if trace.get("fill") == "toself")
    assert band["x"].count(None) == 2  # two shapes, each closed


def test_a_sites_own_curves_break_where_its_rows_are_missing(tmp_path):
    pytest.importorskip("plotly")
    from p2pfl.inspector import figures

    run = whole(tmp_path / "up", BACK, died=False)
    [loss] = figures.site(run, KILLED)["training loss"].data

    assert list(loss.x[160:172]) == [160, 161, 162, 163, 164, 165, None, 500, 501, 502, 503, 504]


def test_the_terminals_chart_has_a_hole_where_nothing_is_known():
    rounds = list(range(100))
    curve = [None if 40 <= number < 60 else 0.9**number for number in rounds]
    lines = log_chart(rounds, curve, [None] * 100, width=109, height=8)
    columns = [{line[place] for line in lines[:8] if len(line) > place} - {" ", "│"} for place in range(9, 109)]

    assert not any(columns[41:60])
    assert all(columns[1:39])
    assert all(columns[61:99])


def test_print_figures_break_too(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import numpy as np

    from p2pfl.inspector import print_figures

    kept = {}
    draw = print_figures._agreement
    monkeypatch.setattr(print_figures, "_agreement", lambda *given: kept.setdefault("figure", draw(*given)))
    run = whole(tmp_path / "up", BACK, died=False)
    written = print_figures.write_figures(run, tmp_path / "figures")
    [axes] = kept["figure"].axes
    x, y = next(line.get_data() for line in axes.lines if line.get_label().startswith("disagreement"))

    assert "agreement.png" in {path.name for path in written}
    assert not [at for at, height in zip(x, y, strict=True) if 165 < at < 500 and np.isfinite(height)]
    assert [text.get_text() for text in axes.texts] == ["hospital-5 offline"]


@pytest.mark.parametrize(
    ("rounds", "broken"),
    [
        ([0, 1, 2, 3, 4], set()),
        ([0, 1, 2, 335, 336, 337], {3}),
        ([0, 10, 20, 30, 33], set()),
        ([0, 1, 2, 3, 11, 19, 27], set()),  # a view that speaks of every eighth round from there on
        ([0, 1, 2, 300, 600, 601, 602], {3, 4}),
        ([5], set()),
    ],
)
def test_rounds_in_steady_steps_have_no_gap(rounds, broken):
    assert jumps(rounds) == broken


def test_a_curve_comes_in_pieces():
    assert pieces([0, 1, 2, 3, 4], [1.0, 2.0, None, 3.0, 4.0]) == [[(0, 1.0), (1, 2.0)], [(3, 3.0), (4, 4.0)]]


# ---- running, paused, silent, ended
