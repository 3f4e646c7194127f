"""A study that continues an older one: models are taken over bit for bit, the old state stays, and what cannot be is said."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn

from networks import STUDY, Institutions, Network, averaging, finish, plan_of
from p2pfl.errors import ConfigError, StoreError
from p2pfl.evaluation.baselines import trained_alone
from p2pfl.evaluation.results import read_models
from p2pfl.experiment.plan import make_plan
from p2pfl.governance.continuation import Continuation
from p2pfl.governance.encoding import grouped
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.node.continuation import continued_plan
from p2pfl.node.own_probes import first_outputs
from p2pfl.node.site import SiteFile
from p2pfl.node.start import start
from p2pfl.node.state_folder import held_state
from p2pfl.params import digest_of, parameters_of
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint
from p2pfl.runs.events import departures_of_events
from p2pfl.runs.records import read_run
from p2pfl.runs.status_client import LOCK
from p2pfl.yaml_files import dump_yaml, load_yaml

NEW_STUDY = "cd" * 32
RING = {"name": "ring"}


def site(name, network, place, **settings):
    folder = place / name / "0"
    return SiteFile(member=name, study=place / "study.yaml", state=folder, **{"old_state": network.states.get(name), **settings})


def continued(plan, network, place, names):
    """The plan of a new study as each node makes it for itself, and what each puts on record."""
    tie = Continuation(study=STUDY, members={name: name for name in names})
    said = {}
    for name in plan.names:
        plan, said[name] = continued_plan(plan, tie, site(name, network, place), place / "site.yaml", without_old_state=False)
    return plan, said


def lines(nodes, **more):
    """A plan of nodes that learn a straight line, in rounds of some milliseconds."""
    return plan_of(task={"name": "synthetic-logistic", "features": 3, "samples": 12}, nodes=nodes, topology=RING, stop=None, **more)


async def old_ring(place, plan, *, pause_at=None):
    """A ring that has finished, or was paused after some rounds."""
    async with Network(plan, place) as network:
        network.start()
        if pause_at is not None:
            await network.reached(pause_at)
            for node in network.nodes.values():
                node.daemon.stop("by SIGTERM")
        reasons = await network.ended()
    assert set(reasons) == {"paused" if pause_at is not None else "rounds"}
    return network


def files_of(place):
    return {path: sha256(path.read_bytes()).hexdigest() for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("pause_at", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_a_ring_of_eight_goes_on_with_one_member_more(tmp_path, pause_at):
    async def main():
        rounds = 3 if pause_at is None else 10**6
        old = await old_ring(tmp_path / "old", lines(8, rounds=rounds), pause_at=pause_at)
        before, models = files_of(tmp_path / "old"), {}
        for name in old.plan.names:
            tensors = read_checkpoint(old.states[name] / CHECKPOINT)[0]
            models[name] = tensors["state/x"][0]
            if pause_at is None:
                assert torch.equal(models[name], read_models(old.states[name] / "run")[name])
        plan, said = continued(lines(9, rounds=1), old, tmp_path / "new", old.plan.names)
        (new,) = set(plan.names) - set(old.plan.names)
        async with Network(plan, tmp_path / "new", study_digest=NEW_STUDY) as network:
            for name in plan.names:
                network.start(name, beginning=said[name])
                begins = network.nodes[name].daemon.node.population.estimate()[0]
                assert torch.equal(begins, models[name] if name != new else parameters_of(plan.model))
                if name != new:
                    assert said[name][1].endswith(f"of study {grouped(STUDY)}; SHA-256 of the model {digest_of(models[name])}")
            assert set(await network.ended()) == {"rounds"}
            events = {name: read_run(network.states[name] / "run").events for name in plan.names}
        for name in plan.names:
            (detail,) = (event["detail"] for event in events[name] if event["event"] == "continued")
            assert detail == said[name][1]
            assert ("as a new member" in detail) == (name == new)
        assert files_of(tmp_path / "old") == before

    finish(main())


def normed():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def learning(nodes, **more):
    """A plan of nodes whose model has running statistics."""
    made = lines(nodes, **more)
    return make_plan(made.experiment, replace(made.task, model=normed))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two nodes that have finished two rounds of training."""
    return finish(finished(learning(2, rounds=2), tmp_path_factory.mktemp("trained")))


