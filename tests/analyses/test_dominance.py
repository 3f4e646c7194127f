"""Columns that are about few patients: refused before anything about their outcome is told, and others are not."""

from __future__ import annotations

import pytest
from study_tables import changed, integer, made, number, write_study

from p2pfl.analyses.policy import RefusedByPolicy
from p2pfl.analyses.stats import run
from p2pfl.errors import ConfigError

FEW = (4, 10, 16, 22)
"""Places of four patients of site-1."""


def with_mark(places, variable=None):
    """A study with a number that is 1 for some patients and 0 for the others."""
    variables, outcome, rows = made()
    marked = [row | {"mark": "1" if place in places else "0"} for place, row in enumerate(rows)]
    return {**variables, "mark": variable or number(0, 10)}, outcome, marked


def with_one_old_patient():
    variables, outcome, rows = made()
    study = {**variables, "age": number(0, 110)}, outcome, rows
    return changed(study, age=lambda row, place: "109" if place == FEW[0] else row["age"])


ASKED = {
    "a number that one patient has": (lambda: with_mark(FEW[:1]), {"formula": "died ~ age + mark"}, "mark"),
    "a number that four patients have": (lambda: with_mark(FEW), {"formula": "died ~ age + mark"}, "mark"),
    "its interaction": (lambda: with_mark(FEW), {"formula": "died ~ age + age:mark"}, "age:mark"),
    "an exponential": (with_one_old_patient, {"formula": "died ~ exp(age)"}, "exp(age)"),
    "the same in a linear model": (lambda: with_mark(FEW), {"formula": "dose ~ mark", "family": "gaussian"}, "mark"),
    "the same in a Cox model": (
        lambda: with_mark(FEW),
        {"kind": "cox", "formula": "Surv(days, died) ~ age + mark", "family": None},
        "mark",
    ),
    "the same in a calibration": (lambda: with_mark(FEW), {"kind": "calibration", "formula": "died ~ age + mark", "family": None}, "mark"),
    "the same in a mixed model": (lambda: with_mark(FEW), {"kind": "mixed", "formula": "dose ~ age + mark", "family": None}, "mark"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_column_about_few_patients_is_refused(asked, tmp_path, caplog):
    study, question, column = ASKED[asked]
    content = {"kind": "glm", "family": "binomial", **question}
    contract, sites = write_study(tmp_path, study())
    for site in sites:
        site.write_text(site.read_text() + "policy: {may_release: [site_means]}\n")

    with pytest.raises(RefusedByPolicy, match=r"^site-1: refused by policy$"):
        run({key: value for key, value in content.items() if value is not None}, contract, sites)

    said = f"policy.patients_per_cell: fewer than 5 patients of this site make up nearly all differences in {column}: "
    assert f"site-1 refuses: {said}" in caplog.text


@pytest.mark.parametrize(
    ("study", "formula"),
    [
        (with_mark((*FEW, 28)), "dose ~ mark"),
        (with_mark((*FEW, 28, 34, 40)), "dose ~ age + mark"),
        (made(), "visits ~ age * sex + exp(dose)"),
        (changed(made(), age=lambda row, place: str(19 + place % 3)), "visits ~ age"),
    ],
)
def test_a_column_about_enough_patients_is_answered(study, formula, tmp_path):
    assert run({"kind": "glm", "formula": formula, "family": "gaussian"}, *write_study(tmp_path, study)).counts.num_patients == 240


def test_few_values_that_are_declared_as_such_are_counted_over_all_sites(tmp_path):
    study = with_mark((*FEW, 5, 11), integer(0, 1))

    fit = run({"kind": "glm", "formula": "dose ~ mark", "family": "gaussian"}, *write_study(tmp_path, study))
    assert fit.names[-1] == "mark"


ELSEWHERE = {place for place in range(240) if place % 3 != 1 and place % 4 == 0}
"""Places of many patients of the other sites."""


def test_a_site_has_no_estimate_about_few_patients_of_its_own(tmp_path):
    asked = {"kind": "compare", "formula": "dose ~ age + mark", "family": "gaussian", "coefficient": "mark"}

    for name in ("few", "one with few"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match="0 sites have an estimate"):
        run(asked, *write_study(tmp_path / "few", with_mark((4, 5, 6))))
    found = run(asked, *write_study(tmp_path / "one with few", with_mark(ELSEWHERE | {4, 7})))
    assert found.meta.num_estimates == 2


def test_a_site_gives_no_summary_about_few_patients_of_its_own(tmp_path, caplog):
    contract, sites = write_study(tmp_path, with_mark(ELSEWHERE | {4, 7}))
    for site in sites:
        site.write_text(site.read_text() + "policy: {may_release: [site_means]}\n")

    with pytest.raises(RefusedByPolicy, match=r"^site-1: refused by policy$"):
        run({"kind": "mixed", "formula": "dose ~ age + mark"}, contract, sites)
    assert "and its summary is seen by all" in caplog.text


def test_a_site_has_no_slope_of_its_own_about_few_patients(tmp_path):
    asked = {"kind": "calibration", "formula": "died ~ mark", "ends": [0.5, 1.0]}
    found = run(asked, *write_study(tmp_path, with_mark(ELSEWHERE | {4, 7})))

    assert found.site_slopes.num_estimates == 2
