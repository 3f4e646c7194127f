"""Generalised linear models over sites: the published figures of the pooled rows, however the rows are split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_data import is_level, numbers, table

from p2pfl.errors import ConfigError
from p2pfl.statistics.families import FAMILIES
from p2pfl.statistics.glm import DesignRows, fit_glm
from p2pfl.statistics.scale import INTERCEPT
from p2pfl.statistics.sums import analyse


def split(columns, outcome, sites, offset=None):
    """Complete cases of each site, by its name in *sites*."""
    columns_MP = np.column_stack([np.ones(len(outcome)), *columns])
    offset = np.zeros(len(outcome)) if offset is None else offset
    is_complete = np.isfinite(columns_MP).all(axis=1) & np.isfinite(outcome) & np.isfinite(offset)
    found = []
    for site in sorted(set(sites)):
        here = np.array([each == site for each in sites])
        rows = here & is_complete
        found.append(
            DesignRows(
                columns_MP=columns_MP[rows],
                outcomes_M=outcome[rows],
                offsets_M=offset[rows],
                weights_M=np.ones(rows.sum()),
                num_missing=int((here & ~is_complete).sum()),
            )
        )
    return found


def fit(family, names, sites):
    return analyse(fit_glm([INTERCEPT, *names], FAMILIES[family]), sites)


def cnsim_lipids():
    rows = table("cnsim.csv")
    sites = split([numbers(rows, "LAB_TRIG")], numbers(rows, "LAB_TSC"), [row["study"] for row in rows])
    return fit("gaussian", ["LAB_TRIG"], sites)


def cnsim_diabetes():
    rows = table("cnsim.csv")
    gender, bmi = is_level(rows, "GENDER", "1"), numbers(rows, "PM_BMI_CONTINUOUS")
    sites = split([gender, bmi, gender * bmi, numbers(rows, "LAB_HDL")], numbers(rows, "DIS_DIAB"), [row["study"] for row in rows])
    return fit("binomial", ["GENDER1", "BMI", "GENDER1:BMI", "HDL"], sites)


def stays(family):
    rows = table("los.csv")
    columns = [is_level(rows, "age", "old"), is_level(rows, "age", "young"), is_level(rows, "sex", "M"), numbers(rows, "lab")]
    return fit(family, ["old", "young", "M", "lab"], split(columns, numbers(rows, "los"), [row["site"] for row in rows]))


def infections():
    rows = table("cgd0.csv")
    times = [f"etime{k}" for k in range(1, 8)]
    counts = np.array([float(sum(row[name] != "" for name in times)) for row in rows])
    columns = [numbers(rows, "treat"), numbers(rows, "age"), is_level(rows, "inherit", "2")]
    sites = split(columns, counts, [row["center"] for row in rows], offset=np.log(numbers(rows, "futime")))
    return fit("poisson", ["treat", "age", "inherit2"], sites)


FIGURES = {
    "cnsim lipids": (
        cnsim_lipids,
        [5.6971141805, 0.0752997656],
        [0.0199836449, 0.0077541594],
        {"num_rows": 7800, "num_missing": 1579, "deviance": 8936.31974296402, "df_resid": 7798},
    ),
    "cnsim diabetes": (
        cnsim_diabetes,
        [-6.742636692, -0.357565158, 0.130635795, -0.000948079, -0.773408549],
        [0.892611099, 1.349834247, 0.025657130, 0.044227849, 0.221478676],
        {"num_rows": 7485, "num_missing": 1894, "deviance": 1036.03136097792, "df_resid": 7480},
    ),
    "stays, gaussian": (
        lambda: stays("gaussian"),
        [8.3821680002, 0.9349764456, -0.9659624126, 0.4384692928, 0.1015465127],
        [0.2783177416, 0.2874611359, 0.3519605616, 0.2573695442, 0.0043118331],
        {"dispersion": 16.5306069489, "log_likelihood": -2819.0390768825},
    ),
    "stays, poisson": (
        lambda: stays("poisson"),
        [2.1757958085, 0.0760737709, -0.0824690905, 0.0344039772, 0.0078492469],
        [0.0206118429, 0.0200044962, 0.0256147038, 0.0181082488, 0.0002883153],
        {"deviance": 1526.211534137729, "aic": 5779.0824113036},
    ),
    "infections": (
        infections,
        [-5.4813454200, -1.0435238522, -0.0335359500, 0.3420645282],
        [0.2177692679, 0.2615700223, 0.0133731251, 0.2424717480],
        {"deviance": 153.836472869258, "df_resid": 124, "aic": 264.8729874197},
    ),
}


@pytest.mark.parametrize("model", FIGURES)
def test_figures_are_those_of_the_pooled_rows(model):
    analysis, params, errors, others = FIGURES[model]
    found = analysis()

    last_digit = 0.6e-9 if model == "cnsim diabetes" else 0.6e-10
    assert found.params == pytest.approx(params, rel=0, abs=last_digit)
    assert found.bse == pytest.approx(errors, rel=0, abs=last_digit)
    assert {name: getattr(found, name) for name in others} == pytest.approx(others, rel=3e-12)


def test_p_values_are_of_t_where_the_dispersion_is_estimated():
    assert cnsim_lipids().pvalues[1] == pytest.approx(3.616956e-22, rel=1e-6)
    assert cnsim_diabetes().pvalues[-1] == pytest.approx(4.793776e-4, rel=1e-6)


def drawn(family, seed, num_rows=600):
    random = np.random.default_rng(seed)
    columns = np.column_stack(
        [np.ones(num_rows), random.normal(50, 12, num_rows), random.normal(size=num_rows) * 1e3, random.integers(0, 2, num_rows)]
    )
    eta = columns @ np.array([-1.0, 0.03, -4e-4, 0.5])
    outcome = {
        "gaussian": random.normal(eta),
        "binomial": (random.random(num_rows) < 1 / (1 + np.exp(-eta))) * 1.0,
        "poisson": random.poisson(np.exp(eta)) * 1.0,
        "gamma": random.gamma(2.0, np.exp(eta) / 2),
    }
    return columns, outcome[family]


def sites_of(columns, outcome, places):
    parts = [places == place for place in np.unique(places)]
    return [
        DesignRows(columns_MP=columns[rows], outcomes_M=outcome[rows], offsets_M=np.zeros(rows.sum()), weights_M=np.ones(rows.sum()))
        for rows in parts
    ]


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=10)
@given(num_sites=st.sampled_from([1, 2, 3, 5, 13, 50]), seed=st.integers(0, 2**32 - 1))
def test_the_split_changes_no_coefficient(family, num_sites, seed):
    columns, outcome = drawn(family, 7)
    places = np.random.default_rng(seed).integers(0, num_sites, len(outcome))
    names = ["age", "marker", "sex"]
    whole, parts = (
        fit(family, names, sites_of(columns, outcome, np.zeros(len(outcome)))),
        fit(family, names, sites_of(columns, outcome, places)),
    )

    largest = np.maximum(np.abs(whole.params), whole.bse)
    assert (np.abs(parts.params - whole.params) <= 1e-10 * largest).all()
    assert parts.bse == pytest.approx(whole.bse, rel=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_zero_at_the_fit(family):
    columns, outcome = drawn(family, 3)
    found = fit(family, ["age", "marker", "sex"], sites_of(columns, outcome, np.arange(len(outcome)) % 3))

    score = FAMILIES[family].score(outcome, FAMILIES[family].mean(columns @ found.params))
    steps = found.covariance_PP / found.dispersion @ (columns.T @ score)
    assert (np.abs(steps) <= 1e-10 * found.bse).all()


def refused(columns, outcome, names=("age", "marker", "sex"), family="binomial"):
    with pytest.raises(ConfigError) as error:
        fit(family, list(names), sites_of(columns, outcome, np.arange(len(outcome)) % 3))
    return str(error.value)


def test_separated_outcomes_are_refused_by_name():
    columns, _ = drawn("binomial", 1)
    assert "separated by" in refused(columns, (columns[:, 1] > 50) * 1.0)
    assert "age" in refused(columns, (columns[:, 1] > 50) * 1.0)


def test_columns_that_depend_on_each_other_are_refused_by_name():
    columns, outcome = drawn("gaussian", 1)
    twice = np.column_stack([columns, 2 * columns[:, 1] - columns[:, 2]])
    message = refused(twice, outcome, ("age", "marker", "sex", "both"), "gaussian")
    assert message.startswith("age, marker, both depend on each other")


def test_a_constant_column_is_refused_by_name():
    columns, outcome = drawn("gaussian", 1)
    columns[:, 3] = 4.7
    assert refused(columns, outcome, family="gaussian").startswith("sex is the same in all rows")


def test_too_few_rows_are_refused():
    columns, outcome = drawn("gaussian", 1)
    assert refused(columns[:12], outcome[:12], family="gaussian").startswith("4 coefficients from 12 rows")


def test_no_rows_at_all_are_refused():
    nothing = np.zeros((0, 2))
    with pytest.raises(ConfigError, match="no site has a complete row"):
        fit(
            "gaussian",
            ["age"],
            [DesignRows(columns_MP=nothing, outcomes_M=nothing[:, 0], offsets_M=nothing[:, 0], weights_M=nothing[:, 0])],
        )


@pytest.mark.parametrize("family", ["binomial", "poisson", "gamma"])
def test_outcomes_of_another_family_are_refused(family):
    columns, outcome = drawn("gaussian", 1)
    assert f"no {family} model" in refused(columns, outcome - 10, family=family)


def test_a_model_without_an_intercept_is_fitted_as_it_stands():
    columns, outcome = drawn("gaussian", 5)
    sites = sites_of(columns[:, 1:], outcome, np.arange(len(outcome)) % 4)
    found = analyse(fit_glm(["age", "marker", "sex"], FAMILIES["gaussian"]), sites)
    assert found.params == pytest.approx(np.linalg.lstsq(columns[:, 1:], outcome, rcond=None)[0], rel=1e-10)
