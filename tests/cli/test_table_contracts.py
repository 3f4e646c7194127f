"""A study's contract, that of its table task, and rows that a member has frozen: one contract, and training on exactly those rows."""

from __future__ import annotations

import json

import pytest
from clinic_tables import NAMES, contract, write_clinics

from commands import run_here
from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import load_study
from p2pfl.node.doctor.examination import Examination, Fact, Finding
from p2pfl.node.doctor.table import check_table
from p2pfl.node.site import SiteFile
from p2pfl.node.start import own_plan, start
from p2pfl.yaml_files import dump_yaml, load_yaml

AGES = {"kind": "describe", "variables": ["age"]}


@pytest.fixture
def p2pfl(monkeypatch, capfd):
    def run(*arguments, code=0):
        found, out, err = run_here(*arguments, monkeypatch=monkeypatch, capfd=capfd)
        assert found == code, err
        return out if code == 0 else err

    return run


@pytest.fixture
def clinics(tmp_path, p2pfl):
    """Three members with keys and tables, whose experiment is a table task; basel has frozen its rows, as its card says."""
    p2pfl("data", "prepare", write_clinics(tmp_path))
    for place, name in enumerate(NAMES):
        p2pfl("keys", "new", "--name", name, "--out", tmp_path / name / "keys", "--address", f"tcp://127.0.0.1:{7700 + place}")
    site, keys = tmp_path / "basel" / "site.yaml", tmp_path / "basel" / "keys"
    p2pfl("data", "freeze", site, "--contract", tmp_path / "contract.yaml")
    p2pfl("keys", "card", "--cohort", site, "--keys", keys)
    (tmp_path / "ages.yaml").write_text(dump_yaml(AGES))
    (tmp_path / "other.yaml").write_text(dump_yaml({**load_yaml(tmp_path / "contract.yaml"), "name": "another"}))
    return tmp_path


def new_study(clinics, p2pfl, *more, code=0):
    cards = [option for name in NAMES for option in ("--card", clinics / name / "keys" / "card.yaml")]
    (clinics / "study.yaml").unlink(missing_ok=True)
    return p2pfl("study", "new", clinics / "stroke.yaml", *cards, "--out", clinics / "study.yaml", "--json", *more, code=code)


def joined(clinics, p2pfl, *more):
    """Site file of basel in a new study."""
    digest = json.loads(new_study(clinics, p2pfl, *more))["digest"]
    path = clinics / "basel" / "node.yaml"
    p2pfl("study", "join", clinics / "study.yaml", "--keys", clinics / "basel" / "keys", "--confirm", digest, "--out", path)
    path.write_text(dump_yaml({**load_yaml(path), "table": load_yaml(clinics / "basel" / "site.yaml")["table"]}))
    return path


def plan_of(path):
    site = SiteFile.load(path)
    return own_plan(site, load_study(site.study), path, ())


def change(clinics, changed):
    path = clinics / "basel" / "table.csv"
    path.write_text("".join(changed(path.read_text().splitlines(keepends=True))))


def test_an_analysis_is_about_the_contract_of_the_table_task(clinics, p2pfl):
    new_study(clinics, p2pfl, "--analysis", clinics / "ages.yaml")
    study = load_study(clinics / "study.yaml")

    assert study.contract == study.experiment["task"]["contract"] == contract().as_dict()
    assert list(study.analyses) == ["ages"]
    new_study(clinics, p2pfl)
    assert load_study(clinics / "study.yaml").contract is None  # a study of a table task alone keeps its digest
    new_study(clinics, p2pfl, "--contract", clinics / "contract.yaml", "--analysis", clinics / "ages.yaml")
    assert load_study(clinics / "study.yaml").contract == study.contract


def test_two_contracts_in_one_study_are_refused(clinics, p2pfl, monkeypatch):
    monkeypatch.chdir(clinics)
    p2pfl("keys", "card", "--no-cohort", "--keys", clinics / "basel" / "keys")
    joined(clinics, p2pfl, "--contract", clinics / "contract.yaml")
    study = load_yaml(clinics / "study.yaml")
    (clinics / "study.yaml").write_text(dump_yaml({**study, "contract": {**study["contract"], "name": "another"}}))
    by_hand = p2pfl("study", "show", clinics / "study.yaml", code=2)
    said = new_study(clinics, p2pfl, "--contract", "other.yaml", code=2)

    assert said.count("\n") == 1
    assert (
        "--contract = 'other.yaml': another contract than that of the experiment's table task, stroke-registry; a study has one contract"
        in said
    )
    assert "contract: another one than experiment.task.contract; a study has one contract" in by_hand


def test_a_member_who_froze_under_another_contract_is_found_without_a_contract_in_the_study(clinics, p2pfl):
    for file in ("cohort.json", "keys/cohort.key"):
        (clinics / "basel" / file).unlink()
    site = clinics / "basel" / "site.yaml"
    p2pfl("data", "freeze", site, "--contract", clinics / "other.yaml")
    p2pfl("keys", "card", "--cohort", site, "--keys", clinics / "basel" / "keys")

    assert "basel has frozen its rows under another data contract than this study's" in new_study(clinics, p2pfl, code=2)


@pytest.mark.parametrize("options", [(), ("--contract", "contract.yaml")])
def test_a_node_trains_on_exactly_the_frozen_rows(clinics, p2pfl, options, monkeypatch):
    monkeypatch.chdir(clinics)
    path = joined(clinics, p2pfl, *options)
    (before,) = plan_of(path).task.sites
    change(clinics, lambda lines: [*lines, *(line.replace("basel-", "later-") for line in lines[1:])])
    (after,) = plan_of(path).task.sites

    assert after.train_patients == before.train_patients
    assert all(one.equal(other) for one, other in zip(before.train, after.train, strict=True))
    assert len(before.train_patients) + len(before.test_patients) <= 80


def notes_of(path):
    site = SiteFile.load(path)
    return list(check_table(Examination(path=path, site=site, study=load_study(site.study))))


@pytest.mark.parametrize("options", [(), ("--contract", "contract.yaml")])
def test_a_node_refuses_frozen_rows_that_changed_or_are_forgotten(clinics, p2pfl, options, monkeypatch):
    monkeypatch.chdir(clinics)
    path = joined(clinics, p2pfl, *options)
    assert [type(each) for each in notes_of(path)] == [Fact]
    change(clinics, lambda lines: lines[:-1])
    changed = "of 80 frozen rows 1 has gone"
    forgotten = "no such file, and the card of basel is bound to 80 frozen rows"
    for said in (changed, forgotten):
        if said is forgotten:
            (clinics / "basel" / "cohort.json").unlink()
        with pytest.raises(ConfigError, match=said) as refused:
            start(path, start_within_s=0.05)
        (finding,) = notes_of(path)

        assert len(refused.value.findings) == 1
        assert isinstance(finding, Finding)
        assert said in finding.fault
    assert not (clinics / "basel" / "state" / "run").exists()


def test_a_member_cannot_train_on_a_contract_of_its_own(clinics, p2pfl):
    path = joined(clinics, p2pfl)
    path.write_text(dump_yaml({**load_yaml(path), "task": {"contract": "other.yaml"}}))

    assert "task.contract = 'other.yaml': all members have agreed on it in the study: leave it out here" in p2pfl(
        "node", "start", path, code=2
    )