async def finished(plan, place):
    async with Network(plan, place) as network:
        network.start()
        assert set(await network.ended()) == {"rounds"}
    return network


@pytest.fixture
def old(trained, tmp_path):
    """The state of the first of them, to be changed."""
    return shutil.copytree(trained.states["node-0"], tmp_path / "old")


TIE = Continuation(study=STUDY, members={"node-0": "node-0"})


def taken_over(old, tie=TIE, *, plan=None, **settings):
    """How node-0 begins in a new study, whose state folder is beside the old one."""
    given = {"member": "node-0", "study": Path("study.yaml"), "state": old.parent / "new", "old_state": old, **settings}
    without = given.pop("without_old_state", False)
    return continued_plan(plan or learning(2, rounds=1), tie, SiteFile(**given), Path("site.yaml"), without_old_state=without)


def test_running_statistics_are_taken_over_and_the_local_baseline_begins_at_the_same_model(old):
    tensors, metadata = read_checkpoint(old / CHECKPOINT)
    plan, (kind, detail) = taken_over(old)
    populations = [
        plan.population(["node-0"]),
        trained_alone(plan.task, [plan.sites["node-0"]], [0], plan.model, replace(plan.recipe, rounds=0)),
    ]

    assert metadata["finished"]
    assert (kind, detail.partition(" of study")[0]) == ("continued", "with the model of node-0 after round 1")
    for population in populations:
        assert torch.equal(population.estimate(), tensors["state/x"])
        assert {"1.running_mean", "1.running_var"} < population.buffers.keys()
        assert all(torch.equal(buffer, tensors[f"buffers/{name}"]) for name, buffer in population.buffers.items())
    assert plan.start_digest == learning(2, rounds=1).start_digest  # which all members compare


def test_a_neighbours_doctor_is_told_of_the_model_that_all_start_from(old):
    plan, _ = taken_over(old)
    fresh = learning(2, rounds=1)

    assert not torch.equal(plan.model.get_buffer("1.running_mean"), fresh.model.get_buffer("1.running_mean"))
    assert first_outputs(fresh, "node-1") is not None
    assert first_outputs(plan, "node-0") == first_outputs(fresh, "node-1")
    assert not torch.equal(plan.model.get_buffer("1.running_mean"), fresh.model.get_buffer("1.running_mean"))


def test_the_model_of_a_running_sum_is_its_quotient(old):
    rewritten(lambda tensors, _: tensors.update({"state/w": torch.tensor([[0.25]])}))(old)
    path = old / "run" / "experiment.yaml"
    path.write_text(dump_yaml({**load_yaml(path), "algorithm": {**load_yaml(path)["algorithm"], "name": "push-sum"}}), encoding="utf-8")
    plan, _ = taken_over(old)

    assert torch.equal(plan.sites["node-0"].start, 4 * read_checkpoint(old / CHECKPOINT)[0]["state/x"][0])


def test_a_member_goes_on_under_another_name(old):
    _, (_, detail) = taken_over(old, Continuation(study=STUDY, members={"node-1": "node-0"}), member="node-1")

    assert detail.startswith("with the model of node-0 ")


def test_nothing_is_read_again_once_there_is_a_checkpoint(old, tmp_path):
    write_checkpoint(tmp_path / "new" / CHECKPOINT, {}, {"terms": {"study": NEW_STUDY}})
    shutil.rmtree(old)
    plan = learning(2, rounds=1)

    assert taken_over(old, plan=plan) == (plan, None)


def test_a_site_whose_state_is_gone_goes_on_without_it_and_that_is_on_record(old):
    shutil.rmtree(old)
    plan = learning(2, rounds=1)
    found, (kind, detail) = taken_over(old, plan=plan, without_old_state=True)

    assert found is plan
    assert detail == f"node-0: without its model of study {grouped(STUDY)}, as somebody here has decided"
    (departure,) = departures_of_events([{"event": str(kind), "node": "node-0", "round": 0, "detail": detail}])
    assert departure.kind == "state_lost"


def removed(name):
    return lambda old: shutil.rmtree(old / name) if (old / name).is_dir() else (old / name).unlink()


def damaged(old):
    (old / CHECKPOINT).write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")


