"""`p2pfl data prepare`, and the way from a contract to a prediction with four commands and no Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from clinic_tables import NAMES, patients, write_clinics, write_csv

from commands import run_here
from p2pfl.data.contract import Contract
from p2pfl.data.preprocessing import Preprocessing
from p2pfl.experiment.loading import load_experiment, load_study
from p2pfl.governance.study import Study
from p2pfl.simulator import simulate
from p2pfl.yaml_files import dump_yaml, load_yaml


@pytest.fixture
def clinics(tmp_path):
    return write_clinics(tmp_path)


@pytest.fixture
def p2pfl(monkeypatch, capfd):
    return lambda *arguments: run_here(*arguments, monkeypatch=monkeypatch, capfd=capfd)


def numbers(experiment):
    place = experiment.parent / "preprocessing.yaml"
    return Preprocessing.load(place, Contract.load(experiment.parent / "contract.yaml"))


def test_the_numbers_of_simulated_sites_are_those_of_the_pooled_rows(clinics, p2pfl):
    code, out, err = p2pfl("data", "prepare", clinics)
    ages = [float(row["age"]) for name in NAMES for row in patients(name)]
    agreed = numbers(clinics).variables

    assert (code, err) == (0, "")
    assert agreed["age"].centre == pytest.approx(np.mean(ages), rel=1e-12)
    assert agreed["age"].scale == pytest.approx(np.std(ages, ddof=1), rel=1e-12)
    assert set(agreed) == {"age", "glucose", "sex", "ward"}
    assert out.startswith(f"age      centre {np.mean(ages):.6g} year, scale ")
    assert "public: a study holds these numbers" in out


def test_a_description_of_institutions_gives_the_same_numbers(clinics, p2pfl, tmp_path):
    p2pfl("data", "prepare", clinics)
    sites = [tmp_path / name / "site.yaml" for name in NAMES]
    _, described, _ = p2pfl("stats", "describe", *sites, "--contract", tmp_path / "contract.yaml", "--json")
    (tmp_path / "described.json").write_text(described)
    code, printed, _ = p2pfl("data", "prepare", clinics, "--from", tmp_path / "described.json", "--out", tmp_path / "other.yaml", "--json")

    assert code == 0
    assert json.loads(printed)["digest"] == numbers(clinics).digest
    assert load_yaml(tmp_path / "other.yaml") == load_yaml(tmp_path / "preprocessing.yaml")


def test_agreed_numbers_are_never_written_over(clinics, p2pfl):
    p2pfl("data", "prepare", clinics)
    before = (clinics.parent / "preprocessing.yaml").read_bytes()
    code, _, err = p2pfl("data", "prepare", clinics)

    assert code == 2
    assert "it exists already, and may be agreed on" in err
    assert (clinics.parent / "preprocessing.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"name": "digits"}, [], "only task: {name: table, ...} has agreed numbers"),
        ({"sites": None}, [], "task.sites: required, the files of the sites to simulate; institutions give the result"),
        ({"contract": None}, [], "task.contract: required, the data contract's file"),
        ({"model": "cox"}, [], "cox takes a time and an event, such as outcome: [days, died]"),
        ({}, ["--scale", "some"], "--scale = 'some': one of numbers, all"),
        ({}, ["--from", "contract.yaml"], "is not JSON"),
        ({}, ["--from", "list.json"], "is no result of an analysis"),
    ],
)
def test_what_cannot_be_prepared_is_one_sentence_and_no_file(clinics, p2pfl, monkeypatch, change, options, said):
    content = load_yaml(clinics)
    clinics.write_text(dump_yaml({**content, "task": {**content["task"], **change}}))
    monkeypatch.chdir(clinics.parent)
    Path("list.json").write_text("[1]")
    code, _, err = p2pfl("data", "prepare", clinics.name, *options)

    assert code == 2
    assert said in err
    assert not Path("preprocessing.yaml").exists()


def test_a_site_whose_policy_refuses_is_not_described(clinics, p2pfl):
    site = clinics.parent / "bern" / "site.yaml"
    site.write_text(dump_yaml({**load_yaml(site), "policy": {"variables": ["age"]}}))
    code, _, err = p2pfl("data", "prepare", clinics)

    assert code == 2
    assert "bern: refused by policy" in err
    assert not (clinics.parent / "preprocessing.yaml").exists()


def test_an_experiment_before_the_numbers_are_agreed_on_says_what_to_do(clinics, p2pfl):
    code, _, err = p2pfl("simulate", clinics, "--dry-run")

    assert code == 2
    assert "preprocessing.yaml: no such file; p2pfl data prepare EXPERIMENT makes it" in err


def test_from_contract_to_prediction_without_python(clinics, p2pfl, tmp_path):
    p2pfl("data", "prepare", clinics)
    run = tmp_path / "run"
    code, out, _ = p2pfl("simulate", clinics, "--out", run)
    assert code == 0
    assert "basel" in out
    for name in NAMES:  # what a run needs for predictions is in its folder
        (tmp_path / name / "table.csv").rename(tmp_path / name / "gone.csv")
    for name in ("contract.yaml", "preprocessing.yaml"):
        (tmp_path / name).unlink()
    rows = [{key: row[key] for key in ("patient", "age", "glucose", "sex", "ward")} for row in patients("basel")[:4]]
    write_csv(tmp_path / "new.csv", rows)
    (tmp_path / "new.yaml").write_text(dump_yaml({"table": {"file": "new.csv", "units": {"glucose": "mmol/l"}}}))
    code, out, err = p2pfl("predict", run, tmp_path / "new.yaml", "--node", "bern")

    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 4
    assert all(0 < float(line) < 1 for line in out.splitlines())


def test_contract_and_numbers_are_part_of_the_experiment(clinics, p2pfl):
    p2pfl("data", "prepare", clinics)
    task = load_experiment(clinics).task.options

    assert Contract.from_mapping(task["contract"], "task").digest == Contract.load(clinics.parent / "contract.yaml").digest
    assert task["preprocessing"] == numbers(clinics).as_dict()
    assert task["sites"] == [str(clinics.parent / name / "site.yaml") for name in NAMES]


def test_an_experiment_without_sites_cannot_be_simulated(clinics, p2pfl):
    p2pfl("data", "prepare", clinics)
    code, _, err = p2pfl("simulate", clinics, "--set", "task.sites=null", "--dry-run")

    assert code == 2
    assert "task.sites: required, but missing: the files of the sites to simulate" in err


@pytest.mark.parametrize("key", ["site_file", "data"])
def test_no_experiment_names_a_nodes_own_file(clinics, p2pfl, key):
    p2pfl("data", "prepare", clinics)
    code, _, err = p2pfl("simulate", clinics, "--set", f"task.{key}=x.yaml", "--dry-run")

    assert code == 2
    assert f"task.{key} = 'x.yaml'" in err
    assert "table takes contract, model, preprocessing" in err


def test_a_study_holds_what_is_agreed_on_and_names_no_file(clinics, p2pfl, tmp_path):
    p2pfl("data", "prepare", clinics)
    for name in NAMES:
        p2pfl("keys", "new", "--name", name, "--out", tmp_path / name / "keys", "--address", f"tcp://127.0.0.1:{7700 + NAMES.index(name)}")
    cards = [option for name in NAMES for option in ("--card", tmp_path / name / "keys" / "card.yaml")]
    code, _, err = p2pfl("study", "new", clinics, *cards, "--out", tmp_path / "study.yaml")
    study = load_study(tmp_path / "study.yaml")

    assert (code, err) == (0, "")
    assert str(tmp_path) not in (tmp_path / "study.yaml").read_text()
    assert "sites" not in study.experiment["task"]
    assert [row.name for row in study.layout] == ["weight", "bias"]
    assert study.result_contract.task is None  # built in


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"contract": "contract.yaml"}, "experiment.task.contract = 'contract.yaml': a study holds it, and names no file"),
        ({"preprocessing": "/etc/passwd"}, "experiment.task.preprocessing = '/etc/passwd': a study holds it, and names no file"),
        ({"sites": ["a/site.yaml"]}, "experiment.task.sites: a study names no files of sites"),
    ],
)
def test_a_study_that_names_files_is_refused(clinics, p2pfl, tmp_path, change, said):
    test_a_study_holds_what_is_agreed_on_and_names_no_file(clinics, p2pfl, tmp_path)
    content = load_yaml(tmp_path / "study.yaml")
    content["experiment"]["task"].update(change)
    Study.from_mapping(content, "study").save(tmp_path / "other.yaml")
    code, _, err = p2pfl("study", "show", tmp_path / "other.yaml")

    assert code == 2
    assert said in err


def test_a_simulation_from_python_takes_the_same_files(clinics, p2pfl, monkeypatch, tmp_path):
    p2pfl("data", "prepare", clinics)
    monkeypatch.chdir(tmp_path)
    run = simulate({**load_yaml(clinics), "rounds": 1, "baselines": []}, out=tmp_path / "run")

    assert isinstance(run.experiment.task.options["contract"], dict)
    assert sorted(run.models) == list(NAMES)
