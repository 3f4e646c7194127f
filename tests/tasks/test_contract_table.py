"""A table task is made of a data contract and the sites' own tables, and every fault is one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clinic_tables import CONTRACT, NAMES, contract, patients, preprocessing, write_clinics, write_csv

from p2pfl.errors import ConfigError
from p2pfl.tasks import hold_out, load_task, partition
from p2pfl.tasks.sites import Site
from p2pfl.yaml_files import dump_yaml


@pytest.fixture
def clinics(tmp_path):
    write_clinics(tmp_path)
    return tmp_path


def made(clinics, **said):
    agreed = said.pop("contract", CONTRACT)
    said = {"model": "logistic", "sites": [str(clinics / name / "site.yaml") for name in NAMES], **said}
    said.setdefault("preprocessing", preprocessing(contract(**{key: value for key, value in agreed.items() if key != "name"})))
    return load_task("table", contract=agreed, **said)


def refusal(clinics, **said):
    with pytest.raises(ConfigError) as error:
        made(clinics, **said)
    return str(error.value)


def test_inputs_are_those_of_the_contract_and_every_row_is_somewhere(clinics):
    task = made(clinics)
    sizes = {site.name: (len(site.train[0]), len(site.test[0])) for site in task.sites}

    assert sizes == dict.fromkeys(NAMES, (64, 16))
    assert task.sites[0].train[0].shape[1] == 5  # age, glucose, sex, two wards
    assert task.model()(task.sites[0].train[0]).shape == (64, 1)


def test_units_headers_and_signs_of_a_site_make_no_difference(clinics, tmp_path):
    """Bern writes commas, mg/dl and German headers."""
    write_csv(tmp_path / "plain.csv", patients("bern"))
    (tmp_path / "bern.yaml").write_text(dump_yaml({"table": {"file": "plain.csv", "units": {"glucose": "mmol/l"}}}))
    theirs = next(site for site in made(clinics).sites if site.name == "bern")
    plain = made(clinics, sites=[str(tmp_path / "bern.yaml")]).sites[0]

    torch.testing.assert_close(theirs.train[0], plain.train[0], atol=0.005, rtol=0)  # a digit of mg/dl
    assert torch.equal(theirs.train[1], plain.train[1])


def test_the_test_rows_follow_the_seed_and_the_name_and_never_the_order_of_rows(clinics):
    before = made(clinics, seed=1).sites[0]
    other = made(clinics, seed=2).sites[0]
    write_csv(clinics / "basel" / "table.csv", patients("basel")[::-1])
    after = made(clinics, seed=1).sites[0]

    assert set(before.test_patients) == set(after.test_patients) != set(other.test_patients)
    assert before.test_patients[::-1] == after.test_patients


def test_no_patient_is_trained_on_and_tested_on(clinics):
    agreed = {**CONTRACT, "rows": "several-per-patient"}
    rows = [{**row, "patient": f"p{place // 4}"} for place, row in enumerate(patients("basel"))]
    write_csv(clinics / "basel" / "table.csv", rows)
    site = made(clinics, contract=agreed, sites=[str(clinics / "basel" / "site.yaml")]).sites[0]
    held = hold_out(site, 0.25, seed=0)

    assert (len(site.train_patients), len(site.test_patients), site.num_test_patients) == (60, 20, 5)
    assert set(site.train_patients).isdisjoint(site.test_patients)
    assert set(held.train_patients).isdisjoint(held.test_patients)
    assert len(held.train_patients) == len(held.train[0]) < 60
    assert {*held.train_patients, *held.test_patients} == set(site.train_patients)


def test_rows_of_one_patient_are_not_shared_out_among_nodes(clinics):
    agreed = {**CONTRACT, "rows": "several-per-patient"}
    write_csv(clinics / "basel" / "table.csv", [{**row, "patient": f"p{place // 4}"} for place, row in enumerate(patients("basel"))])

    with pytest.raises(ConfigError, match="patients of task 'table' have several rows, which would part; leave nodes out"):
        partition(made(clinics, contract=agreed), 4, {"name": "iid"}, 0)


def test_a_variable_can_name_the_test_rows(clinics):
    variables = {**CONTRACT["variables"], "part": {"type": "category", "categories": ["train", "test"]}}
    rows = [{**row, "part": ["train", "test", ""][place % 3]} for place, row in enumerate(patients("basel"))]
    write_csv(clinics / "basel" / "table.csv", rows)
    said = {"contract": {**CONTRACT, "variables": variables}, "sites": [str(clinics / "basel" / "site.yaml")]}
    site = made(clinics, **said, test={"variable": "part", "label": "test"}).sites[0]

    assert (len(site.train[0]), len(site.test[0])) == (27, 27)
    assert set(site.test_patients) == {f"basel-{place}" for place in range(1, 80, 3)}


def test_rows_without_an_outcome_are_left_out(clinics):
    rows = [{**row, "died": "" if place < 20 else row["died"]} for place, row in enumerate(patients("basel"))]
    write_csv(clinics / "basel" / "table.csv", rows)
    site = made(clinics, sites=[str(clinics / "basel" / "site.yaml")]).sites[0]

    assert len(site.train[0]) + len(site.test[0]) == 60


def test_a_folder_of_tables_is_sites_too(clinics, tmp_path):
    (tmp_path / "tables").mkdir()
    for name in NAMES:
        rows = [{key: value for key, value in row.items() if key != "glucose"} for row in patients(name)]
        write_csv(tmp_path / "tables" / f"{name}.csv", rows)
    variables = {key: value for key, value in CONTRACT["variables"].items() if key != "glucose"}
    agreed = {**CONTRACT, "variables": variables, "inputs": ["age", "sex"]}
    numbers = {key: value for key, value in preprocessing()["variables"].items() if key in ("age", "sex")}
    given = {"contract": contract(variables=variables, inputs=["age", "sex"]).digest, "variables": numbers}
    task = made(clinics, contract=agreed, preprocessing=given, sites=str(tmp_path / "tables"))

    assert [site.name for site in task.sites] == list(NAMES)


def test_groups_have_labels_and_missing_is_one(clinics):
    site = made(clinics, groups=["ward", "sex"]).sites[0]

    assert set(site.groups["ward"]) <= {"east", "north", "west", "missing"}
    assert len(site.groups["sex"]) == len(site.test[0])


@pytest.mark.parametrize(
    ("model", "outcome", "outputs"), [("mlp", "died", 1), ("linear", "days", 1), ("mlp", "days", 1), ("logistic", "ward", 3)]
)
def test_models_fit_the_kind_of_outcome(clinics, model, outcome, outputs):
    agreed = {**CONTRACT, "inputs": ["age", "glucose", "sex"]}
    task = made(clinics, contract=agreed, model=model, outcome=outcome)
    inputs, targets = task.sites[0].train
    found = task.model()(inputs)

    assert found.shape == (len(inputs), outputs)
    assert torch.isfinite(task.loss(found, targets))
    assert all(np.isfinite(metric(found.detach(), targets)) for metric in task.metrics.values())


def test_a_number_is_predicted_in_its_own_unit(clinics):
    """Of a model of zeros, which says the agreed centre of everybody."""
    task = made(clinics, model="linear", outcome="days")
    inputs, targets = task.sites[0].train
    model = task.model()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    outputs = model(inputs).detach()
    errors = outputs - targets

    assert set(outputs.reshape(-1).tolist()) == {100.0}
    assert task.metrics["mae"](outputs, targets) == pytest.approx(float(errors.abs().mean()), rel=1e-6)
    assert task.metrics["rmse"](outputs, targets) == pytest.approx(float((errors**2).mean().sqrt()), rel=1e-6)
    assert task.metrics["r2"](outputs, targets) == pytest.approx(
        1 - float((errors**2).sum() / ((targets - targets.mean()) ** 2).sum()), rel=1e-5
    )
    assert float(task.loss(outputs, targets)) == pytest.approx(float((errors / 50).square().mean()), rel=1e-6)
    assert set(task.lower_is_better) == {"mae", "rmse"}


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"model": "cox"}, "task.outcome: required, as the contract's outcome is died: cox takes a time and an event"),
        ({"model": "forest"}, "task.model = 'forest': one of logistic, linear, mlp"),
        ({"outcome": "dies"}, "task.outcome = 'dies': no variable of the contract; did you mean"),
        ({"outcome": "age"}, "task.outcome = 'age': it is one of the contract's inputs as well"),
        ({"outcome": "days"}, "task.outcome = 'days': logistic predicts classes, and the variable is of type number"),
        ({"model": "linear", "outcome": "patient"}, "task.outcome = 'patient': linear predicts a number, and the variable is of type id"),
        ({"preprocessing": None}, "task.preprocessing: required, but missing: agree on the numbers for gaps and scales first"),
        ({"coding": "hot"}, "task.coding = 'hot': one of treatment, one-hot"),
        ({"hidden": [3]}, "task.hidden = [3]: only an mlp has hidden layers"),
        ({"model": "mlp", "hidden": []}, "task.hidden = []: expected a list of widths"),
        ({"model": "mlp", "hidden": [0]}, "task.hidden = [0]: expected whole numbers from 1"),
        ({"test": 1.0}, "task.test = 1.0: expected a fraction from 0 to below 1"),
        ({"test": {"variable": "age", "label": "x"}}, "task.test.variable = 'age': no variable with categories"),
        ({"test": {"variable": "sex", "label": "x"}}, "task.test.label = 'x': expected one of female, male"),
        ({"test": {"variable": "sex", "label": "male"}}, "task.test.variable = 'sex': it is a model input as well"),
        ({"test": {"variable": "sex"}}, "task.test.label: required, but missing"),
        ({"groups": ["age"]}, "task.groups has 'age': no variable with categories"),
        ({"groups": "sex"}, "task.groups = 'sex': expected a list"),
        ({"sites": []}, "task.sites = []: expected a list of site files"),
        ({"sites": ["notes.txt"]}, "task.sites: notes.txt: expected a site's file (.yaml), or a table"),
        ({"sites": ["nowhere/site.yaml"]}, "nowhere/site.yaml: no such file"),
        ({"contract": {**CONTRACT, "inputs": []}}, "inputs: the contract names no variable that a model takes"),
        ({"contract": {**CONTRACT, "outcome": ["days", "died"]}}, "task.outcome: required, as the contract's outcome is days and died"),
    ],
)
def test_what_cannot_be_is_one_sentence(clinics, said, sentence):
    assert sentence in refusal(clinics, **said)


def test_all_sites_are_looked_at_before_anything_is_refused(clinics):
    for name in ("basel", "genf"):
        write_csv(clinics / name / "table.csv", [{**row, "sex": "X"} for row in patients(name)])
    said = refusal(clinics)

    assert "basel/table.csv: sex: a text that is no category's code: 80 rows, refused" in said
    assert "genf/table.csv: sex: a text that is no category's code: 80 rows, refused" in said


def test_two_sites_of_one_name_are_refused(clinics):
    assert "are both of a site basel; say member: NAME in the files" in refusal(clinics, sites=[str(clinics / "basel" / "site.yaml")] * 2)


def test_a_linear_model_without_a_scale_of_its_outcome_is_refused(clinics):
    numbers = preprocessing()
    del numbers["variables"]["days"]

    assert "task.preprocessing: no centre and scale of the outcome days" in refusal(
        clinics, model="linear", outcome="days", preprocessing=numbers
    )


def test_new_rows_are_read_with_their_texts_and_without_an_outcome(clinics, tmp_path):
    rows = [{key: row[key] for key in ("patient", "age", "glucose", "sex", "ward")} for row in patients("basel")[:3]]
    rows[0] |= {"glucose": "", "ward": "unknown"}
    write_csv(tmp_path / "new.csv", rows)
    (tmp_path / "new.yaml").write_text(dump_yaml({"table": {"file": "new.csv", "units": {"glucose": "mmol/l", "days": "day"}}}))
    task = made(clinics, sites=None)
    found = task.read(tmp_path / "new.yaml")

    assert task.sites == []
    assert found.shape == (3, 5)
    assert found[0].tolist() == pytest.approx([(float(rows[0]["age"]) - 60) / 12, -0.25, float(rows[0]["sex"] == "M"), 0, 0])


def test_one_new_patient_without_a_value_is_read(clinics, tmp_path):
    write_csv(tmp_path / "new.csv", [{"patient": "x", "age": "", "glucose": "", "sex": "", "ward": ""}])
    (tmp_path / "new.yaml").write_text(dump_yaml({"table": {"file": "new.csv", "units": {"glucose": "mmol/l"}}}))

    assert made(clinics, sites=None).read(tmp_path / "new.yaml")[0].tolist() == pytest.approx([1 / 12, -0.25, 1, 1, 0])


def test_new_rows_that_break_the_contract_are_refused_without_a_value(clinics, tmp_path):
    write_csv(tmp_path / "new.csv", [{"patient": "x", "age": "180", "glucose": "5", "sex": "other", "ward": "east"}])
    (tmp_path / "new.yaml").write_text(dump_yaml({"table": {"file": "new.csv", "units": {"glucose": "mmol/l"}}}))

    with pytest.raises(ConfigError) as error:
        made(clinics, sites=None).read(tmp_path / "new.yaml")

    assert sorted(finding.partition(":")[0] for finding in error.value.findings) == ["age", "sex"]
    assert "180" not in str(error.value)
    assert "other" not in str(error.value)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_site_has_an_id_for_each_row_or_none(part):
    rows = torch.zeros(3, 1), torch.zeros(3, 1)

    with pytest.raises(ConfigError, match=f"{part}_patients has 2 ids: expected one for each of the 3 rows of {part}"):
        Site(name="a", train=rows, test=rows, **{f"{part}_patients": ["x", "y"]})
