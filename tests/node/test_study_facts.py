"""Facts that follow from a study: those that its nodes work by, in figures that were worked out by hand."""

from __future__ import annotations

import json
from hashlib import sha256

import numpy as np
import pytest
from typer.testing import CliRunner

from networks import averaging, plan_of
from p2pfl.cli.study import app
from p2pfl.errors import ConfigError
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.mixing import update_formats
from p2pfl.node.study_facts import facts_of

PATH = {"name": "path"}


def study_of(plan, **changes) -> Study:
    cards = [Identity.new().card(name, f"tcp://127.0.0.1:{7700 + i}") for i, name in enumerate(plan.names)]
    return Study.create(plan.experiment.as_dict() | changes, cards, plan.topology)


def facts(plan) -> dict:
    return facts_of(study_of(plan), "study.yaml").values


def test_who_dials_and_weights_follow_from_the_graph():
    found = facts(averaging(PATH, 3))

    assert found["roster"] == ["node-0", "node-1", "node-2"]
    direct = {"kind": "zeromq", "relay": None}
    assert found["edges"] == [
        {"members": ["node-0", "node-1"], "dials": "node-1", **direct},
        {"members": ["node-1", "node-2"], "dials": "node-2", **direct},
    ]
    (row,) = found["weights"]
    assert row["node-1"] == {
        "self": pytest.approx(1 / 3),
        "from": {"node-0": pytest.approx(1 / 3), "node-2": pytest.approx(1 / 3)},
        "sends_to": ["node-0", "node-2"],
    }


def test_who_has_no_address_dials():
    plan = averaging(PATH, 3)
    hidden = [Identity.new().card(name, None if name == "node-0" else f"tcp://127.0.0.1:{7700 + i}") for i, name in enumerate(plan.names)]
    study = Study.create(plan.experiment.as_dict(), hidden, plan.topology)

    assert [edge["dials"] for edge in facts_of(study, "study.yaml").values["edges"]] == ["node-0", "node-2"]


def test_an_edge_whose_ends_have_no_address_is_relayed_and_neither_dials():
    plan = averaging(PATH, 3)
    cards = [
        Identity.new().card("node-0"),
        Identity.new().card("node-1"),
        Identity.new().card("node-2", "tcp://127.0.0.1:7702", relay="tcp://127.0.0.1:7802"),
    ]
    found = facts_of(Study.create(plan.experiment.as_dict(), cards, plan.topology), "study.yaml").values

    assert found["edges"] == [
        {"members": ["node-0", "node-1"], "kind": "relay", "dials": None, "relay": "node-2"},
        {"members": ["node-1", "node-2"], "kind": "zeromq", "dials": "node-1", "relay": None},
    ]


def test_the_last_exchange_and_the_stop_rule_are_those_of_the_document():
    """With patience p and diameter d: announced at p + d rounds, 2 d before the stop, so not before rounds + p + d - 1 + 2 d."""
    found = facts(averaging(PATH, 3))

    assert (found["phases"], found["training_rounds"], found["mixing_only_rounds"], found["last_exchange"]) == (1, 0, 2000, 1999)
    assert found["diameter"] == 2
    assert found["stop_rule"] == {
        "tolerance": 1e-6,
        "patience": 3,
        "diameter": 2,
        "lambda_2": pytest.approx(1.0),  # 2 - 2 cos(pi / 3)
        "window": 1,
        "announces_at": 5,
        "stops_after": 4,
        "earliest": 8,
    }
    assert found["start_agreement"] == {"members": 3, "needed": 3, "within_s": 86_400.0, "grace_s": 2.0, "starting_exchanges": 3}


def test_the_start_of_averaging_is_zeros_in_the_tasks_dtype():
    found = facts_of(study_of(averaging(PATH, 3)), "study.yaml")

    assert found.values["start"]["digest"] == sha256(np.zeros(5).tobytes()).hexdigest()
    assert (found.values["start"]["zeros"], found.values["start"]["sites_replace_it"]) == (True, True)
    assert found.values["parameters"]["tensors"] == [{"name": "x", "shape": [5], "dtype": "float64", "count": 5, "offset": 0}]
    assert found.values["parameters"]["digest"] == sha256(b'[["x",[5],"float64"]]').hexdigest()
    assert found.values["channels"] == [{"phase": 0, "channels": [["x", "float64", 5]], "size_bytes": 40, "full": None}]


