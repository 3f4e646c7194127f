"""Polynomials and splines over sites: the model of the pooled rows with R's columns, and no knots that take few patients apart."""

from __future__ import annotations

import numpy as np
import pytest
from patsy import cr
from pooled import assert_same, pooled, pooled_glm
from scipy.interpolate import CubicSpline
from statsmodels.duration.hazard_regression import PHReg
from statsmodels.genmod.families import Binomial, Gaussian
from study_tables import changed, made, number, write_study

from p2pfl.analyses import stats
from p2pfl.analyses.policy import RefusedByPolicy
from p2pfl.errors import ConfigError
from p2pfl.statistics.splines import natural_spline

KNOTS = (45.0, 55.0, 65.0, 75.0)


@pytest.fixture(scope="module")
def study():
    return made(600, 4)


@pytest.fixture(scope="module")
def table(study):
    return pooled(study)


@pytest.fixture(scope="module")
def files(study, tmp_path_factory):
    contract, sites = write_study(tmp_path_factory.mktemp("study"), study)
    return {"contract": contract, "sites": sites}


def r_poly(values, degree):
    """Columns as R makes them in `poly`: from a QR decomposition of the centred powers, each with its own sign."""
    powers = np.vander(values - values.mean(), degree + 1, increasing=True)
    orthogonal, triangle = np.linalg.qr(powers)
    return (orthogonal * np.sign(np.diag(triangle)))[:, 1:]


def test_a_polynomial_has_rs_columns(files, table):
    found = stats.glm("died ~ poly(age, 3) + poly(dose, 1) * sex", family="binomial", **files)
    is_male, dose = (table["sex"] == "male") * 1.0, r_poly(table["dose"], 1)[:, 0]
    columns = [np.ones(600), *r_poly(table["age"], 3).T, dose, is_male, dose * is_male]
    expected = pooled_glm(table["died"], columns, Binomial())

    assert found.names[1:5] == ("poly(age, 3)1", "poly(age, 3)2", "poly(age, 3)3", "poly(dose, 1)")
    assert_same(found, expected.params, expected.bse)


def test_a_polynomial_is_a_factor_of_products_and_has_rs_columns_in_a_cox_model(files, table):
    found = stats.cox("Surv(days, died) ~ poly(age, 2):sex + sex", strata="none", grid=20, patients_per_cell=1, **_free(files))
    cells = np.ceil(table["days"] / 20) * 20
    age, is_male = r_poly(table["age"], 2), (table["sex"] == "male") * 1.0
    # sexmale, then both degrees for women and for men
    columns = [is_male, *(age[:, degree] * part for part in (1 - is_male, is_male) for degree in (0, 1))]
    expected = PHReg(cells, np.column_stack(columns), status=table["died"], ties="efron").fit()
    by_name = dict(zip(found.names, zip(found.params, found.bse, strict=True), strict=True))
    order = ["sexmale", *(f"poly(age, 2){degree}:sex{sex}" for sex in ("female", "male") for degree in (1, 2))]

    assert sorted(by_name) == sorted(order)
    for name, value, error in zip(order, expected.params, expected.bse, strict=True):
        assert by_name[name] == pytest.approx((value, error), rel=0, abs=1e-8 * max(abs(value), error))


def _free(files):
    return {"contract": files["contract"], "sites": [_site(path) for path in files["sites"]]}


def _site(path):
    free = path.with_name(f"free-{path.name}")
    if not free.exists():
        free.write_text(path.read_text() + f"member: {path.stem}\npolicy: {{patients_per_cell: 1, patients_per_sum: 1}}\n")
    return free


def test_columns_of_a_spline_are_natural_cubic_splines():
    values = np.linspace(20, 100, 801)
    columns = natural_spline(values, KNOTS).T
    inside = (values >= KNOTS[0]) & (values <= KNOTS[-1])

    assert len(columns) == 3
    for column in columns:
        through = CubicSpline(KNOTS, column[np.searchsorted(values, KNOTS)], bc_type="natural")
        assert column[inside] == pytest.approx(through(values[inside]), rel=0, abs=1e-11)
        for outside in (values < KNOTS[0], values > KNOTS[-1]):
            assert np.diff(column[outside], 2) == pytest.approx(0, abs=1e-11)


def test_a_spline_fits_what_the_natural_spline_of_patsy_fits(files, table):
    found = stats.glm(f"dose ~ spline(age, {', '.join(f'{knot:g}' for knot in KNOTS)}) + sex", family="gaussian", **files)
    is_male = (table["sex"] == "male") * 1.0
    columns = [np.ones(600), *natural_spline(table["age"], KNOTS).T, is_male]
    expected = pooled_glm(table["dose"], columns, Gaussian())
    basis = cr(np.clip(table["age"], KNOTS[0], KNOTS[-1]), knots=KNOTS[1:-1], lower_bound=KNOTS[0], upper_bound=KNOTS[-1])
    is_inside = (table["age"] > KNOTS[0]) & (table["age"] < KNOTS[-1])
    ours = np.column_stack(columns[:-1])[is_inside]

    assert found.names[1:4] == tuple(f"spline(age, 45, 55, 65, 75){place}" for place in (1, 2, 3))
    assert_same(found, expected.params, expected.bse)
    assert np.linalg.matrix_rank(np.column_stack([ours, np.asarray(basis)[is_inside]])) == np.linalg.matrix_rank(ours) == 4