def rewritten(change):
    def rewrite(old):
        tensors, metadata = read_checkpoint(old / CHECKPOINT)
        change(tensors, metadata)
        write_checkpoint(old / CHECKPOINT, tensors, metadata)

    return rewrite


WITHOUT = "--without-old-state begins as the study says"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (shutil.rmtree, "no such folder"),
        (removed(CHECKPOINT), "holds no checkpoint.safetensors"),
        (removed("run"), "environment.json: no member is named"),
        (removed("run/environment.json"), "environment.json: no member is named, and only the state of node-0 can be taken over"),
        (removed("run/experiment.yaml"), "experiment.yaml: no such file"),
        (damaged, "not a readable checkpoint"),
        (lambda old: old.chmod(0o755), "mode 0755, other accounts may enter"),
        (rewritten(lambda _, told: told["terms"].update(study="ef" * 32)), f"is the state of study {grouped('ef' * 32)}, and this study"),
        (rewritten(lambda _, told: told["terms"].update(layout="ef" * 32)), "its model has another layout"),
        (rewritten(lambda _, told: told.pop("terms")), "KeyError: 'study'"),
        (rewritten(lambda tensors, _: tensors.pop("state/x")), "KeyError: 'x'"),
        (rewritten(lambda tensors, _: tensors.update({"state/x": torch.zeros(1, 3)})), "(1, 3), expected"),
        (rewritten(lambda tensors, _: tensors["state/x"].fill_(torch.nan)), "numbers that are not finite"),
    ],
)
def test_old_state_that_cannot_be_taken_over_is_refused_and_left_alone(old, change, told):
    change(old)
    before = files_of(old)
    with pytest.raises((ConfigError, StoreError)) as refused:
        taken_over(old)

    assert told in str(refused.value)
    assert WITHOUT in str(refused.value) or "chmod" in str(refused.value)
    assert "remove it" not in str(refused.value)
    assert files_of(old) == before


def test_the_state_of_another_member_is_refused(trained, tmp_path):
    other = shutil.copytree(trained.states["node-1"], tmp_path / "old")

    with pytest.raises(ConfigError, match="is the state of node-1, and node-0 is who goes on here"):
        taken_over(other)


def test_old_state_on_which_a_node_runs_is_refused(old):
    with (
        held_state(old),
        pytest.raises(ConfigError, match=rf"another node is running on this state folder \(process {os.getpid()}\): stop it"),
    ):
        taken_over(old)


def test_a_copy_without_a_lock_is_read_as_it_is(old):
    (old / LOCK).unlink(missing_ok=True)
    before = files_of(old)
    taken_over(old)

    assert files_of(old) == before


@pytest.mark.parametrize(
    ("tie", "settings", "told"),
    [
        (None, {}, "the study continues no other one, so that nothing is taken over; take the line out"),
        (TIE, {"member": "node-1"}, "node-1 is new in this study, so that nothing is taken over"),
        (TIE, {"old_state": None}, "old_state: required, but missing: node-0 goes on from its model of study"),
        (TIE, {"state": "old"}, "holds the state of the study that this one continues, which is kept as it is; write old_state"),
    ],
)
def test_a_site_file_that_says_too_much_or_too_little_is_refused(old, tie, settings, told):
    settings = {key: old if value == "old" else value for key, value in settings.items()}
    before = files_of(old)
    with pytest.raises(ConfigError, match=told):
        taken_over(old, tie, **settings)

    assert files_of(old) == before


def test_a_node_start_asks_for_the_old_state(tmp_path):
    with Institutions(averaging({"name": "path"}, 2), tmp_path) as institutions:
        study = institutions.study.with_continuation(Continuation(study=STUDY, members={"node-0": "node-0"}))
        (tmp_path / "next.yaml").write_text(dump_yaml(study.as_dict()), encoding="utf-8")
        content = load_yaml(institutions.site("node-0"))
        path = institutions.site("node-0")
        path.write_text(dump_yaml({**content, "study": "../next.yaml", "confirmed": study.digest}), encoding="utf-8")

        with pytest.raises(ConfigError, match="old_state: required, but missing"):
            start(path)
        path.write_text(dump_yaml({**load_yaml(path), "old_state": "elsewhere"}), encoding="utf-8")
        with pytest.raises(ConfigError, match=f"{tmp_path}/node-0/elsewhere: no such folder"):
            start(path)
