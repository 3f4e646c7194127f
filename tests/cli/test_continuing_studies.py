"""The commands keys card, study new, show and join where a study continues an older one."""

from __future__ import annotations

import json
import shutil

import pytest
from test_study_commands import HEART, invoke, make_study, sites  # noqa: F401  # a fixture
from typer.testing import CliRunner

from p2pfl.cli.keys import app as keys_app
from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import load_study
from p2pfl.governance.card import Card
from p2pfl.governance.encoding import grouped
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.node.site import SiteFile
from p2pfl.runs.checkpoint import write_checkpoint
from p2pfl.yaml_files import dump_yaml

MEMBERS = ("cleveland", "hungary", "va")
POOLED = "name: heart\ntask: {name: heart-disease, standardise: pooled}\n"


def keys(command, *arguments):
    return CliRunner().invoke(keys_app, [command, *map(str, arguments)])


@pytest.fixture
def older(sites):  # noqa: F811
    """A folder in which three members have made a study."""
    assert make_study(sites, HEART, names=MEMBERS).exit_code == 0
    (sites / "study.yaml").rename(sites / "older.yaml")
    return sites


def go_on(folder, experiment, names, *more):
    return make_study(folder, experiment, "--continues", folder / "older.yaml", *more, names=names)


def rows_of(text):
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]


def test_a_site_moves_and_keeps_its_keys(older):
    folder = older / "hungary" / "keys"
    before = Card.load(folder / "card.yaml")
    moved = keys("card", "--keys", folder, "--address", "tcp://elsewhere.example:1", "--address", "tcp://[::1]:2", "--json")
    after = Card.load(folder / "card.yaml")
    assert keys("card", "--keys", folder, "--dials-out", "--name", "pest").exit_code == 0
    renamed = Card.load(folder / "card.yaml")

    assert json.loads(moved.output)["address"] == ["tcp://elsewhere.example:1", "tcp://[::1]:2"]
    assert (after.name, after.fingerprint, after.samples) == (before.name, before.fingerprint, before.samples)
    assert (renamed.name, renamed.address, renamed.fingerprint) == ("pest", None, before.fingerprint)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give --address, or --dials-out, or --name"),
        (("--address", "tcp://a.example:1", "--dials-out"), "not both of the first two"),
        (("--name", "-rf"), "--name = '-rf': expected"),
        (("--address", "a.example:1"), "tcp://"),
    ],
)
def test_a_card_is_not_changed_to_what_cannot_be(older, arguments, told):
    folder = older / "va" / "keys"
    before = (folder / "card.yaml").read_text()
    refused = keys("card", "--keys", folder, *arguments)

    assert isinstance(refused.exception, ConfigError)
    assert told in str(refused.exception)
    assert (folder / "card.yaml").read_text() == before


def test_a_study_continues_another_with_other_members_addresses_and_rounds(older):
    keys("card", "--keys", older / "hungary" / "keys", "--address", "tcp://elsewhere.example:1")
    made = go_on(older, HEART + "rounds: 7\n", ("cleveland", "hungary", "switzerland"))
    assert made.exit_code == 0, made.output
    new, old = load_study(older / "study.yaml"), load_study(older / "older.yaml")
    rows = rows_of(made.output)

    assert new.continues.as_dict() == {"study": old.digest, "members": {"cleveland": "cleveland", "hungary": "hungary"}}
    assert new.member("hungary").address == "tcp://elsewhere.example:1"
    for row in (["cleveland", "goes on from its model"], ["switzerland", "is new, and begins as the study says"], ["va", "does not go on"]):
        assert row in rows
    assert ["rounds", f"{old.experiment['rounds']} -> 7"] in rows
    assert not {row[0] for row in rows} & {"compiled", "name", "schema", "seed"}
    shown = invoke("show", older / "study.yaml")
    assert ["hungary", "goes on from its model"] in rows_of(shown.output)
    assert json.loads(invoke("show", older / "study.yaml", "--json").output)["continues"] == new.continues.as_dict()
    assert json.loads(invoke("show", older / "older.yaml", "--json").output)["continues"] is None


