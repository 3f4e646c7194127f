"""Published figures of pooled rows, from contract, tables and site files, in sums of fixed-point numbers."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from study_tables import ANY, cnsim, infections, lung, stays, write_study

from p2pfl.analyses import stats
from p2pfl.analyses.policy import RefusedByPolicy
from p2pfl.analyses.site_files import AnalysisSite, load_sites
from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError

STAYS = "los ~ age + sex + lab"
INFECTED = "count ~ treat + age + inherit + offset(log(futime))"
FIRST = "Surv(time, event) ~ treat + age + steroids + inherited"
LUNG = "Surv(time, status) ~ age + sex"
MERGED = [90, 210, 300, 450, 1050]

GLM = {
    "lipids": (cnsim, "LAB_TSC ~ LAB_TRIG", "gaussian", [5.6971141805, 0.0752997656], [0.0199836449, 0.0077541594],
               {"num_rows": 7800, "num_missing": 1579, "deviance": 8936.31974296402, "df_resid": 7798}),
    "diabetes": (cnsim, "DIS_DIAB ~ GENDER * PM_BMI_CONTINUOUS + LAB_HDL", "binomial",
                 [-6.742636692, -0.357565158, 0.130635795, -0.773408549, -0.000948079],
                 [0.892611099, 1.349834247, 0.025657130, 0.221478676, 0.044227849],
                 {"num_rows": 7485, "num_missing": 1894, "deviance": 1036.03136097792, "df_resid": 7480}),
    "stays": (stays, STAYS, "gaussian", [8.3821680002, 0.9349764457, -0.9659624126, 0.4384692928, 0.1015465127],
              [0.2783177416, 0.2874611359, 0.3519605616, 0.2573695442, 0.0043118331],
              {"dispersion": 16.5306069489, "log_likelihood": -2819.0390768825}),
    "stays, poisson": (stays, STAYS, "poisson", [2.1757958085, 0.0760737709, -0.0824690905, 0.0344039772, 0.0078492469],
                       [0.0206118429, 0.0200044962, 0.0256147038, 0.0181082488, 0.0002883153],
                       {"deviance": 1526.211534137729, "aic": 5779.0824113036}),
    "infections": (infections, INFECTED, "poisson", [-5.4813454200, -1.0435238522, -0.0335359500, 0.3420645282],
                   [0.2177692679, 0.2615700223, 0.0133731251, 0.2424717480],
                   {"deviance": 153.836472869258, "df_resid": 124, "aic": 264.8729874197}),
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Contract and sites of a study, read once, under floors that allow anything or the default ones."""

    @cache
    def load(study, *, is_free):
        contract, sites = write_study(tmp_path_factory.mktemp("study"), study(), policy=ANY if is_free else None)
        agreed = Contract.load(contract)
        return {"contract": agreed, "sites": load_sites(sites, agreed)}

    return load


@pytest.mark.parametrize("model", GLM)
def test_a_regression_is_that_of_the_pooled_rows_under_the_default_floors(model, loaded):
    study, formula, family, params, errors, others = GLM[model]

    found = stats.glm(formula, family=family, **loaded(study, is_free=False))

    last_digit = 0.6e-9 if model == "diabetes" else 1.1e-10
    assert found.params == pytest.approx(params, rel=0, abs=last_digit)
    assert found.bse == pytest.approx(errors, rel=0, abs=last_digit)
    assert {name: getattr(found.fit, name) for name in others} == pytest.approx(others, rel=3e-12)


COX = {
    "infections": (infections, FIRST, {"grid": 1}, ANY, -185.8461138701, [-1.1572483675, -0.0343898125, -0.9111128662, 0.2552371363],
                   [0.3407382076, 0.0184165962, 0.7307620494, 0.3371000173]),
    "infections, by site": (infections, FIRST, {}, ANY, -95.6650590632, [-1.2125438043, -0.0237123909, -0.9746816981, 0.0861035868],
                            [0.3529725463, 0.0205757955, 0.8214048542, 0.3694209605]),
    "lung": (lung, LUNG, {"grid": 1}, ANY, -742.8482457838, [0.0170453319, -0.5132185198], [0.0092232735, 0.1674579624]),
    "lung, breslow": (lung, LUNG, {"grid": 1, "ties": "breslow"}, ANY, -743.0796541980, [0.0170128892, -0.5125647942],
                      [0.0092219537, 0.1674620632]),
    "lung, 30 days": (lung, LUNG, {"grid": 30}, ANY, -744.9490758141, [0.0171713653, -0.5264750683], [0.0091789941, 0.1675214029]),
    "lung, 30 days, breslow": (lung, LUNG, {"grid": 30, "ties": "breslow"}, ANY, -751.1438830303, [0.0164978413, -0.5149587937],
                               [0.0091628918, 0.1675343023]),
    "lung, by site": (lung, LUNG, {"strata": "site"}, None, -569.3560936698, [0.0169897540, -0.5568810685], [0.0093287827, 0.1716209334]),
    "lung, wide cells": (lung, LUNG, {"ends": MERGED}, None, -758.0226006558, [0.0166426781, -0.5817442907], [0.0090488471, 0.1678031813]),
}  # fmt: skip
"""The last two are answered under the default floors."""


@pytest.mark.parametrize("model", COX)
def test_a_cox_model_is_that_of_the_pooled_patients(model, loaded):
    study, formula, options, floors, log_likelihood, params, errors = COX[model]

    found = stats.cox(formula, **loaded(study, is_free=bool(floors)), **options, **(floors or {}))

    assert found.fit.log_likelihood == pytest.approx(log_likelihood, rel=0, abs=6e-11)
    assert found.params == pytest.approx(params, rel=0, abs=6e-11)
    assert found.bse == pytest.approx(errors, rel=0, abs=6e-11)


