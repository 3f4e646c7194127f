"""Linear models with a random intercept for each site: the REML fit of the pooled rows, where every site lets its means be known."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from pooled import assert_same, pooled
from scipy.optimize import minimize_scalar
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.tools.sm_exceptions import ConvergenceWarning
from study_tables import changed, data, made, stays, write_study

from commands import run_here
from p2pfl.analyses import stats
from p2pfl.analyses.policy import RefusedByPolicy
from p2pfl.errors import ConfigError

MEANS = {"may_release": ["site_means"]}
FORMULA = "dose ~ age + sex"
SITES = 6


@pytest.fixture(scope="module")
def study():
    effects = np.random.default_rng(2).normal(0, 0.8, SITES)
    return changed(made(300, SITES), dose=lambda row, place: f"{(float(row['dose']) + effects[place % SITES] + 3) / 2:.4f}")


@pytest.fixture(scope="module")
def files(study, tmp_path_factory):
    contract, sites = write_study(tmp_path_factory.mktemp("study"), study, policy=MEANS)
    return {"contract": contract, "sites": sites}


@pytest.fixture(scope="module")
def found(files):
    return stats.mixed(FORMULA, **files)


@pytest.fixture(scope="module")
def rows(study):
    """Outcome, columns and site of the pooled rows."""
    table = pooled(study)
    columns = np.column_stack([np.ones(300), table["age"], (table["sex"] == "male") * 1.0])
    return table["dose"], columns, np.array([row["site"] for row in study[2]])


def reml(outcome, columns, sites):
    """Restricted fit from the whole covariance matrix of all rows: ratio, coefficients, errors, both variances, log-likelihood."""
    belongs = (sites[:, None] == np.unique(sites)) * 1.0
    df = len(outcome) - columns.shape[1]

    def at(ratio):
        covariance = np.eye(len(outcome)) + ratio * belongs @ belongs.T
        weighted = np.linalg.solve(covariance, columns)
        information = columns.T @ weighted
        params = np.linalg.solve(information, weighted.T @ outcome)
        residual = outcome - columns @ params
        variance = residual @ np.linalg.solve(covariance, residual) / df
        determinants = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(information)[1]
        return df * (1 + np.log(2 * np.pi * variance)) + determinants, params, information, variance

    best = float(np.exp(minimize_scalar(lambda each: at(np.exp(each))[0], bounds=(-8, 4), method="bounded", options={"xatol": 1e-10}).x))
    criterion, params, information, variance = at(best)
    return {
        "tau": best * variance,
        "params": params,
        "errors": np.sqrt(variance * np.diag(np.linalg.inv(information))),
        "variance": variance,
        "log_likelihood": -criterion / 2,
        "statistic": at(0.0)[0] - criterion,
    }


def test_a_mixed_model_is_the_restricted_fit_of_the_pooled_rows(found, rows):
    expected, fit = reml(*rows), found.fit

    # the oracle finds the least of a flat curve: its ratio has half of the digits
    assert fit.tau_squared == pytest.approx(expected["tau"], rel=1e-6)
    assert fit.params == pytest.approx(expected["params"], rel=1e-7)
    assert fit.bse == pytest.approx(expected["errors"], rel=1e-7)
    others = (fit.residual_variance, fit.reml_log_likelihood, fit.tau_statistic)
    assert others == pytest.approx((expected["variance"], expected["log_likelihood"], expected["statistic"]), rel=1e-8)


def test_statsmodels_finds_the_same_within_its_own_digits(found, rows):
    outcome, columns, sites = rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        expected = MixedLM(outcome, columns, groups=sites).fit(reml=True)

    assert found.fit.tau_squared == pytest.approx(expected.cov_re[0, 0], rel=1e-3)
    assert found.params == pytest.approx(expected.fe_params, rel=1e-5)
    assert found.fit.reml_log_likelihood == pytest.approx(expected.llf, rel=1e-8)


def test_stays_at_three_hospitals(tmp_path):
    contract, sites = write_study(tmp_path, stays(), policy=MEANS)
    found = stats.mixed("los ~ sex + lab", contract=contract, sites=sites)
    table = data("los.csv")
    columns = np.array([[1.0, row["sex"] == "M", float(row["lab"])] for row in table])
    expected = MixedLM(np.array([float(row["los"]) for row in table]), columns, groups=[row["site"] for row in table]).fit(reml=True)

    assert found.fit.tau_squared == pytest.approx(expected.cov_re[0, 0], rel=1e-3)
    assert found.params == pytest.approx(expected.fe_params, rel=1e-5)


def test_sites_that_do_not_differ_have_the_linear_model_and_no_variance_between(tmp_path, study):
    # the same rows at each site
    alike = changed(study, **{name: lambda row, place, name=name: study[2][place // SITES][name] for name in ("dose", "age", "sex")})
    contract, sites = write_study(tmp_path, alike, policy=MEANS)
    found = stats.mixed(FORMULA, contract=contract, sites=sites)
    linear = stats.glm(FORMULA, family="gaussian", contract=contract, sites=sites)

    assert (found.fit.tau_squared, found.fit.tau_pvalue) == (0, 1)
    assert_same(found, linear.params, linear.bse)


def test_terminal_json_and_page_say_the_variances(files, tmp_path, monkeypatch, capfd):
    ask = ["stats", "mixed", FORMULA, "--contract", files["contract"], *files["sites"]]
    code, out, err = run_here(*ask, "--html", tmp_path / "page.html", monkeypatch=monkeypatch, capfd=capfd)
    told = json.loads(run_here(*ask, "--json", monkeypatch=monkeypatch, capfd=capfd)[1])

    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "a random intercept for each of 6 sites, by REML" in out
    assert set(told["mixed"]) >= {"tau_squared", "residual_variance", "icc", "tau_p"}
    assert "a random intercept for each of 6 sites" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_site_gives_its_means_only_where_its_policy_says_so(study, tmp_path, caplog):
    contract, sites = write_study(tmp_path, study, policy=MEANS)
    sites[2].write_text(sites[2].read_text().replace("site_means", "site_estimates"))

    with pytest.raises(RefusedByPolicy, match="site-2: refused by policy"):
        stats.mixed(FORMULA, contract=contract, sites=sites)
    assert "policy.may_release = [site_estimates]: the analysis takes this site's means and products; to allow that, write" in caplog.text


@pytest.mark.parametrize(
    ("change", "formula", "sentence"),
    [
        ({"sex": lambda row, place: "male" if place % SITES == 1 and place > 20 else row["sex"]}, FORMULA,
         "policy.patients_per_cell: a combination of sex has fewer than 5 patients of this site"),
        ({"dose": lambda row, place: "" if place % SITES == 1 and place > 50 else row["dose"]}, "dose ~ age",
         "policy.patients_per_sum: this site has 9 patients, and its summary is a sum over them"),
        ({"dose": lambda row, place: "" if place % SITES == 1 and place > 70 else row["dose"]}, "dose ~ age",
         "policy.parameters_per_patient: this site's summary has 6 numbers about 12 patients"),
    ],
    ids=["cell", "sum", "numbers"],
)  # fmt: skip
def test_a_site_with_few_patients_gives_no_summary(change, formula, sentence, study, tmp_path, caplog):
    contract, sites = write_study(tmp_path, changed(study, **change), policy=MEANS)
    if "numbers" in sentence:  # 12 patients hold this floor, unless the analysis asks for a stricter one
        with pytest.raises(RefusedByPolicy, match="site-1: refused by policy"):
            stats.mixed(formula, contract=contract, sites=sites, parameters_per_patient=0.2)
    else:
        with pytest.raises(RefusedByPolicy, match="site-1: refused by policy"):
            stats.mixed(formula, contract=contract, sites=sites)

    assert sentence in caplog.text


@pytest.mark.parametrize(
    ("formula", "sentence"),
    [
        ("dose ~ age - 1", "a mixed model has an intercept"),
        ("dose ~ age + offset(days)", "mixed takes no offset"),
        ("sex ~ age", "an outcome of family gaussian has a number"),
        ("Surv(days, died) ~ age", "mixed has one outcome"),
    ],
)
def test_formulae_that_make_no_mixed_model_are_refused(formula, sentence, files):
    with pytest.raises(ConfigError, match=sentence):
        stats.mixed(formula, **files)


def test_one_site_with_rows_makes_no_mixed_model(study, tmp_path):
    alone = changed(study, dose=lambda row, place: row["dose"] if place % SITES == 0 else "")
    variables, outcome, rows = alone
    variables = {**variables, "dose": {**variables["dose"], "absent": "indicator", "absent_value": 1}}
    contract, sites = write_study(tmp_path, (variables, outcome, [row for row in rows if row["dose"]]), policy=MEANS)
    with pytest.raises(ConfigError, match="one site alone has rows"):
        stats.mixed(FORMULA, contract=contract, sites=sites)