def test_the_split_changes_no_coefficient_of_a_curve(study, files, tmp_path):
    ask = {"formula": "died ~ poly(age, 4) + spline(dose, 2, 4, 8)", "family": "binomial"}
    usual = stats.glm(**ask, **files)
    contract, sites = write_study(tmp_path, study, split=np.arange(600) % 13)
    found = stats.glm(**ask, contract=contract, sites=sites)

    assert found.params == pytest.approx(usual.params, rel=1e-9)
    assert found.bse == pytest.approx(usual.bse, rel=1e-9)


@pytest.mark.parametrize(
    ("formula", "sentence"),
    [
        ("died ~ poly(age, 7)", "a degree from 1 to 6 is expected"),
        ("died ~ poly(age)", "',' is expected"),
        ("died ~ poly(age, 1.5)", "a degree from 1 to 6 is expected"),
        ("died ~ spline(age, 40, 55)", "a spline has 3 to 8 knots that increase"),
        ("died ~ spline(age, 55, 40, 70)", "a spline has 3 to 8 knots that increase"),
        ("died ~ spline(age, 40, dose, 70)", "a knot, which is a number is expected"),
        ("died ~ spline(age, 5, 55, 70)", "age goes from 18 to 110; expected knots between these"),
        ("died ~ poly(sex, 2)", "sex has categories, and a number is needed"),
        ("died ~ sex + offset(poly(age, 2))", "a number of each row inside an offset, and no curve, is expected"),
        ("died ~ spline(age, 45, 60.5, 60.51, 75)", "fewer than 5 patients lie between two knots or beyond them"),
        ("died ~ poly(visits, 6)", "visits has too few different values for a polynomial of degree 6"),
    ],
)
def test_curves_that_cannot_be_made_are_refused_with_a_sentence(formula, sentence, study, tmp_path):
    few = changed(study, visits=lambda _, place: str(place % 6))
    contract, sites = write_study(tmp_path, few)
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")):
        stats.glm(formula, family="binomial", contract=contract, sites=sites)


def test_a_curve_of_an_indicator_is_refused(study, tmp_path):
    variables, outcome, rows = study
    absent = {**variables, "dose": {**variables["dose"], "absent": "indicator", "absent_value": 1}}, outcome, rows
    contract, sites = write_study(tmp_path, absent)
    with pytest.raises(ConfigError, match=r"dose\.absent is 0 or 1; a curve needs a number"):
        stats.glm("died ~ poly(dose.absent, 2)", family="binomial", contract=contract, sites=sites)


def test_a_curve_of_dates_counts_their_days(study, files):
    seen = [np.datetime64(row["seen"]).astype(int) for row in study[2]]
    found = stats.glm("dose ~ poly(seen, 2)", family="gaussian", **files)
    expected = pooled_glm(pooled(study)["dose"], [np.ones(600), *r_poly(np.array(seen, dtype=float), 2).T], Gaussian())

    assert_same(found, expected.params, expected.bse)


def test_a_site_holds_the_floor_between_knots_for_its_own_patients(study, tmp_path):
    here = [place for place, row in enumerate(study[2]) if row["site"] == "site-1"]
    few_here = changed(study, age=lambda row, place: row["age"] if row["site"] != "site-1" else "50" if place in here[:3] else "70")
    contract, sites = write_study(tmp_path, few_here)
    ask = {"formula": "died ~ spline(age, 45, 55, 65, 75)", "family": "binomial", "contract": contract, "sites": sites}

    assert stats.glm(**ask).counts.num_patients == 600
    with pytest.raises(RefusedByPolicy, match="site-1: refused by policy"):
        stats.glm(**ask, cells="site")


def test_an_outlier_costs_no_digit(tmp_path, study):
    variables, outcome, rows = study
    wide = {**variables, "age": number(0, 1e9)}, outcome, rows
    contract, sites = write_study(tmp_path, changed(wide, age=lambda row, place: "1000" if place == 3 else row["age"]))
    free = _free({"contract": contract, "sites": sites})
    with pytest.raises(RefusedByPolicy):
        stats.glm("dose ~ poly(age, 3)", family="gaussian", contract=contract, sites=sites)  # the column is about one patient
    found = stats.glm("dose ~ poly(age, 3)", family="gaussian", patients_per_cell=1, **free)
    table = pooled(changed(wide, age=lambda row, place: "1000" if place == 3 else row["age"]))
    expected = pooled_glm(table["dose"], [np.ones(600), *r_poly(table["age"], 3).T], Gaussian())

    assert_same(found, expected.params, expected.bse)