def test_new_keys_are_asked_about(older):
    shutil.rmtree(older / "va" / "keys")
    keys("new", "--name", "va", "--out", older / "va" / "keys")
    fingerprint = grouped(Card.load(older / "va" / "keys" / "card.yaml").fingerprint)
    refused = go_on(older, HEART, MEMBERS)
    made = go_on(older, HEART, MEMBERS, "--new-key", "va")

    assert f"{older / 'older.yaml'}: members: va has another key" in str(refused.exception)
    assert fingerprint in str(refused.exception)
    assert made.exit_code == 0, made.output
    assert ["va", "goes on from its model, with a new key"] in rows_of(invoke("show", older / "study.yaml").output)


@pytest.mark.parametrize(
    ("experiment", "more", "told"),
    [
        (HEART.replace("3", "4"), (), r"layout: tensor x: float64 \[4\], trains and travels here; float64 \[3\].* in the older study"),
        (HEART + "seed: 1\n", (), "seed = 1: 0 in the study that is continued"),
        (HEART, ("--new-key", "va"), "--new-key va: its key is that of the study that is continued"),
    ],
)
def test_a_study_that_cannot_continue_the_other_is_refused(older, experiment, more, told):
    refused = go_on(older, experiment, MEMBERS, *more)

    assert isinstance(refused.exception, ConfigError)
    assert refused.exception.args[0]
    with pytest.raises(ConfigError, match=told):
        raise refused.exception
    assert not (older / "study.yaml").exists()


def test_something_else_than_a_study_cannot_be_continued(older):
    shutil.copy(older / "experiment.yaml", older / "older.yaml")
    refused = go_on(older, HEART, MEMBERS)
    alone = make_study(older, HEART, "--new-key", "va", names=MEMBERS)

    assert str(refused.exception).startswith(f"{older / 'older.yaml'}:")
    assert "--new-key is about a study that is continued" in str(alone.exception)


def test_models_keep_the_scale_that_they_have_learnt_with(older):
    content = load_study(older / "older.yaml").as_dict()
    scale = {"count": 4, "means": [1.0], "deviations": [2.0]}
    content["experiment"]["task"] |= {"standardise": "pooled", "scale": scale}
    content.pop("result_contract")
    (older / "older.yaml").write_text(dump_yaml({**content, "schema": 2}))
    made = go_on(older, "name: heart\ntask: {name: 'nowhere:task', standardise: pooled}\n", MEMBERS)

    assert made.exit_code == 0, made.output
    assert load_study(older / "study.yaml").experiment["task"]["scale"] == scale


def test_a_site_joins_with_a_new_state_folder_and_the_old_one_is_found(older):
    go_on(older, HEART, ("cleveland", "hungary", "switzerland"))
    new = load_study(older / "study.yaml")
    old_states = {"state": "ef" * 32, "state-2": new.continues.study}
    for folder, study in old_states.items():
        write_checkpoint(older / "cleveland" / folder / CHECKPOINT, {}, {"terms": {"study": study}})

    def join(name, *more):
        folder = older / name
        told = ("--keys", folder / "keys", "--confirm", new.digest, "--out", folder / "site.yaml")
        return folder, invoke("join", older / "study.yaml", *told, *more)

    (cleveland, joined), (hungary, _), (switzerland, new_one) = join("cleveland"), join("hungary"), join("switzerland")
    assert joined.exit_code == new_one.exit_code == 0, joined.output
    found = {folder.name: SiteFile.load(folder / "site.yaml") for folder in (cleveland, hungary, switzerland)}
    assert {site.state.name for site in found.values()} == {f"state-{new.digest[:8]}"}
    assert found["cleveland"].old_state == cleveland / "state-2"
    assert found["hungary"].old_state is found["switzerland"].old_state is None
    assert "# old_state: " in (hungary / "site.yaml").read_text()
    (hungary / "site.yaml").unlink()
    join("hungary", "--old-state", older / "backup")
    assert SiteFile.load(hungary / "site.yaml").old_state.resolve() == older / "backup"
    (switzerland / "site.yaml").unlink()
    assert "switzerland takes no model over" in str(join("switzerland", "--old-state", older / "backup")[1].exception)
