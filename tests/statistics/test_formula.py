"""Formulae mean what they mean in R, and run nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inference_data import numbers, sites, table

from p2pfl.errors import ConfigError
from p2pfl.statistics.design import design
from p2pfl.statistics.families import FAMILIES
from p2pfl.statistics.formula import Variable, parse_formula
from p2pfl.statistics.glm import DesignRows, fit_glm
from p2pfl.statistics.scale import INTERCEPT
from p2pfl.statistics.sums import analyse


def terms(text):
    """Right side of a formula as R writes it, with 1 for the intercept."""
    return [":".join(map(str, term)) or "1" for term in parse_formula(f"y ~ {text}").terms]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a", "1 a"),
        ("a + b", "1 a b"),
        ("1 + a", "1 a"),
        ("a - 1", "a"),
        ("0 + a", "a"),
        ("-1 + a", "a"),
        ("a + 0 + 1", "1 a"),
        ("a * b", "1 a b a:b"),
        ("a:b", "1 a:b"),
        ("a * b - a:b", "1 a b"),
        ("a * b * c", "1 a b c a:b a:c b:c a:b:c"),
        ("(a + b + c)^2", "1 a b c a:b a:c b:c"),
        ("(a + b):c", "1 a:c b:c"),
        ("a:b + a", "1 a a:b"),
        ("a + b:a + a:b", "1 a b:a"),
        ("a:a", "1 a"),
        ("log(a) * b", "1 log(a) b log(a):b"),
        ("a + b - b", "1 a"),
        ("(a + b) * c - a", "1 b c a:c b:c"),
        ("a_1 + B.x", "1 a_1 B.x"),
    ],
)
def test_terms_are_those_of_r(text, found):
    assert terms(text) == found.split()


def test_outcomes_offsets_and_columns_are_told():
    found = parse_formula("Surv(days, event) ~ age + offset(log(weight)) + sqrt(marker):age")
    assert found.outcome == ("days", "event")
    assert found.offsets == (Variable("weight", "log"),)
    assert found.columns == ("days", "event", "age", "marker", "weight")


@pytest.mark.parametrize(
    "text",
    [
        "y ~ __import__('os').system('touch broken')",
        "y ~ os.system(x)",
        "y ~ open('/etc/passwd')",
        "y ~ I(age == 41)",
        "y ~ age == 41",
        "y ~ age > 90",
        "y ~ age[3]",
        "y ~ {age}",
        "y ~ eval(age)",
        "y ~ exec('import os')",
        "y ~ (lambda: age)()",
        "y ~ age; x = 1",
        "y ~ `age`",
        "y ~ read.csv('other.csv')",
        "y ~ other::table",
        "y ~ log(age, base=2)",
        "y ~ log(log(age))",
        "y ~ 41 + age",
        "y ~ age + 1e9",
        "y ~ age^99",
        "y ~ age ~ sex",
        "~ age",
        "y ~",
        "y ~ age +",
        "y ~ (age",
        "y ~ age)",
        "y ~ - 1",
        "Surv(days) ~ age",
        "y ~ age:offset(days)",
        "y ~ offset(log)) + (age",
        "y ~ é",
        "",
        "y ~ " + "(" * 50 + "a" + ")" * 50,
        "y ~ " + " * ".join(f"a{k}" for k in range(12)),
        "y ~ " + "a" * 3000,
        "y ~ system(\n'id')",
        "y ~ \x00",
    ],
)
def test_what_is_no_formula_is_refused_with_a_sentence(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        parse_formula(text)
    assert "formula" in str(error.value)
    assert not list(tmp_path.iterdir())


@given(st.text(max_size=40) | st.text(alphabet="ab+-:*^()~ 01,log", max_size=40))
def test_any_text_is_a_formula_or_refused(text):
    try:
        parse_formula(text)
    except ConfigError:
        return


TABLE = {"y": np.arange(6.0), "x": np.arange(6.0) ** 2 + 1, "g": ["b", "a", "c", "", "a", "b"], "h": ["u", "v", "u", "v", "u", "v"]}
LEVELS = {"g": ["a", "b", "c"], "h": ["u", "v"]}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("y ~ x + g", [INTERCEPT, "x", "gb", "gc"]),
        ("y ~ g - 1", ["ga", "gb", "gc"]),
        ("y ~ g * h", [INTERCEPT, "gb", "gc", "hv", "gb:hv", "gc:hv"]),
        ("y ~ g:x", [INTERCEPT, "ga:x", "gb:x", "gc:x"]),
        ("y ~ x + g:x", [INTERCEPT, "x", "x:gb", "x:gc"]),
        ("y ~ log(x)", [INTERCEPT, "log(x)"]),
    ],
)
def test_factors_are_coded_as_r_codes_them(text, names):
    found = design(parse_formula(text), TABLE, LEVELS)
    assert sorted(":".join(sorted(name.split(":"))) for name in found.names) == sorted(":".join(sorted(name.split(":"))) for name in names)


def test_columns_are_products_and_missing_where_a_part_is():
    found = design(parse_formula("y ~ x * g + offset(sqrt(x))"), TABLE, LEVELS)
    columns = dict(zip(found.names, found.columns_MP.T, strict=True))
    assert columns["gb"].tolist()[:3] == [1, 0, 0]
    assert np.isnan(columns["gb"][3])
    assert columns["x:gb"].tolist()[5] == TABLE["x"][5]
    assert found.offsets_M == pytest.approx(np.sqrt(TABLE["x"]))


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        pytest.param("y ~ z", {}, "no column 'z' in the table: it has g, h, x, y", id="absent"),
        pytest.param("y ~ g", {"g": ["a", "b", "c", "d", "e", "a"]}, "g: 2 values are none of the contract's levels a, b, c", id="level"),
        pytest.param("y ~ log(g)", {}, "g is a factor", id="function"),
        pytest.param("y ~ x + offset(g)", {}, "g is a factor", id="offset"),
        pytest.param("y ~ log(y)", {}, r"log\(y\) is no number in some rows", id="logarithm"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_without_showing_a_value(text, changes, message):
    with pytest.raises(ConfigError, match=message):
        design(parse_formula(text), TABLE | changes, LEVELS)


VARIABLES = "+".join(f"v{place}" for place in range(30))
SEVEN = "(a+b+c+d+e+f+g)^6"


@pytest.mark.parametrize(
    "text", [f"({VARIABLES})^6", f"({VARIABLES}):({VARIABLES})", f"({VARIABLES})*({VARIABLES})", "*".join([SEVEN] * 90)]
)
def test_products_of_a_formula_are_counted_before_they_are_formed(text):
    with pytest.raises(ConfigError, match="more than 200 terms"):
        parse_formula(f"y ~ {text}")


def test_products_of_many_levels_are_refused():
    levels = {name: [f"l{place}" for place in range(20)] for name in "abc"}
    with pytest.raises(ConfigError, match="more than 1,000 coefficients"):
        design(parse_formula("y ~ a * b * c"), {"y": np.zeros(1), "a": ["l0"], "b": ["l0"], "c": ["l0"]}, levels)


def test_a_formula_gives_the_published_model_of_diabetes():
    rows = table("cnsim.csv")
    columns = {name: numbers(rows, name) for name in ("PM_BMI_CONTINUOUS", "LAB_HDL", "DIS_DIAB")}
    columns["GENDER"] = [row["GENDER"] for row in rows]
    formula = parse_formula("DIS_DIAB ~ GENDER * PM_BMI_CONTINUOUS + LAB_HDL")
    found = design(formula, columns, {"GENDER": ["0", "1"]})
    outcome = columns["DIS_DIAB"]
    is_complete = np.isfinite(found.columns_MP).all(axis=1) & np.isfinite(outcome)
    parts = [at[is_complete[at]] for at in sites(rows, "study")]
    parts = [
        DesignRows(columns_MP=found.columns_MP[at], outcomes_M=outcome[at], offsets_M=found.offsets_M[at], weights_M=np.ones(len(at)))
        for at in parts
    ]
    fit = analyse(fit_glm(found.names, FAMILIES["binomial"]), parts)

    assert fit.deviance == pytest.approx(1036.03136097792, rel=1e-12)
    assert dict(zip(fit.names, fit.params, strict=True)) == pytest.approx(
        {
            INTERCEPT: -6.742636692,
            "GENDER1": -0.357565158,
            "PM_BMI_CONTINUOUS": 0.130635795,
            "LAB_HDL": -0.773408549,
            "GENDER1:PM_BMI_CONTINUOUS": -0.000948079,
        },
        abs=6e-10,
    )