@pytest.mark.parametrize(
    ("algorithm", "compressor", "phases"),
    [
        ("dpsgd", "none", [["x"]]),
        ("gradient-tracking", "none", None),
        ("choco", "int8", None),
        ("relaysgd", "none", None),
    ],
)
def test_terms_and_channels_are_those_that_nodes_use(algorithm, compressor, phases):
    plan = plan_of(
        task={"name": "synthetic-logistic", "features": 3},
        nodes=3,
        topology=PATH,
        algorithm={"name": algorithm},
        compressor={"name": compressor},
        rounds=4,
        stop=None,
    )
    found = facts(plan)

    formats = update_formats(plan.recipe.algorithm, plan.population(["node-1"]))
    assert [phase["channels"] for phase in found["channels"]] == [list(map(list, each.entries)) for each in formats]
    assert [phase["full"] is not None for phase in found["channels"]] == [each.full is not None for each in formats]
    assert [each["phase"] for each in found["channels"]] == list(range(plan.recipe.algorithm.phases))
    assert (found["parameters"]["digest"], found["start"]["digest"]) == (plan.layout.digest, plan.start_digest)
    assert found["start"]["zeros"] is False
    assert (found["stop_rule"], found["last_exchange"]) == (None, 4 * plan.recipe.algorithm.phases - 1)
    if phases is not None:
        assert [[name for name, _, _ in each["channels"]] for each in found["channels"]] == phases


def test_weights_of_a_graph_that_changes_are_those_of_each_round_of_its_period():
    plan = plan_of(task={"name": "averaging"}, nodes=4, topology={"name": "one-peer-hypercube"}, rounds=0, stop={"settle": 9})

    found = facts(plan)

    assert (found["schedule"], found["ahead"]) == ({"steady": False, "period": 2}, 8)
    assert [row["node-0"]["from"] for row in found["weights"]] == [{"node-1": 0.5}, {"node-2": 0.5}]


def test_what_needs_a_task_that_is_not_here_is_unknown_and_the_rest_is_there():
    plan = averaging(PATH, 3)
    found = facts_of(study_of(plan, task={"name": "nowhere:task"}), "study.yaml")

    assert (found.values["start"], found.values["parameters"], found.values["channels"], found.start) == (None, None, None, None)
    assert "nowhere:task" in found.values["not_known"]
    assert found.values["diameter"] == 2


def test_the_layout_of_a_task_that_is_not_here_is_that_of_the_studys_table():
    plan = plan_of(task={"name": "synthetic-logistic", "features": 3}, nodes=3, personal=["bias"], rounds=2, stop=None)
    here = study_of(plan).with_layout(plan.layout.table())
    elsewhere = study_of(plan, task={"name": "nowhere:task"}).with_layout(plan.layout.table())

    found = facts_of(elsewhere, "study.yaml").values

    assert found["parameters"] == facts_of(here, "study.yaml").values["parameters"]
    assert (found["parameters"]["digest"], found["parameters"]["personal"], found["start"]) == (plan.layout.digest, ["bias"], None)


def test_study_show_prints_them_and_writes_the_first_parameters(tmp_path):
    plan = plan_of(task={"name": "synthetic-logistic", "features": 3}, nodes=3, rounds=2, stop=None)
    study_of(plan).save(tmp_path / "study.yaml")
    arguments = ["show", str(tmp_path / "study.yaml"), "--json", "--start", str(tmp_path / "start.bin")]

    said = CliRunner().invoke(app, arguments)

    assert said.exit_code == 0, said.output
    assert json.loads(said.output)["derived"] == facts_of(Study.read(tmp_path / "study.yaml"), "study.yaml").values
    assert sha256((tmp_path / "start.bin").read_bytes()).hexdigest() == plan.start_digest
    again = CliRunner().invoke(app, arguments)
    assert "File exists" in str(again.exception)


def test_first_parameters_that_are_not_known_are_not_written(tmp_path):
    study_of(averaging(PATH, 3), task={"name": "nowhere:task"}).save(tmp_path / "study.yaml")

    found = CliRunner().invoke(app, ["show", str(tmp_path / "study.yaml"), "--start", str(tmp_path / "start.bin")])

    assert isinstance(found.exception, ConfigError)
    assert "not known here" in str(found.exception)
    assert not (tmp_path / "start.bin").exists()
