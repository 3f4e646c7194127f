"""Hospitals that agree on one scale: cards show means and deviations, the study holds those of all together, no rows change hands."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import p2pfl
from p2pfl.cli import app
from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import load_study
from p2pfl.governance.card import Card
from p2pfl.governance.identity import Identity
from p2pfl.node.start import start
from p2pfl.tasks import load_task
from p2pfl.yaml_files import dump_yaml

pytestmark = pytest.mark.skipif("P2PFL_DATA" not in os.environ, reason="P2PFL_DATA is not set: no heart-disease files")

HOSPITALS = ("cleveland", "hungary", "switzerland", "va")
EXPERIMENT = {
    "name": "heart",
    "task": {"name": "heart-disease", "standardise": "pooled"},
    "algorithm": {"name": "dpsgd", "local_steps": 10, "batch_size": 4},
    "rounds": 3,
    "stop": None,
    "baselines": [],
}


def run(*arguments, wrong=False):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(done.exception, ConfigError) if wrong else done.exit_code == 0, done.output
    return str(done.exception) if wrong else done.output


@pytest.fixture
def institutions(tmp_path):
    """A folder for each hospital with its keys, its own file and the experiment."""
    for name in HOSPITALS:
        home = tmp_path / name
        home.mkdir()
        (home / "heart.yaml").write_text(dump_yaml(EXPERIMENT))
        identity = Identity.new()
        identity.save(home / "keys")
        identity.card(name, f"tcp://127.0.0.1:{7700 + HOSPITALS.index(name)}").save(home / "keys" / "card.yaml")
        file = {"hungary": "hungarian"}.get(name, name)
        (home / "data").mkdir()
        shutil.copy(f"{os.environ['P2PFL_DATA']}/heart_disease/processed.{file}.data", home / "data")
    return tmp_path


def describe(home):
    arguments = ("--keys", home / "keys", "--set", f"task.hospitals=[{home.name}]", "--set", f"task.data={home / 'data'}")
    return run("keys", "describe", home / "heart.yaml", *arguments)


def cards(root):
    return [text for name in HOSPITALS for text in ("--card", root / name / "keys" / "card.yaml")]


def test_a_study_from_cards_trains_like_one_with_all_rows_in_one_place(institutions):
    for name in HOSPITALS:
        assert "means and deviations of 13 inputs" in describe(institutions / name)
    run("study", "new", institutions / "va" / "heart.yaml", *cards(institutions), "--out", institutions / "study.yaml")

    study = load_study(institutions / "study.yaml")
    assert study.experiment["task"]["scale"]["samples"] == 199 + 172 + 30 + 85
    together = {site.name: site for site in load_task("heart-disease", standardise="pooled").sites}
    options = {key: value for key, value in study.experiment["task"].items() if key != "name"}
    for name in HOSPITALS:
        own = {"hospitals": [name], "data": str(institutions / name / "data")}
        (alone,) = load_task("heart-disease", **options, **own).sites

        assert torch.equal(alone.train[0], together[name].train[0])
        assert torch.equal(alone.test[0], together[name].test[0])


def test_a_study_needs_every_members_moments(institutions):
    for name in HOSPITALS[:2]:
        describe(institutions / name)

    told = run("study", "new", institutions / "va" / "heart.yaml", *cards(institutions), wrong=True)
    assert "missing in switzerland, va; there: p2pfl keys describe" in " ".join(told.split())


def test_a_card_of_other_data_is_noticed_at_the_start(institutions):
    for name in HOSPITALS:
        describe(institutions / name)
    card, path = Card.load(institutions / "va" / "keys" / "card.yaml"), institutions / "va" / "keys" / "card.yaml"
    moments = replace(card.moments, means=(card.moments.means[0] + 1e-3, *card.moments.means[1:]))
    path.unlink()
    Identity.load(path.parent).card(card.name, card.address, card.samples, moments).save(path)
    run("study", "new", institutions / "va" / "heart.yaml", *cards(institutions), "--out", institutions / "va" / "study.yaml")
    digest = load_study(institutions / "va" / "study.yaml").digest
    data = {"hospitals": ["va"], "data": str(institutions / "va" / "data")}
    (institutions / "va" / "site.yaml").write_text(dump_yaml({"member": "va", "study": "study.yaml", "confirmed": digest, "task": data}))

    with pytest.raises(ConfigError, match="on the card of va are not those of its data; run: p2pfl keys describe"):
        start(institutions / "va" / "site.yaml")


def test_a_card_is_described_with_its_own_keys_only(institutions):
    shutil.copy(institutions / "va" / "keys" / "card.yaml", institutions / "hungary" / "keys" / "card.yaml")

    told = run("keys", "describe", institutions / "hungary" / "heart.yaml", "--keys", institutions / "hungary" / "keys", wrong=True)
    assert "is not of the keys beside it" in told


def test_the_scale_must_fit(tmp_path):
    scale = {"samples": 10, "means": [0.0] * 12, "deviations": [1.0] * 12}

    with pytest.raises(ConfigError, match=r"task\.scale has 12 means: expected 13"):
        load_task("heart-disease", standardise="pooled", scale=scale)
    with pytest.raises(ConfigError, match=r"task\.scale: is for standardise: pooled"):
        load_task("heart-disease", scale=scale)


@pytest.mark.slow
def test_daemons_and_simulator_agree(tmp_path):
    simulated = p2pfl.simulate(EXPERIMENT, out=tmp_path / "simulated")
    real = p2pfl.up(EXPERIMENT, out=tmp_path / "real")

    for name, model in simulated.models.items():
        assert torch.linalg.vector_norm(real.models[name] - model) <= 1e-6 * torch.linalg.vector_norm(model)
    assert json.loads((tmp_path / "real" / "summary.json").read_text())["engine"] == "daemons"
