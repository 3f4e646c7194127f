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


def test_a_quantile_of_whole_numbers_is_one_that_they_can_have(tmp_path):
    variables, outcome, rows = changed(made(900), visits=lambda row, place: "40" if place % 3 else "0")
    found, _ = described(({**variables, "visits": integer(0, 40)}, outcome, rows), tmp_path, "visits")

    assert (found["visits"]["q5"], found["visits"]["q95"]) == (0, 40)


def test_groups_are_described_apart_and_categories_as_a_cross_table(tmp_path):
    study = changed(made(600), dose=lambda row, place: "" if place % 20 == 0 else row["dose"])
    contract, sites = write_study(tmp_path, study)
    found = [each.as_dict() for each in stats.describe(["dose", "stage"], by="sex", contract=contract, sites=sites).variables]

    for each in found:
        own = [row for row in study[2] if row["sex"] == each["group"]]
        if each["name"] == "stage":
            assert each["counts"] == {label: sum(row["stage"] == label for row in own) for label in ("one", "two", "three")}
            continue
        doses = np.array([float(row["dose"]) for row in own if row["dose"]])
        assert (each["values"], each["missing"]) == (len(doses), len(own) - len(doses))
        assert (each["mean"], each["sd"]) == pytest.approx((doses.mean(), doses.std(ddof=1)), rel=1e-12)
    assert [(each["name"], each["group"]) for each in found] == [
        ("dose", "female"), ("dose", "male"), ("stage", "female"), ("stage", "male"),
    ]  # fmt: skip


def test_a_small_cell_of_a_cross_table_is_hidden_in_its_row_and_its_column(tmp_path):
    study = changed(made(), stage=lambda row, place: "three" if place % 60 == 0 or row["sex"] == "male" else ("one", "two")[place % 2])
    contract, sites = write_study(tmp_path, study)
    result = stats.describe(["stage"], by="sex", contract=contract, sites=sites)
    found = {each.group: each.counts for each in result.variables}
    true = {sex: {label: sum((row["sex"], row["stage"]) == (sex, label) for row in study[2]) for label in found[sex]} for sex in found}

    small = [(sex, label) for sex in true for label, number in true[sex].items() if 0 < number < 5]
    assert small
    for sex, label in small:
        assert found[sex][label] is None
        assert list(found[sex].values()).count(None) >= 2
        assert [found[other][label] for other in found] == [None, None]


def test_a_group_of_few_patients_is_not_described(tmp_path):
    study = changed(made(), sex=lambda row, place: "male" if place < 8 else "female")
    contract, sites = write_study(tmp_path, study)
    found = stats.describe(["age", "died"], by="sex", contract=contract, sites=sites)

    assert [each.description is None for each in found.variables if each.name == "age"] == [False, True]
    assert [set(each.counts.values()) for each in found.variables if each.name == "died"][1] == {None}
    assert "age, male" in found.summary()