@pytest.mark.parametrize(
    ("options", "floors", "median", "at", "log_rank"),
    [
        ({"grid": 1}, ANY, 310,
         {100: 0.8639689676, 200: 0.6802728622, 365: 0.4092416245, 730: 0.1156930983}, (10.3267419549, 0.0013111645)),
        ({"grid": 30}, ANY, 330,
         {90: 0.8815789474, 180: 0.7224774900, 360: 0.4404748766, 720: 0.1289171310}, (11.1614407130, 8.351504e-4)),
        ({"ends": MERGED}, None, 450,
         dict(zip(MERGED, [0.8815789474, 0.6578947368, 0.5466331269, 0.3544104889, 0.1131097305], strict=True)), None),
    ],
    ids=["days", "30 days", "merged"],
)  # fmt: skip
def test_survival_is_that_of_the_pooled_patients(options, floors, median, at, log_rank, loaded):
    ask = loaded(lung, is_free=bool(floors)) | options | (floors or {})

    whole = stats.km("Surv(time, status) ~ 1", **ask).curves["all"]

    assert whole.median() == median
    assert [whole.at(time) for time in at] == pytest.approx(list(at.values()), rel=0, abs=6e-11)
    if log_rank is not None:
        tested = stats.compare("Surv(time, status) ~ sex", **ask)
        by_group = stats.km("Surv(time, status) ~ sex", **ask)
        assert tested.test.statistic == by_group.test.statistic == pytest.approx(log_rank[0], rel=0, abs=6e-11)
        assert tested.test.pvalue == pytest.approx(log_rank[1], rel=1e-6)


def test_the_log_rank_test_by_treatment_is_the_pooled_and_the_stratified_one(loaded):
    pooled = stats.compare("Surv(time, event) ~ treat", grid=1, **loaded(infections, is_free=True), **ANY).test
    stratified = stats.compare("Surv(time, event) ~ treat", strata="site", **loaded(infections, is_free=False)).test

    assert (pooled.statistic, stratified.statistic) == pytest.approx((11.7425108689, 12.2422776285), rel=0, abs=6e-11)
    assert (pooled.pvalue, stratified.pvalue) == pytest.approx((6.108855e-4, 4.671877e-4), rel=1e-6)


def test_a_meta_analysis_is_that_of_the_sites_own_fits(loaded):
    found = stats.compare(STAYS, family="gaussian", coefficient="sexM", **loaded(stays, is_free=False)).meta

    assert (found.fixed, found.fixed_bse) == pytest.approx((0.4347091192, 0.2559161448), rel=0, abs=6e-11)
    assert (found.q, found.q_pvalue, found.i_squared) == pytest.approx((3.0054989535, 0.2225175116, 0.3345530872), rel=0, abs=6e-11)
    assert (found.tau_squared, found.random, found.random_bse) == pytest.approx(
        (0.1132093677, 0.4174883829, 0.3328704344), rel=0, abs=6e-11
    )


def test_exact_times_are_refused_under_the_default_floors_with_the_line_in_the_sites_own_log(loaded, caplog):
    with pytest.raises(RefusedByPolicy) as refused:
        stats.cox(LUNG, grid=1, **loaded(lung, is_free=False), **ANY)

    assert str(refused.value) == "site1: refused by policy"
    assert refused.value.reasons == (
        "policy.patients_per_cell = 5: the analysis asks for 1",
        "policy.patients_per_sum = 10: the analysis asks for 1",
    )
    assert [record.getMessage() for record in caplog.records] == [f"site1 refuses: {each}" for each in refused.value.reasons]


def test_three_patients_with_steroids_are_seen_under_the_default_floor(loaded):
    with pytest.raises(ConfigError, match="a combination of event and treat and steroids and inherited has fewer than 5 patients"):
        stats.cox(FIRST, **loaded(infections, is_free=False))


@pytest.mark.parametrize("num_sites", [3, 5, 13, 50])
def test_the_split_into_sites_changes_no_coefficient(num_sites, loaded):
    places = np.random.default_rng(num_sites).integers(0, num_sites, 1000)

    for study, ask in (
        (stays, lambda **sites: stats.glm(STAYS, family="poisson", **sites)),
        (lung, lambda **sites: stats.cox(LUNG, grid=30, **sites)),
        (lung, lambda **sites: stats.km("Surv(time, status) ~ sex", grid=30, **sites)),
    ):
        own = loaded(study, is_free=False)
        found, again = ask(**own), ask(contract=own["contract"], sites=split(own["sites"], places))
        if hasattr(found, "curves"):
            assert found.as_dict() == again.as_dict()
            continue
        assert (np.abs(found.params - again.params) <= 1e-10 * np.maximum(np.abs(found.params), found.bse)).all()
        assert found.bse == pytest.approx(again.bse, rel=1e-10)


def split(sites, places):
    """The rows of some sites as those of others, by each row's place among all."""
    whole = CheckedTable(
        columns={
            name: np.concatenate([each.table.columns[name] for each in sites])
            if isinstance(values, np.ndarray)
            else tuple(value for each in sites for value in each.table.columns[name])
            for name, values in sites[0].table.columns.items()
        },
        levels=sites[0].table.levels,
        patients=tuple(patient for each in sites for patient in each.table.patients),
        lines=tuple(line for each in sites for line in each.table.lines),
    )
    at = [np.flatnonzero(places[: len(whole.patients)] == place).tolist() for place in np.unique(places)]
    return [AnalysisSite(name=f"site-{number}", table=whole.rows(rows)) for number, rows in enumerate(at)]
