"""Survival over sites: the figures of the pooled patients, on exact times and on a grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_data import numbers, sites, table

from p2pfl.errors import ConfigError
from p2pfl.statistics.cox import CoxRows, fit_cox
from p2pfl.statistics.sums import analyse
from p2pfl.statistics.survival import SurvivalRows, counts, grid, kaplan_meier, life_table, log_rank, log_rank_sums, merged_ends

MERGED = np.array([90.0, 210.0, 300.0, 450.0, 1050.0])
AT_MERGED = dict(zip(MERGED, [0.8815789474, 0.6578947368, 0.5466331269, 0.3544104889, 0.1131097305], strict=True))


def lung():
    rows = table("lung2.csv")
    columns = np.column_stack([numbers(rows, "age"), numbers(rows, "sex")])
    return columns, numbers(rows, "time"), numbers(rows, "status") > 0, sites(rows, "site")


def infections():
    rows = table("cgd0.csv")
    first, last = numbers(rows, "etime1"), numbers(rows, "futime")
    columns = np.column_stack([numbers(rows, name) for name in ("treat", "age", "steroids", "inherit")])
    return columns, np.where(np.isnan(first), last, first), ~np.isnan(first), sites(rows, "center")


def cox_rows(data, places=None):
    columns, times, events, own = data
    return [CoxRows(columns_MP=columns[at], times_M=times[at], events_M=events[at]) for at in (own if places is None else places)]


def survival_rows(data, groups, places=None):
    _, times, events, own = data
    return [SurvivalRows(times_M=times[at], events_M=events[at], groups_M=groups[at]) for at in (own if places is None else places)]


def total_table(rows, ends, num_groups):
    return life_table(ends, sum(counts(each, ends, num_groups) for each in rows))


def days(data):
    return grid(1.0, data[1].max())


COX = {
    "infections": (infections, days, "efron", -185.8461138701, [-1.1572483675, -0.0343898125, -0.9111128662, 0.2552371363],
                   [0.3407382076, 0.0184165962, 0.7307620494, 0.3371000173]),
    "infections, stratified": (infections, None, "efron", -95.6650590632, [-1.2125438043, -0.0237123909, -0.9746816981, 0.0861035868],
                               [0.3529725463, 0.0205757955, 0.8214048542, 0.3694209605]),
    "lung": (lung, days, "efron", -742.8482457838, [0.0170453319, -0.5132185198], [0.0092232735, 0.1674579624]),
    "lung, breslow": (lung, days, "breslow", -743.0796541980, [0.0170128892, -0.5125647942], [0.0092219537, 0.1674620632]),
    "lung, stratified": (lung, None, "efron", -569.3560936698, [0.0169897540, -0.5568810685], [0.0093287827, 0.1716209334]),
    "lung, 30 days": (lung, lambda data: grid(30.0, data[1].max()), "efron", -744.9490758141, [0.0171713653, -0.5264750683],
                      [0.0091789941, 0.1675214029]),
    "lung, 30 days, breslow": (lung, lambda data: grid(30.0, data[1].max()), "breslow", -751.1438830303, [0.0164978413, -0.5149587937],
                               [0.0091628918, 0.1675343023]),
    "lung, merged": (lung, lambda _: MERGED, "efron", -758.0226006558, [0.0166426781, -0.5817442907], [0.0090488471, 0.1678031813]),
}  # fmt: skip


@pytest.mark.parametrize("model", COX)
def test_cox_models_are_those_of_the_pooled_patients(model):
    data, ends, ties, log_likelihood, params, errors = COX[model]
    found_data = data()
    names = ["a", "b", "c", "d"][: found_data[0].shape[1]]

    found = analyse(fit_cox(names, ties=ties, ends_T=None if ends is None else ends(found_data)), cox_rows(found_data))

    assert found.log_likelihood == pytest.approx(log_likelihood, rel=0, abs=6e-11)
    assert found.params == pytest.approx(params, rel=0, abs=6e-11)
    assert found.bse == pytest.approx(errors, rel=0, abs=6e-11)


@pytest.mark.parametrize(
    ("ends", "statistic", "pvalue"),
    [(None, 10.3267419549, 0.0013111645), (30.0, 11.1614407130, 8.351504e-4), (MERGED, 13.6154713149, 2.243292e-4)],
    ids=["days", "30 days", "merged"],
)
def test_the_log_rank_test_is_that_of_the_pooled_patients(ends, statistic, pvalue):
    data = lung()
    groups = data[0][:, 1].astype(np.int64)
    ends = days(data) if ends is None else grid(ends, data[1].max()) if isinstance(ends, float) else ends

    found = log_rank(log_rank_sums(total_table(survival_rows(data, groups), ends, 2)))

    assert found.statistic == pytest.approx(statistic, rel=0, abs=6e-11)
    assert found.pvalue == pytest.approx(pvalue, rel=1e-6)
    assert found.df == 1


def test_the_log_rank_test_by_treatment_is_the_pooled_and_the_stratified_one():
    data = infections()
    groups = data[0][:, 0].astype(np.int64)
    rows = survival_rows(data, groups)
    pooled = log_rank(log_rank_sums(total_table(rows, days(data), 2)))
    stratified = log_rank(sum(log_rank_sums(total_table([each], np.unique(each.times_M), 2)) for each in rows))

    assert np.bincount(groups).tolist() == [65, 63]
    assert (pooled.statistic, stratified.statistic) == pytest.approx((11.7425108689, 12.2422776285), rel=0, abs=6e-11)
    assert (pooled.pvalue, stratified.pvalue) == pytest.approx((6.108855e-4, 4.671877e-4), rel=1e-6)


def curve(unit=None, ends=None):
    data = lung()
    ends = grid(unit, data[1].max()) if ends is None else ends
    return kaplan_meier(total_table(survival_rows(data, np.zeros(len(data[1]), dtype=np.int64)), ends, 1), 0)


@pytest.mark.parametrize(
    ("found", "median", "at"),
    [
        (lambda: curve(1.0), 310, {100: 0.8639689676, 200: 0.6802728622, 365: 0.4092416245, 730: 0.1156930983}),
        (lambda: curve(30.0), 330, {90: 0.8815789474, 180: 0.7224774900, 360: 0.4404748766, 720: 0.1289171310}),
        (lambda: curve(ends=MERGED), 450, AT_MERGED),
    ],
    ids=["days", "30 days", "merged"],
)
def test_survival_curves_are_those_of_the_pooled_patients(found, median, at):
    estimated = found()
    assert estimated.median() == median
    assert [estimated.at(time) for time in at] == pytest.approx(list(at.values()), rel=0, abs=6e-11)


def test_greenwoods_errors_and_the_interval_of_the_median():
    found = curve(30.0)
    errors = [found.bse_T[np.searchsorted(found.times_T, time)] for time in (90, 180, 360, 720)]
    assert errors == pytest.approx([0.0213982196, 0.0297323953, 0.0355861547, 0.0296789635], rel=0, abs=6e-11)
    assert found.median_conf_int() == (300, 390)


def test_nobody_can_be_told_apart_in_merged_cells():
    data = lung()
    groups = np.zeros(len(data[1]), dtype=np.int64)
    found = merged_ends(total_table(survival_rows(data, groups), grid(30.0, data[1].max()), 1), 5)
    merged = total_table(survival_rows(data, groups), found, 1)

    assert found[-1] == 1050
    for few in (merged.events_TG, merged.censored_TG, merged.at_risk):
        assert not ((few > 0) & (few < 5)).any()


def test_merged_cells_hide_every_group():
    data = lung()
    groups = data[0][:, 1].astype(np.int64)
    merged = total_table(survival_rows(data, groups), merged_ends(total_table(survival_rows(data, groups), grid(30.0, 1050), 2), 5), 2)
    for few in (merged.events_TG, merged.censored_TG, merged.at_risk):
        assert not ((few > 0) & (few < 5)).any()


def test_a_group_that_is_too_small_is_refused():
    rows = [SurvivalRows(times_M=np.array([1.0, 2.0, 3.0]), events_M=np.array([True, True, False]), groups_M=np.zeros(3, dtype=np.int64))]
    with pytest.raises(ConfigError, match="fewer than 5 patients"):
        merged_ends(total_table(rows, grid(1.0, 3.0), 1), 5)


@settings(deadline=None, max_examples=10)
@given(num_sites=st.sampled_from([1, 2, 3, 5, 13, 50]), seed=st.integers(0, 2**32 - 1))
def test_the_split_changes_no_figure_with_one_baseline(num_sites, seed):
    random = np.random.default_rng(11)
    columns = np.column_stack([random.normal(60, 9, 300), random.integers(0, 2, 300)])
    times = np.ceil(30 * random.exponential(np.exp(-0.03 * (columns[:, 0] - 60) + 0.5 * columns[:, 1])) + 1e-9)
    data = columns, times, random.random(300) < 0.7, None
    places = np.random.default_rng(seed).integers(0, num_sites, 300)
    parts = [np.flatnonzero(places == place) for place in np.unique(places)]
    ends = days(data)

    whole = analyse(fit_cox(["age", "sex"], ends_T=ends), cox_rows(data, [np.arange(300)]))
    split = analyse(fit_cox(["age", "sex"], ends_T=ends), cox_rows(data, parts))

    assert (np.abs(split.params - whole.params) <= 1e-10 * np.maximum(np.abs(whole.params), whole.bse)).all()
    assert split.bse == pytest.approx(whole.bse, rel=1e-10)
    groups = columns[:, 1].astype(np.int64)
    tables = [total_table(survival_rows(data, groups, places), ends, 2) for places in ([np.arange(300)], parts)]
    assert np.array_equal(log_rank_sums(tables[0]), log_rank_sums(tables[1]))


def test_errors_are_those_of_the_likelihoods_curvature():
    data = infections()
    names = ["treat", "age", "steroids", "inherit"]
    fit = analyse(fit_cox(names), cox_rows(data))

    def likelihood(params):
        found = 0.0
        for rows in cox_rows(data):
            for time in np.unique(rows.times_M[rows.events_M]):  # Efron's approximation as it is written down
                eta, is_tied = rows.columns_MP @ params, rows.events_M & (rows.times_M == time)
                at_risk, tied = np.exp(eta)[rows.times_M >= time].sum(), np.exp(eta)[is_tied].sum()
                found += eta[is_tied].sum() - sum(np.log(at_risk - k / is_tied.sum() * tied) for k in range(is_tied.sum()))
        return found

    steps = np.diag(1e-3 * fit.bse)
    curvature = np.array(
        [[sum(s * u * likelihood(fit.params + s * a + u * b) for s in (1, -1) for u in (1, -1)) / 4 for b in steps] for a in steps]
    ) / np.outer(np.diag(steps), np.diag(steps))
    assert likelihood(fit.params) == pytest.approx(fit.log_likelihood, rel=1e-12)
    assert np.sqrt(np.diag(np.linalg.inv(-curvature))) == pytest.approx(fit.bse, rel=1e-6)


def test_three_tests_that_nothing_matters_agree_roughly():
    found = analyse(fit_cox(["age", "sex"], ends_T=days(lung())), cox_rows(lung())).tests()
    statistics = [statistic for statistic, _ in found.values()]
    assert max(statistics) / min(statistics) < 1.1
    assert all(0.0001 < pvalue < 0.01 for _, pvalue in found.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"events": np.zeros(40, dtype=bool)}, "no site has an event", id="no-event"),
        pytest.param({"columns": np.outer(np.arange(40) % 7, [1.0, 2.0])}, "x, y depend on each other", id="collinear"),
        pytest.param({"columns": np.column_stack([-np.arange(40.0), np.arange(40) % 7])}, "separated by x", id="separated"),
        pytest.param({"times": np.arange(40.0)}, "not between 0 and 40", id="time-zero"),
    ],
)
def test_events_that_make_no_fit_are_refused_by_name(changes, message):
    usual = {"columns": np.random.default_rng(2).normal(size=(40, 2)), "times": 1 + np.arange(40.0), "events": np.ones(40, dtype=bool)}
    found = usual | changes
    rows = CoxRows(columns_MP=found["columns"], times_M=found["times"], events_M=found["events"])
    with pytest.raises(ConfigError, match=message):
        analyse(fit_cox(["x", "y"], ends_T=grid(1.0, 40.0)), [rows])


def test_a_median_that_is_never_seen_is_infinite():
    rows = [SurvivalRows(times_M=np.arange(1.0, 11.0), events_M=np.arange(10) == 0, groups_M=np.zeros(10, dtype=np.int64))]
    assert kaplan_meier(total_table(rows, grid(1.0, 10.0), 1), 0).median() == math.inf
