"""Descriptions over sites: the pooled moments and quantiles, and no cell of few patients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_data import numbers, sites, table
from scipy.optimize import linprog

from p2pfl.errors import ConfigError
from p2pfl.statistics.cross_table import shown
from p2pfl.statistics.describe import QUANTILES, describe, merged_cells
from p2pfl.statistics.sums import analyse

EDGES = np.linspace(0, 20, 65)


def test_moments_and_quantiles_of_cholesterol_are_the_pooled_ones():
    rows = table("cnsim.csv")
    values = numbers(rows, "LAB_TSC")
    found = analyse(describe(EDGES, 5), [values[at] for at in sites(rows, "study")])
    known = values[~np.isnan(values)]

    assert (found.num_values, found.num_missing) == (len(known), len(values) - len(known))
    assert (found.mean, found.variance) == pytest.approx((known.mean(), known.var(ddof=1)), rel=1e-12)
    widest = np.diff(found.edges[(found.edges > 2) & (found.edges < 10)]).max()
    for fraction in QUANTILES:
        assert found.quantile(fraction) == pytest.approx(np.quantile(known, fraction), abs=widest)
    assert not ((found.counts > 0) & (found.counts < 5)).any()


def test_digits_do_not_cancel_far_from_zero():
    values = 1e9 + np.random.default_rng(0).normal(size=500)
    found = analyse(describe(1e9 + np.linspace(-10, 10, 65), 5), [values[:100], values[100:]])
    assert found.variance == pytest.approx(values.var(ddof=1), rel=1e-9)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=64), st.integers(1, 10))
def test_merged_cells_hold_nobody_or_enough_and_lose_nobody(counts, fewest):
    edges, counts = np.arange(len(counts) + 1.0), np.array(counts, dtype=float)
    if 0 < counts.sum() < fewest:
        with pytest.raises(ConfigError, match="nothing is said of them"):
            merged_cells(edges, counts, fewest)
        return
    ends, merged = merged_cells(edges, counts, fewest)
    assert merged.sum() == counts.sum()
    assert ((merged == 0) | (merged >= fewest)).all()
    assert (ends[0], ends[-1], len(ends)) == (0, len(counts), len(merged) + 1)


@pytest.mark.parametrize(
    ("values", "edges", "message"),
    [
        pytest.param([1.0, 21.0], EDGES, "outside of 0 to 20", id="outside"),
        pytest.param([1.0] * 9, [0.0], "a grid of 0 cells", id="no-cell"),
        pytest.param([1.0] * 9, np.linspace(0, 1, 66), "a grid of 65 cells", id="many"),
        pytest.param([1.0] * 9, [0.0, 2.0, 1.0], "whose ends increase", id="order"),
        pytest.param([1.0, 2.0], EDGES, "fewer than 5 values", id="few"),
    ],
)
def test_a_description_that_is_none_is_refused(values, edges, message):
    with pytest.raises(ConfigError, match=message):
        analyse(describe(edges, 5), [np.array(values)])


def test_a_variable_that_nobody_has_is_described_as_missing():
    found = analyse(describe(EDGES, 5), [np.full(3, np.nan), np.full(4, np.nan)])
    assert (found.num_values, found.num_missing) == (0, 7)
    assert np.isnan([found.mean, found.variance, found.quantile(0.5)]).all()


def bounds_of(table, place):
    """The least and the most that a cell can hold, by all that is shown: every cell is sought, hidden or not."""
    cells = np.arange(table.cells_RC.size).reshape(table.cells_RC.shape)
    said = [*zip(cells, table.rows_R, strict=True), *zip(cells.T, table.columns_C, strict=True), (cells, table.total)]
    said += list(zip(cells.ravel(), table.cells_RC.ravel(), strict=True))
    known = [(np.isin(cells.ravel(), places), value) for places, value in said if not np.isnan(value)]
    goal = (cells.ravel() == place) * 1.0
    left = np.array([row for row, _ in known], dtype=float).reshape(-1, cells.size)
    found = [linprog(sign * goal, A_eq=left, b_eq=np.array([value for _, value in known]), bounds=(0, None)) for sign in (1, -1)]
    return [np.inf if each.status != 0 else abs(each.fun) for each in found]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=4))
def test_no_small_cell_can_be_computed_from_what_is_shown(counts):
    counts = np.array(counts, dtype=float)
    found = shown(counts, 5)
    for place in np.flatnonzero((counts.ravel() > 0) & (counts.ravel() < 5)):
        assert np.isnan(found.cells_RC.ravel()[place])
        least, most = bounds_of(found, place)
        assert most - least >= 0.5, (counts.tolist(), place)


def test_a_table_that_gives_a_cell_back_through_its_totals_hides_more():
    counts = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 4.0]])
    found = shown(counts, 5)
    assert np.isnan(found.cells_RC[counts > 0]).all()
    assert np.isnan(found.columns_C[1])


def test_a_table_of_large_cells_is_shown_as_it_is():
    counts = np.array([[10.0, 20.0], [0.0, 5.0]])
    found = shown(counts, 5)
    assert np.array_equal(found.cells_RC, counts)
    assert (found.rows_R.tolist(), found.columns_C.tolist(), found.total) == ([30, 5], [10, 25], 35)
