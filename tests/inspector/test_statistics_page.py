"""Pages of statistics: pictures of the figures, nothing loaded, nothing of a name taken for HTML."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from p2pfl.inspector.drawn_statistics import ForestRow, at_risk, forest, spread_out, survival, ticks
from p2pfl.inspector.statistics_page import statistics_page

ASKED = {"patients_per_cell": 5, "patients_per_sum": 10, "cells": "total", "level": 0.95}
COUNTS = {"patients": 1234, "rows": 1234, "missing": None}
STRANGE = "<script>alert(1)</script>"


def coefficient(name, **more):
    return {"name": name, "estimate": 0.5, "se": 0.1, "statistic": 5.0, "p": 1e-7, "low": 0.3, "high": 0.7, **more}


RATIO = {"odds_ratio": 1.65, "ratio_low": 1.35, "ratio_high": 2.01}
CURVE = [{"time": 30.0 * k, "at_risk": 100 - 10 * k, "survival": 1 - 0.1 * k, "group": STRANGE} for k in range(1, 9)]
TEST = {"statistic": 4.0, "df": 1, "p": 0.0455}
PAGES = {
    "glm": {
        "analysis": {"kind": "glm", "formula": f"died ~ {STRANGE}", "family": "binomial", **ASKED},
        **COUNTS,
        "log_likelihood": -12.5,
        "coefficients": [coefficient("(Intercept)", **RATIO), coefficient(STRANGE, **RATIO)],
    },
    "km": {
        "analysis": {"kind": "km", "formula": "Surv(days, died) ~ sex", **ASKED},
        **COUNTS,
        "group": "sex",
        "medians": {STRANGE: {"median": 200.0, "low": 150.0, "high": None, "cell": [0.0, 30.0]}},
        "log_rank": TEST,
        "curves": CURVE,
    },
    "log-rank": {
        "analysis": {"kind": "compare", "formula": "Surv(days, died) ~ sex", **ASKED},
        **COUNTS,
        "group": STRANGE,
        "log_rank": TEST,
        "groups": [{"group": "a", "observed": 12, "expected": 9.5}],
    },
    "meta": {
        "analysis": {"kind": "compare", "formula": "los ~ age", "family": "gaussian", "coefficient": STRANGE, **ASKED},
        **COUNTS,
        "estimates": 4,
        "q": 3.0,
        "q_p": 0.4,
        "i_squared": 0.2,
        "tau_squared": 0.01,
        "effects": [{"effect": "fixed", "estimate": 0.4, "se": 0.1}, {"effect": "random", "estimate": 0.3, "se": 0.2}],
        "sites": [{"name": STRANGE, "estimate": 0.6, "se": 0.3}],
    },
    "describe": {
        "analysis": {"kind": "describe", **ASKED},
        "variables": [
            {"name": STRANGE, "unit": None, "values": 100, "missing": 0, "counts": {"a": 60, "b": None}},
            {"name": "age", "unit": "year", "values": None, "missing": None, "mean": 60.0, "sd": 10.0}
            | {f"q{each}": 50.0 for each in (5, 25, 50, 75, 95)},
        ],
    },
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_nothing_and_takes_no_name_for_html(name):
    page = statistics_page(PAGES[name])

    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href|url)\s*[=(]", page)
    assert "default-src 'none'" in page
    assert page.count("<svg") == (name in ("glm", "km", "meta"))
    assert "simulated sites" in page


def test_a_page_shows_ratios_and_leaves_the_intercept_out_of_the_picture():
    page = statistics_page(PAGES["glm"])

    assert "1.65 (1.35 to 2.01)" in page
    assert page.partition("<svg")[2].count("<rect") == 1
    assert "left out for missing values: fewer than 5" in page
    assert "&lt;0.0001" in page


def test_a_forest_plot_has_its_marks_in_order_on_a_logarithmic_axis():
    rows = [ForestRow(name=f"x{k}", value=2.0**k, low=2.0**k / 1.5, high=2.0**k * 1.5) for k in range(-2, 3)]
    drawn = forest(rows, about="x", neutral=1.0, is_ratio=True)
    places = [float(x) for x in re.findall(r'<rect x="([\d.]+)"', drawn)]

    steps = [after - before for before, after in pairwise(places)]
    assert steps == pytest.approx([steps[0]] * 4, abs=0.11)
    assert steps[0] > 0


def test_a_curve_steps_down_at_its_times_and_has_the_patients_at_risk_below():
    drawn = survival([("all", CURVE)], about="x")
    points = [tuple(map(float, each.split(","))) for each in re.search(r'points="([^"]+)"', drawn)[1].split()]

    assert len(points) == 1 + 2 * len(CURVE)
    assert all(after[0] >= before[0] and after[1] >= before[1] for before, after in pairwise(points))
    assert [at_risk(CURVE, time) for time in (0.0, 30.0, 210.0, 240.0)] == [90, 80, 20, 0]
    assert ">90</text>" in drawn


@pytest.mark.parametrize(
    ("ends", "is_ratio", "wanted"),
    [
        ((0.0, 1.0), False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ((-3.1, 4.2), False, [-2.0, 0.0, 2.0, 4.0]),
        ((0.4, 1.1), True, [0.5, 0.7, 1.0]),
        ((0.02, 60.0), True, [0.1, 1.0, 10.0]),
    ],
)
def test_ticks_are_round_numbers(ends, is_ratio, wanted):
    assert ticks(*ends, is_ratio=is_ratio) == pytest.approx(wanted)


def test_times_that_are_too_near_are_left_out():
    assert spread_out([0.0, 1.0, 5.0, 9.0, 9.5, 20.0], 4.0) == [0.0, 5.0, 9.0, 20.0]
