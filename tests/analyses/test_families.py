"""Gamma and negative binomial models over sites: those of the pooled rows."""

from __future__ import annotations

import re

import numpy as np
import pytest
from pooled import assert_same, pooled, pooled_glm
from statsmodels.discrete.discrete_model import NegativeBinomial as PooledNegativeBinomial
from statsmodels.genmod import families
from statsmodels.genmod.families.links import Log
from study_tables import changed, made, write_study

from commands import run_here
from p2pfl.analyses import stats
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.errors import ConfigError


@pytest.fixture(scope="module")
def study():
    random = np.random.default_rng(11)
    rates = random.gamma(2.0, 0.5, 600)
    return changed(made(600, 4), visits=lambda row, place: str(min(40, random.poisson(rates[place] * (3 + float(row["dose"]) / 2)))))


@pytest.fixture(scope="module")
def table(study):
    return pooled(study)


@pytest.fixture(scope="module")
def files(study, tmp_path_factory):
    contract, sites = write_study(tmp_path_factory.mktemp("study"), study)
    return {"contract": contract, "sites": sites}


def columns(table):
    return [np.ones(600), table["dose"], (table["sex"] == "male") * 1.0]


def test_a_gamma_model_is_that_of_the_pooled_rows_with_rs_dispersion_and_aic(files, table):
    found = stats.glm("days ~ dose + sex", family="gamma", **files)
    expected = pooled_glm(table["days"], columns(table), families.Gamma(Log()))

    assert_same(found, expected.params, expected.bse)
    assert found.fit.dispersion == pytest.approx(expected.scale, rel=1e-11)
    assert found.fit.deviance == pytest.approx(expected.deviance, rel=1e-11)
    log_likelihood = expected.model.loglike(expected.params, scale=expected.deviance / 600)
    assert (found.fit.log_likelihood, found.fit.aic) == pytest.approx((log_likelihood, -2 * log_likelihood + 8), rel=1e-11)


def test_a_negative_binomial_model_with_a_given_theta_is_that_of_the_pooled_rows(files, table):
    found = stats.glm("visits ~ dose + sex + offset(log(days))", family="negative-binomial", theta=1.7, **files)
    expected = pooled_glm(table["visits"], columns(table), families.NegativeBinomial(alpha=1 / 1.7), offset=np.log(table["days"]))

    assert_same(found, expected.params, expected.bse)
    assert (found.fit.log_likelihood, found.fit.theta, found.fit.theta_bse) == (pytest.approx(expected.llf, rel=1e-11), 1.7, None)


def test_theta_is_estimated_with_the_coefficients(files, table):
    found = stats.glm("visits ~ dose + sex", family="negative-binomial", **files)
    theta = found.fit.theta
    start = [*found.params * 1.001, 1.001 / theta]
    model = PooledNegativeBinomial(table["visits"], np.column_stack(columns(table)))
    both = model.fit(start, method="newton", maxiter=200, tol=1e-15, disp=0)
    fixed = pooled_glm(table["visits"], columns(table), families.NegativeBinomial(alpha=1 / theta))

    assert_same(found, both.params[:-1], fixed.bse)
    assert theta == pytest.approx(1 / both.params[-1], rel=0, abs=1e-8 * found.fit.theta_bse)
    # at the maximum the error of theta's inverse follows from that of theta, but for what it shares with the coefficients
    assert found.fit.theta_bse == pytest.approx(both.bse[-1] * theta**2, rel=1e-3)
    assert (found.fit.log_likelihood, found.fit.aic) == pytest.approx((both.llf, both.aic), rel=1e-11)


def test_the_split_changes_no_coefficient(study, files, tmp_path):
    contract, sites = write_study(tmp_path, study, split=np.arange(600) % 13)
    for ask in ({"formula": "days ~ dose + age", "family": "gamma"}, {"formula": "visits ~ dose", "family": "negative-binomial"}):
        usual, found = stats.glm(**ask, **files), stats.glm(**ask, contract=contract, sites=sites)
        assert_same(found, usual.params, usual.bse)


def test_a_coefficient_of_a_gamma_model_is_compared_between_sites(files):
    found = stats.compare("days ~ dose", family="gamma", coefficient="dose", **files)

    assert found.meta.num_estimates == 4
    assert abs(found.meta.fixed - stats.glm("days ~ dose", family="gamma", **files).params[1]) < found.meta.fixed_bse


def test_the_table_says_theta_and_what_it_means(files, monkeypatch, capfd):
    ask = ["stats", "glm", "visits ~ dose", "--family", "negative-binomial", "--contract", files["contract"], *files["sites"]]
    code, estimated, _ = run_here(*ask, monkeypatch=monkeypatch, capfd=capfd)
    given = run_here(*ask, "--theta", "2.5", monkeypatch=monkeypatch, capfd=capfd)

    assert (code, given[0]) == (0, 0)
    assert re.search(r"variance = mean \+ mean² / theta, theta \d\.\d+ \(SE 0\.\d+\)", estimated)
    assert "rate ratio" in estimated
    assert "variance = mean + mean² / theta, theta 2.5 (given)" in given[1]


@pytest.mark.parametrize(
    ("change", "ask", "sentence"),
    [
        (lambda _, place: str(place % 3 + 2), {"family": "negative-binomial"}, "theta has no end: use family poisson"),
        (lambda _, place: str(place % 3), {"family": "gamma"}, "finite numbers above 0 are expected"),
    ],
    ids=["no scatter", "zeros"],
)
def test_outcomes_of_another_family_are_refused(change, ask, sentence, study, tmp_path):
    contract, sites = write_study(tmp_path, changed(study, visits=change))
    with pytest.raises(ConfigError, match=sentence):
        stats.glm("visits ~ dose", contract=contract, sites=sites, **ask)


def test_theta_belongs_to_the_negative_binomial_family():
    with pytest.raises(ConfigError, match="theta = 2: it belongs to family negative-binomial"):
        AnalysisSpec.from_mapping({"kind": "glm", "formula": "visits ~ dose", "family": "poisson", "theta": 2})
    with pytest.raises(ConfigError, match="theta"):
        AnalysisSpec.from_mapping({"kind": "glm", "formula": "visits ~ dose", "family": "negative-binomial", "theta": -2})
