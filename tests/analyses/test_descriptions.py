"""Descriptions over sites: figures of the pooled values, and no count of a few patients, shown or derivable."""

from __future__ import annotations

import numpy as np
import pytest
from study_tables import changed, integer, made, write_study

from p2pfl.analyses import stats
from p2pfl.statistics.describe import MOST_CELLS


def described(study, folder, *names, **floors):
    contract, sites = write_study(folder, study)
    found = stats.describe(names, contract=contract, sites=sites, **floors)
    return {each.name: each.as_dict() for each in found.variables}, found


def test_figures_are_those_of_the_pooled_values(tmp_path):
    study = changed(made(600), age=lambda row, place: "" if place % 30 == 0 else row["age"])
    found, _ = described(study, tmp_path)

    ages = np.array([float(row["age"]) for row in study[2] if row["age"]])
    assert (found["age"]["values"], found["age"]["missing"]) == (580, 20)
    assert (found["age"]["mean"], found["age"]["sd"]) == pytest.approx((ages.mean(), ages.std(ddof=1)), rel=1e-13)
    cell = (110 - 18) / MOST_CELLS
    assert [found["age"][f"q{100 * each:g}"] for each in (0.25, 0.5, 0.75)] == pytest.approx(
        np.quantile(ages, [0.25, 0.5, 0.75]), abs=2 * cell
    )
    assert found["sex"]["counts"] == {label: sum(row["sex"] == label for row in study[2]) for label in ("female", "male")}
    assert found["died"]["counts"].keys() == {"0", "1"}
    assert found["seen"]["mean"].startswith("2023-")
    assert "min" not in found["age"]


@pytest.mark.parametrize("num_missing", [1, 4])
def test_few_missing_values_are_not_shown_and_do_not_follow_from_the_rest(num_missing, tmp_path):
    study = changed(
        made(), **{name: lambda row, place, name=name: "" if place < num_missing else row[name] for name in ("age", "stage", "died")}
    )
    found, result = described(study, tmp_path, "age", "stage", "died", "dose")

    assert (found["age"]["values"], found["age"]["missing"]) == (None, None)
    for name in ("stage", "died"):
        assert (found[name]["values"], found[name]["missing"]) == (None, None)
        assert list(found[name]["counts"].values()).count(None) == 1
    assert (found["dose"]["values"], found["dose"]["missing"]) == (240, 0)
    assert f"{240 - num_missing}" not in result.summary()


def test_a_small_category_is_hidden_with_another_one(tmp_path):
    study = changed(made(), stage=lambda row, place: "three" if place < 3 else ("one", "two")[place % 2])
    found, _ = described(study, tmp_path, "stage")

    hidden = [label for label, number in found["stage"]["counts"].items() if number is None]
    assert "three" in hidden
    assert len(hidden) == 2


def test_a_variable_of_few_patients_is_not_described(tmp_path):
    study = changed(
        made(), dose=lambda row, place: row["dose"] if place < 9 else "", stage=lambda row, place: row["stage"] if place < 9 else ""
    )
    found, result = described(study, tmp_path, "dose", "stage")

    assert {key: value for key, value in found["dose"].items() if value is not None} == {"name": "dose", "unit": "1"}
    assert found["stage"]["counts"] == dict.fromkeys(("one", "two", "three"))
    assert [line.split() for line in result.summary().splitlines() if line.startswith("dose")] == [["dose", "<10", *"--------"]]


def test_an_event_of_few_patients_is_counted_as_a_category_and_has_no_mean(tmp_path):
    found, _ = described(changed(made(), died=lambda row, place: str(int(place < 2))), tmp_path, "died")

    assert found["died"]["counts"] == {"0": None, "1": None}
    assert "mean" not in found["died"]


def test_whole_numbers_have_quantiles_near_their_own(tmp_path):
    variables, outcome, rows = made(900)
    found, _ = described(({**variables, "visits": integer(0, 40)}, outcome, rows), tmp_path, "visits")

    visits = np.array([float(row["visits"]) for row in rows])
    assert [found["visits"][f"q{100 * each:g}"] for each in (0.05, 0.5, 0.95)] == pytest.approx(
        np.quantile(visits, [0.05, 0.5, 0.95]), abs=1
    )
