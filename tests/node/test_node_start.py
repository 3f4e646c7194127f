"""`p2pfl node start` as an institution runs it: a process of its own, its own folder, public files from the others."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

from commands import run_here
from networks import DEADLINE_S, Institutions, averaging, plan_of, start_process, starts, wait_until
from p2pfl.errors import ConfigError, StoreError
from p2pfl.evaluation.results import read_models
from p2pfl.experiment.loading import load_study
from p2pfl.inspector.run_state import run_state
from p2pfl.node.start import _run, start
from p2pfl.runs.checkpoint import read_checkpoint
from p2pfl.runs.records import read_run
from p2pfl.simulator import simulate
from p2pfl.transports import reserve_port
from p2pfl.yaml_files import dump_yaml, load_yaml

TRAINING = {
    "task": {"name": "breast-cancer"},
    "nodes": 3,
    "partition": {"name": "iid"},
    "topology": {"name": "path"},
    "rounds": 40,
    "stop": None,
    "baselines": [],
}


@pytest.fixture
def site(tmp_path):
    """The site file of a study whose nodes do not run."""
    with Institutions(averaging({"name": "path"}, 2), tmp_path) as institutions:
        yield institutions.site("node-0")


def changed(site, **settings):
    """The site file with other settings; None takes one out."""
    content = {key: value for key, value in {**load_yaml(site), **settings}.items() if value is not None}
    site.write_text(dump_yaml(content), encoding="utf-8")
    return site


def run_p2pfl(*arguments):
    return subprocess.run([sys.executable, "-m", "p2pfl", *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_a_node_does_not_start_without_a_confirmed_digest(site):
    with pytest.raises(ConfigError, match="confirmed: required"):
        start(changed(site, confirmed=None))


def test_a_node_does_not_start_with_another_digest_than_was_confirmed(site):
    with pytest.raises(ConfigError, match="another digest"):
        start(changed(site, confirmed="0" * 64))
    with pytest.raises(ConfigError, match="another digest"):
        start(site, confirmed="0" * 64)


def test_a_study_that_was_changed_after_it_was_confirmed_is_refused(site):
    study = site.parent.parent / "study.yaml"
    text = study.read_text(encoding="utf-8")
    assert "seed: 0" in text
    study.write_text(text.replace("seed: 0", "seed: 1"), encoding="utf-8")

    with pytest.raises(ConfigError, match="another digest"):
        start(site)


def test_a_refused_digest_is_exit_code_2(site, monkeypatch, capfd):
    code, _, err = run_here("node", "start", changed(site, confirmed="0" * 64), monkeypatch=monkeypatch, capfd=capfd)

    assert code == 2
    assert "another digest" in err


def test_a_node_does_not_start_with_another_members_keys(site):
    with pytest.raises(ConfigError, match="not those of node-0"):
        start(changed(site, keys="../node-1/keys"))


def test_a_member_whose_data_are_not_here_is_told(site):
    with pytest.raises(ConfigError, match="no site of that name here, only node-0"):
        start(changed(site.parent.parent / "node-1" / "site.yaml", task={"nodes": 1}))


@pytest.mark.slow
def test_two_nodes_on_one_state_folder_are_refused(tmp_path):
    with Institutions(averaging({"name": "path"}, 2), tmp_path) as institutions:
        institutions.start("node-0")
        wait_until(lambda: institutions.status("node-0"))

        with pytest.raises(ConfigError, match="another node is running"):
            start(institutions.site("node-0"))
        assert institutions.exit_code("node-0") is None


def test_a_node_with_another_model_than_the_studys_is_refused_by_tensor_name(site):
    agreed = load_study(site.parent / load_yaml(site)["study"])
    table = [{"name": "x", "shape": [7], "dtype": "float64", "trains": True, "travels": True}]
    other = agreed.with_layout(table)
    (site.parent / "other.yaml").write_text(dump_yaml(other.as_dict()), encoding="utf-8")
    changed(site, study="other.yaml", confirmed=other.digest)

    with pytest.raises(ConfigError, match=r"layout: tensor x: float64 \[5\], trains and travels here; float64 \[7\]"):
        start(site)
    assert not (site.parent / "state" / "checkpoint.safetensors").exists()


def test_a_corrupt_checkpoint_is_said_and_nothing_is_overwritten(site):
    state = site.parent / "state"
    state.mkdir(mode=0o700)
    (state / "checkpoint.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")

    with pytest.raises(StoreError, match=r"checkpoint\.safetensors: not a readable checkpoint"):
        start(site)
    assert (state / "checkpoint.safetensors").read_bytes() == b"\x08\0\0\0\0\0\0\0garbage!"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_of_three_signals_pauses_a_node(number):
    class Stopping:
        def __init__(self):
            self.stopped = asyncio.Event()

        def stop(self, why):
            self.stopped.set()

        async def run(self):
            os.kill(os.getpid(), number)
            await self.stopped.wait()
            return "paused"

    async def main():
        return await asyncio.wait_for(_run(Stopping(), until_stdin_closes=False), 10)

    assert asyncio.run(main()) == "paused"


def test_a_hangup_that_nohup_has_ignored_stays_ignored():
    class Finishing:
        def stop(self, why):
            raise AssertionError

        async def run(self):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0)
            return "rounds"

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert asyncio.run(_run(Finishing(), until_stdin_closes=False)) == "rounds"
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_node_that_is_asked_to_stop_leaves_with_0_and_goes_on_exactly(tmp_path):
    simulated = simulate(TRAINING, out=tmp_path / "simulator")
    with Institutions(plan_of(**TRAINING), tmp_path, deadline_floor_s=300.0, deadline_factor=100.0) as institutions:
        first, middle, last = institutions.plan.names
        institutions.start(first, middle)
        wait_until(lambda: institutions.status(first))
        assert institutions.end(first, signal.SIGHUP) == 0  # still waiting to be greeted
        assert not (institutions.state(first) / "status.url").exists()
        institutions.start(first, last)
        wait_until(lambda: institutions.round(last) >= 3)
        assert institutions.end(last, signal.SIGTERM) == 0
        assert (institutions.place / last / "node.log").read_text().endswith("stopped: paused\n")
        assert run_state(read_run(institutions.state(last) / "run")).sentence.startswith("paused by SIGTERM at ")
        stopped_at = read_checkpoint(institutions.state(last) / "checkpoint.safetensors")[1]["round"]
        institutions.start(last)
        wait_until(institutions.is_over)

        assert [institutions.exit_code(name) for name in institutions.plan.names] == [0, 0, 0]
        assert 3 <= stopped_at < TRAINING["rounds"]
        assert not any(row["skipped"] for name in institutions.plan.names for row in institutions.rows(name))
        models = torch.stack([simulated.models[name] for name in institutions.plan.names])
        assert float(((institutions.models() - models).norm(dim=1) / models.norm(dim=1)).max()) < 1e-6
        assert [row["round"] for row in institutions.rows(last)] == list(range(TRAINING["rounds"]))
        assert "resumed" in institutions.events(last)


@pytest.mark.slow
def test_three_sites_that_share_public_files_only(tmp_path):
    names = ("node-0", "node-1", "node-2")
    folders = [tmp_path / f"at-{name}" for name in names]
    public = tmp_path / "public"
    public.mkdir()
    (public / "experiment.yaml").write_text(
        "task: {name: averaging, nodes: 3}\nrounds: 0\nstop: {relative_consensus: 1.0e-6}\n", encoding="utf-8"
    )

    def p2pfl(*arguments):
        done = run_p2pfl(*map(str, arguments))
        assert done.returncode == 0, done.stderr
        return done.stdout

    with ExitStack() as stack:
        for name, folder in zip(names, folders, strict=True):
            folder.mkdir()
            address = stack.enter_context(reserve_port()).address
            p2pfl("keys", "new", "--name", name, "--address", address, "--out", folder / "keys")
            shutil.copy(folder / "keys" / "card.yaml", public / f"{name}.yaml")
        cards = [part for name in names for part in ("--card", public / f"{name}.yaml")]
        digest = json.loads(p2pfl("study", "new", public / "experiment.yaml", *cards, "--out", public / "study.yaml", "--json"))["digest"]
        for folder in folders:
            shutil.copy(public / "study.yaml", folder / "study.yaml")
            p2pfl("study", "join", folder / "study.yaml", "--keys", folder / "keys", "--confirm", digest, "--out", folder / "site.yaml")
        shutil.rmtree(public)  # nothing of it is needed any more
        nodes = [start_process("node", "start", str(folder / "site.yaml"), log=folder / "node.log") for folder in folders]
        for node in nodes:
            stack.callback(node.kill)

        assert [node.wait(DEADLINE_S) for node in nodes] == [0, 0, 0]
        assert all((folder / "node.log").read_text().endswith("stopped: converged\n") for folder in folders)
        models = torch.stack([read_models(folder / "state" / "run")[name] for name, folder in zip(names, folders, strict=True)])
        mean = starts(plan_of(task={"name": "averaging"}, nodes=3, rounds=0)).mean(dim=0)
        torch.testing.assert_close(models, mean.expand(3, -1), rtol=1e-5, atol=1e-5)
        private = {path.name for folder in folders for path in folder.iterdir()}
        assert private == {"keys", "study.yaml", "site.yaml", "state", "node.log"}
