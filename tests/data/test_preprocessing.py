"""Agreed numbers are held against the contract, and turn a checked table into model inputs."""

from __future__ import annotations

import numpy as np
import pytest
from contracts import contract, site, table_of

from p2pfl.data.check import accepted_table
from p2pfl.data.model_inputs import ModelInputs
from p2pfl.data.preprocessing import Preprocessing
from p2pfl.errors import ConfigError

NUMBERS = {
    "age": {"centre": 60.0, "scale": 10.0, "missing": 61.0},
    "glucose": {"centre": 6.0, "scale": 2.0, "missing": 5.0},
    "sex": {"missing": "female"},
    "admitted": {"centre": 18_000.0, "scale": 100.0, "missing": 18_500.0},
}


def agreed(given=None, **variables):
    found = given or contract()
    content = {"contract": found.digest, "variables": {**NUMBERS, **variables}}
    return Preprocessing.from_mapping(content, found, "preprocessing.yaml")


def encoded(folder, rows, coding="treatment", **variables):
    raw = table_of(folder, "\n".join(["patient,age,glucose,sex,admitted,died", *rows]))
    inputs = ModelInputs(contract=contract(), preprocessing=agreed(**variables), coding=coding)
    return inputs.names, inputs.encode(accepted_table(raw, contract(), site()))


def test_numbers_are_scaled_gaps_filled_and_categories_coded(tmp_path):
    names, rows = encoded(tmp_path, ["a,70,5,F,2019-04-14,0", "b,,,M,,1"])

    assert names == ("age", "glucose", "glucose.absent", "sexmale", "admitted")
    assert rows.tolist() == [[1.0, -0.5, 0.0, 0.0, 0.0], [0.1, -0.5, 0.0, 1.0, 5.0]]


def test_a_missing_category_takes_the_agreed_one(tmp_path):
    _, rows = encoded(tmp_path, ["a,70,5,,2019-04-14,0", "b,70,5,F,2019-04-14,0"], sex={"missing": "male"})

    assert rows[:, 3].tolist() == [1.0, 0.0]


def test_one_hot_coding_has_a_column_for_each_category(tmp_path):
    names, rows = encoded(tmp_path, ["a,70,5,F,2019-04-14,0", "b,70,5,M,2019-04-14,0"], coding="one-hot")

    assert names[3:5] == ("sexfemale", "sexmale")
    assert rows[:, 3:5].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_columns_of_categories_are_scaled_where_that_is_agreed(tmp_path):
    levels = {"male": {"centre": 0.25, "scale": 0.5}}
    _, rows = encoded(tmp_path, ["a,70,5,F,2019-04-14,0", "b,70,5,M,2019-04-14,0"], sex={"missing": "male", "levels": levels})

    assert rows[:, 3].tolist() == [-0.5, 1.5]


def test_a_site_without_a_variable_has_the_contracts_value_and_its_indicator(tmp_path):
    raw = table_of(tmp_path, "patient,age,sex,admitted,died\na,70,F,2019-04-14,0", own=(own := site(absent=["glucose"], units={})))
    rows = ModelInputs(contract=contract(), preprocessing=agreed()).encode(accepted_table(raw, contract(), own))

    assert rows[:, 1:3].tolist() == [[0.0, 1.0]]


def test_the_digest_is_that_of_the_meaning():
    one, other = agreed(), agreed(age={"missing": 61.0, "scale": 10.0, "centre": 60.0})

    assert one.digest == other.digest
    assert one.digest != agreed(age={"centre": 60.5, "scale": 10.0, "missing": 61.0}).digest
    assert Preprocessing.from_mapping(one.as_dict(), contract(), "again") == one


@pytest.mark.parametrize(
    ("name", "numbers", "said"),
    [
        ("age", {"centre": 60.0, "scale": 0.0}, "variables.age.scale = 0.0: must be > 0"),
        ("age", {"centre": 60.0, "scale": 1.0, "missing": 200.0}, "variables.age.missing = 200: outside of the contract's range"),
        ("age", {"centre": 60.0, "scale": 1.0, "missing": "old"}, "variables.age.missing = 'old': expected a number"),
        (
            "age",
            {"levels": {"old": {"centre": 0.0, "scale": 1.0}}},
            "variables.age.levels: age is of type integer; expected centre and scale",
        ),
        ("sex", {"centre": 1.0}, "variables.sex.centre: sex has categories; expected levels"),
        ("sex", {"missing": "other"}, "variables.sex.missing = 'other': expected one of female, male"),
        (
            "sex",
            {"levels": {"other": {"centre": 0.0, "scale": 1.0}}},
            "variables.sex.levels.other: no category; expected one of female, male",
        ),
        ("patient", {"centre": 1.0}, "variables.patient.centre: a variable of type id is no model input; leave it out"),
        ("agee", {}, "variables.agee: no variable of the contract; did you mean age? expected one of patient, age,"),
    ],
)
def test_wrong_numbers_are_findings(name, numbers, said):
    with pytest.raises(ConfigError) as error:
        agreed(**{name: numbers})

    assert any(finding.startswith(said) for finding in error.value.findings), error.value.findings


def test_numbers_of_another_contract_are_refused():
    with pytest.raises(ConfigError, match="agree on the numbers again: p2pfl data prepare"):
        Preprocessing.from_mapping(agreed().as_dict(), contract(name="another"), "preprocessing.yaml")


def test_inputs_without_numbers_are_refused():
    numbers = Preprocessing.from_mapping({"contract": contract().digest, "variables": {"age": {"centre": 1.0}}}, contract(), "p")

    with pytest.raises(ConfigError) as error:
        ModelInputs(contract=contract(), preprocessing=numbers).check("preprocessing.yaml")

    assert [finding.partition(" required")[0] for finding in error.value.findings] == [
        "variables.age: scale, missing",
        "variables.glucose: centre, scale, missing",
        "variables.sex: missing",
        "variables.admitted: centre, scale, missing",
    ]


def test_a_label_that_yaml_reads_as_a_number_is_asked_for_in_quotes():
    content = {"contract": contract().digest, "variables": {"sex": {"missing": "male", "levels": {1: {"centre": 0.0, "scale": 1.0}}}}}

    with pytest.raises(ConfigError, match=r"variables.sex.levels: the key 1: expected a text: write it in quotes"):
        Preprocessing.from_mapping(content, contract(), "preprocessing.yaml")


def test_inputs_are_finite_whatever_is_missing(tmp_path):
    _, rows = encoded(tmp_path, ["a,,,,,0", "b,70,5,M,2019-04-14,0"])

    assert np.isfinite(rows).all()
