"""Agreed numbers follow from a description: its means, its quartiles where the means are hidden, and the most common category."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

from p2pfl.analyses.agreed_preprocessing import IQR_OF_NORMAL, Wanted, agreed_preprocessing
from p2pfl.analyses.run import run_analysis
from p2pfl.analyses.site_files import AnalysisSite
from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError

CONTENT = {
    "name": "registry",
    "patient": "patient",
    "outcome": "days",
    "inputs": ["age", "glucose", "ward", "admitted"],
    "variables": {
        "patient": {"type": "id"},
        "age": {"type": "integer", "unit": "year", "range": [18, 110]},
        "glucose": {"type": "number", "unit": "mmol/l", "range": [1, 60], "absent": "value", "absent_value": 6},
        "ward": {"type": "category", "categories": ["east", "north", "west"]},
        "admitted": {"type": "date", "range": ["2015-01-01", "2026-12-31"]},
        "days": {"type": "number", "unit": "day", "range": [0, 400]},
        "part": {"type": "category", "categories": ["train", "test", "later"]},
    },
}
CONTRACT = Contract.from_mapping(CONTENT, "contract.yaml")
WANTED = Wanted(contract=CONTRACT, outcome="days")


def drawn(seed, num_rows=60):
    rng = np.random.default_rng(seed)
    columns = {
        "patient": tuple(f"p{place}" for place in range(num_rows)),
        "age": rng.integers(30, 90, num_rows).astype(float),
        "glucose": np.where(np.arange(num_rows) % 6 == 0, np.nan, rng.uniform(4, 12, num_rows)),
        "ward": tuple(["north", "west", "west", "east", "west", ""][place % 6] for place in range(num_rows)),
        "admitted": rng.integers(17_000, 19_000, num_rows).astype(float),
        "days": rng.uniform(0, 300, num_rows),
        "part": tuple(["train", "test", "train", "later"][place % 4] for place in range(num_rows)),
    }
    return CheckedTable(columns=columns, levels=CONTRACT.levels, patients=columns["patient"], lines=tuple(range(num_rows)))


TABLES = {name: drawn(seed) for seed, name in enumerate(("basel", "bern", "genf"))}


def described(wanted, tables=TABLES):
    sites = [AnalysisSite(name=name, table=table) for name, table in tables.items()]
    return run_analysis(wanted.analysis, CONTRACT, sites).as_dict()


def pooled(name, rows=slice(None)):
    return np.concatenate([np.array(table.columns[name])[rows] for table in TABLES.values()])


def test_numbers_are_those_of_the_pooled_rows():
    agreed = agreed_preprocessing(WANTED, described(WANTED), "result").variables

    for name in ("age", "glucose", "days"):
        values = pooled(name)
        assert agreed[name].centre == pytest.approx(np.nanmean(values), rel=1e-12)
        assert agreed[name].scale == pytest.approx(np.nanstd(values, ddof=1), rel=1e-12)
    assert agreed["admitted"].centre == round(pooled("admitted").mean())
    assert (agreed["age"].missing, agreed["glucose"].missing, agreed["days"].missing) == (agreed["age"].centre, 6.0, None)
    assert (agreed["ward"].missing, agreed["ward"].levels) == ("west", {})


def test_columns_of_categories_are_scaled_where_it_is_asked_for():
    wanted = Wanted(contract=CONTRACT, outcome="days", scales_categories=True)
    agreed = agreed_preprocessing(wanted, described(wanted), "result").variables["ward"]
    there = pooled("ward")[pooled("ward") != ""]

    for label in ("east", "north", "west"):
        column = (there == label) * 1.0
        assert agreed.levels[label].centre == pytest.approx(column.mean(), rel=1e-12)
        assert agreed.levels[label].scale == pytest.approx(column.std(ddof=1), rel=1e-12)


def test_test_rows_count_for_nothing_where_a_variable_names_them():
    wanted = Wanted(contract=CONTRACT, outcome="days", by="part", test_label="test")
    agreed = agreed_preprocessing(wanted, described(wanted), "result").variables
    trained = np.concatenate([pooled("age", np.array(table.columns["part"]) != "test") for table in (TABLES["basel"],)])

    assert agreed["age"].centre == pytest.approx(trained.mean(), rel=1e-12)
    assert agreed["age"].scale == pytest.approx(trained.std(ddof=1), rel=1e-12)


def changed(result, name, **keys):
    found = copy.deepcopy(result)
    for each in found["variables"]:
        if each["name"] == name:
            each.update(keys)
    return found


def test_hidden_means_give_way_to_quartiles():
    result = changed(described(WANTED), "age", mean=None, sd=None, values=None, q25=50.0, q50=60.0, q75=72.0)
    agreed = agreed_preprocessing(WANTED, result, "result").variables["age"]

    assert (agreed.centre, agreed.missing) == (60.0, 60.0)
    assert agreed.scale == pytest.approx(22 / IQR_OF_NORMAL)


def test_of_hidden_counts_the_largest_shown_one_or_the_reference_fills_gaps():
    result = described(WANTED)
    some = changed(result, "ward", counts={"east": 4000, "north": None, "west": 20})
    none = changed(result, "ward", counts={"east": None, "north": None, "west": None})

    assert agreed_preprocessing(WANTED, some, "result").variables["ward"].missing == "east"
    assert agreed_preprocessing(WANTED, none, "result").variables["ward"].missing == "east"


def test_values_that_are_all_alike_are_only_centred():
    result = changed(described(WANTED), "age", mean=60.0, sd=0.0)

    assert agreed_preprocessing(WANTED, result, "result").variables["age"].scale == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda result: {}, "is no result of a description"),
        (lambda result: {**result, "analysis": {"kind": "glm"}}, "is no result of a description"),
        (lambda result: {**result, "analysis": {"kind": "describe", "by": "ward"}}, "analysis.by = 'ward': expected none"),
        (lambda result: {**result, "variables": ["age"]}, "variables: 'age': expected a mapping with a name"),
        (lambda result: {**result, "variables": result["variables"][1:]}, "variables: age not described, and the model needs them"),
        (lambda result: changed(result, "age", mean=None, sd=None, q25=None), "age: neither mean nor quartiles are shown"),
        (lambda result: changed(result, "age", mean="many"), "age: the description cannot be read"),
        (lambda result: changed(result, "age", mean=math.inf), "age: the description cannot be read"),
    ],
)
def test_what_is_no_description_of_the_inputs_is_refused(change, said):
    with pytest.raises(ConfigError) as error:
        agreed_preprocessing(WANTED, change(described(WANTED)), "result")

    assert any(finding.startswith(said) for finding in error.value.findings), error.value.findings


def test_hidden_categories_are_not_scaled():
    wanted = Wanted(contract=CONTRACT, outcome="days", scales_categories=True)
    result = changed(described(wanted), "ward", counts={"east": 40, "north": None, "west": 20})

    with pytest.raises(ConfigError, match="ward: not all categories are shown"):
        agreed_preprocessing(wanted, result, "result")
