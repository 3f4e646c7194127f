"""A simulation that several processes share is the one that a single process runs.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from p2pfl.cli import app
from p2pfl.errors import ConfigError, TransportError
from p2pfl.evaluation.results import Run
from p2pfl.runs.checkpoint import read_checkpoint
from p2pfl.runs.records import read_run
from p2pfl.simulator import Simulation, simulate
from p2pfl.simulator.forecast import forecast_memory
from p2pfl.simulator.sharding.halo import HaloPlan
from p2pfl.simulator.sharding.ranks import Ranks, _of_rank
from p2pfl.simulator.sharding.shard import Shard, check_enough
from p2pfl.topology import SCHEDULES, Schedule, Topology, make, make_schedule, num_crossing, partition, weighted
from p2pfl.yaml_files import dump_yaml
from simulations import plan_of

TESTS = Path(__file__).parents[1]
DEADLINE_S = 240

BASE = {
    "task": {"name": "synthetic-logistic", "features": 3, "samples": 12, "heterogeneity": 1.0},
    "nodes": 16,
    "topology": {"name": "torus"},
    "dtype": "float64",
    "rounds": 4,
    "stop": None,
    "baselines": [],
    "evaluate_every": 3,
    "save_models_every": 1,
}
CASES = {
    "momentum-float32": {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}, "dtype": "float32"},
    "partly-personal": {"personal": ["bias"], "algorithm": {"name": "gradient-tracking"}},
    "two-phases": {"algorithm": {"name": "gradient-tracking"}},
    "state-of-each-node": {"algorithm": {"name": "choco"}, "compressor": {"name": "top-k", "share": 0.5}},
    "graphs-that-change": {"topology": {"name": "one-peer-exponential"}, "algorithm": {"name": "qg-dsgdm"}},
    "messages-for-one": {"topology": {"name": "star"}, "algorithm": {"name": "powergossip"}, "nodes": 9},
}
LONGER = {
    "base-2": {"topology": {"name": "base-2"}, "nodes": 15},
    "running-sums": {"topology": {"name": "exponential"}, "weights": "push-sum", "algorithm": {"name": "push-sum"}, "nodes": 14},
    "agreement": {
        "task": {**BASE["task"], "samples": 120},  # test rows enough to tell one node's model from another's
        "stop": {"relative_consensus": 0.05, "patience": 1, "settle": 50},
        "baselines": ["local", "pooled"],
    },
    "agreement-where-graphs-change": {
        "topology": {"name": "base-3"},
        "algorithm": {"local_steps": 2},
        "stop": {"relative_consensus": 0.05, "patience": 1, "settle": 50},
    },
    "sums-that-are-relayed": {"topology": {"name": "path"}, "algorithm": {"name": "relaysgd"}},
}
LONG = {**BASE, "name": "long", "rounds": 9, "checkpoint_every": 1, "optimizer": {"name": "adam", "lr": 0.05}}


def torchrun(num_ranks, *arguments, check=True):
    """Some processes as torchrun starts them, on a port that the system chooses."""
    path = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def shared(num_ranks, jobs, tmp_path, *, check=True):
    (tmp_path / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    return torchrun(num_ranks, TESTS / "as_ranks.py", tmp_path / "jobs.json", check=check)


def interrupted_after(rounds, raw, place):
    """A run of one process that left a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Simulation, "run", lambda self, _: [self.step() for _ in range(rounds)] and self.save())
        simulate(raw, out=place)


def assert_close(one, other, place, tolerance):
    """Numbers within 1e-6 of each other, all else the same."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one.keys() - {"seconds", "node_rounds_per_second", "peak_rss_bytes", "engine"}:
            assert_close(one[key], other[key], f"{place}.{key}", tolerance)
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_close(a, b, f"{place}[{number}]", tolerance)
    elif isinstance(one, float) and not math.isnan(one):
        assert other == pytest.approx(one, rel=1e-6, abs=tolerance), place
    else:
        assert repr(one) == repr(other), place


def assert_same_run(other, one):
    eps = torch.finfo(getattr(torch, one.experiment.dtype)).eps
    for number in range(one.summary["rounds"]):
        ones, others = one.models_after(number), other.models_after(number)
        for node, x_P in ones.items():
            torch.testing.assert_close(others[node], x_P, rtol=1e-6, atol=1e-6 * float(x_P.abs().max()))
    for what in ("records", "node_records", "summary"):
        # models that differ by eps have distances that do: nothing smaller means anything
        assert_close(getattr(one, what), getattr(other, what), what, 10 * eps)
    assert_close(list(read_run(one.path).gains), list(read_run(other.path).gains), "worth", 10 * eps)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    place = tmp_path_factory.mktemp("alone")
    made = {}

    def run(name):
        if name not in made:
            made[name] = simulate({**BASE, **(CASES | LONGER)[name], "name": name}, out=place / name)
        return made[name]

    return run


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    return simulate(LONG, out=tmp_path_factory.mktemp("long") / "run")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """All that two ranks are asked to do, in one start."""
    place = tmp_path_factory.mktemp("shared")
    interrupted_after(5, LONG, place / "begun-alone")
    jobs = [{"experiment": {**BASE, **raw, "name": name}, "out": str(place / name)} for name, raw in CASES.items()]
    jobs += [
        {"resume": str(place / "begun-alone")},
        {"experiment": LONG, "out": str(place / "begun-by-two"), "rounds": 5},
        {"experiment": {**BASE, "pace": {"name": "asynchronous"}}, "out": str(place / "paced")},
    ]
    shared(2, jobs, place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_same_run(name, two_ranks, alone):
    assert_same_run(Run(two_ranks / name), alone(name))
    assert Run(two_ranks / name).summary["engine"] == "sharded"


@pytest.mark.slow
def test_how_a_run_was_shared_is_in_its_topology(two_ranks, alone):
    record = json.loads((two_ranks / "graphs-that-change" / "topology.json").read_text(encoding="utf-8"))
    parts = record.pop("parts")

    assert parts == {"ranks": 2, "nodes": [8, 8], "crossing": 30}
    assert record == json.loads((alone("graphs-that-change").path / "topology.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_run_begun_alone_is_gone_on_with_by_two(two_ranks, long_run):
    assert_same_run(Run(two_ranks / "begun-alone"), long_run)


@pytest.mark.slow
def test_a_run_begun_by_two_is_gone_on_with_alone(two_ranks, long_run, tmp_path):
    interrupted_after(5, LONG, tmp_path / "alone")
    (theirs, metadata), (ours, same_metadata) = (
        read_checkpoint(place / "checkpoint.safetensors") for place in (two_ranks / "begun-by-two", tmp_path / "alone")
    )

    assert metadata.pop("seconds").keys() == same_metadata.pop("seconds").keys()
    assert metadata == same_metadata
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-12, atol=1e-15)
    shutil.copytree(two_ranks / "begun-by-two", tmp_path / "run")
    assert_same_run(simulate({}, resume=tmp_path / "run"), long_run)


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused_by_every_rank(two_ranks):
    refused = "pace.name = 'asynchronous': cannot be shared among 2 ranks; start one process, without torchrun, or take synchronous"

    assert [Path(f"{two_ranks / 'paced'}.refused-by-{rank}").read_text(encoding="utf-8") for rank in (0, 1)] == [refused] * 2
    assert not (two_ranks / "paced").exists()


@pytest.mark.slow
def test_three_ranks_of_unequal_size_make_the_same_runs(alone, long_run, tmp_path):
    cases = CASES | LONGER
    jobs = [{"experiment": {**BASE, **raw, "name": name}, "out": str(tmp_path / name)} for name, raw in cases.items()]
    interrupted_after(5, LONG, tmp_path / "begun-alone")
    shared(3, [*jobs, {"resume": str(tmp_path / "begun-alone")}], tmp_path)

    assert alone("agreement").summary["stop_reason"] == "converged"
    assert alone("agreement").summary["rounds"] > BASE["rounds"]
    for name in cases:
        assert_same_run(Run(tmp_path / name), alone(name))
    assert_same_run(Run(tmp_path / "begun-alone"), long_run)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_job_and_the_run_goes_on_with_any_number(long_run, tmp_path):
    (tmp_path / "long.yaml").write_text(dump_yaml(LONG), encoding="utf-8")
    job = {"file": str(tmp_path / "long.yaml"), "out": str(tmp_path / "run"), "dies": [1, 6]}
    done = shared(2, [job], tmp_path, check=False)

    assert done.returncode != 0
    # torchrun tells rank 0 to end as soon as it sees what rank 0 sees by itself
    said = ("rank 0: rank 1 has ended, or has been silent for 600 s (", "rank 0 was told to end, as all are where one has failed: ")
    assert any(f"p2pfl (rank 0): {sentence}" in done.stderr for sentence in said)
    assert "; continue the run from its checkpoint with --resume, on any number of ranks" in done.stderr
    assert read_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["round"] == 6
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert_same_run(simulate({}, resume=tmp_path / "alone"), long_run)
    done = torchrun(3, "-m", "p2pfl", "simulate", "--resume", tmp_path / "run", "--json")
    assert json.loads(done.stdout)["engine"] == "sharded"
    assert_same_run(Run(tmp_path / "run"), long_run)


# ---- what needs no other process


@pytest.mark.parametrize(
    ("name", "num_nodes", "num_parts", "most"),
    [
        ("ring", 100, 2, 2),
        ("ring", 100, 7, 7),
        ("path", 50, 4, 3),
        ("torus", 1024, 2, 64),
        ("grid", 900, 2, 30),
        ("hypercube", 256, 2, 128),
    ],
)
def test_parts_are_of_equal_size_and_few_links_run_between_them(name, num_nodes, num_parts, most):
    graph = make(name, num_nodes, 0)
    part_N = partition(graph, num_parts)

    assert sorted(np.bincount(part_N)) == sorted(num_nodes // num_parts + (i < num_nodes % num_parts) for i in range(num_parts))
    assert num_crossing(graph, part_N) <= most


def test_a_random_graph_is_cut_at_less_than_a_third_of_its_nodes_number():
    """n / 3 is the best bound known for the least cut of random 4-regular graphs (Diaz, Serna & Wormald 2007); by chance it were n."""
    graph = make("random-regular", 2000, 0, degree=4)

    assert num_crossing(graph, partition(graph, 2)) < 2000 / 3


def test_numbers_that_say_nothing_do_not_hide_a_cut():
    """Two cliques and one link, their nodes' numbers in disorder."""
    order = np.random.default_rng(0).permutation(20)
    pairs = [(order[a + half], order[b + half]) for half in (0, 10) for a in range(10) for b in range(a)] + [(order[0], order[10])]
    graph = Topology.from_edges("cliques", 20, *np.array(pairs).T)
    part_N = partition(graph, 2)

    assert num_crossing(graph, part_N) == 1
    assert sorted(map(sorted, (np.flatnonzero(part_N == p) for p in (0, 1)))) == sorted(map(sorted, (order[:10], order[10:])))


def test_there_are_at_most_as_many_parts_as_nodes():
    graph = make("ring", 5, 0)

    assert sorted(partition(graph, 5)) == [0, 1, 2, 3, 4]
    assert list(partition(graph, 1)) == [0] * 5
    with pytest.raises(ValueError, match="num_parts = 6: from 1 to the 5 nodes"):
        partition(graph, 6)
    with pytest.raises(ConfigError, match="nodes = 5: 6 ranks would share them; start at most as many ranks as nodes"):
        check_enough(5, 6)


@pytest.mark.parametrize("name", ["torus", "one-peer-exponential", "base-3"])
def test_what_one_rank_sends_is_what_the_other_expects(name):
    """Each rank's own view of a round, put together: every slot finds its neighbour's row, and only rows that somebody needs travel."""
    schedule = make_schedule(name, 24) if name in SCHEDULES else Schedule.static(weighted(make(name, 24, 0)))
    links = schedule.union()
    rank_N = partition(links, 3)
    parts = [Shard.from_partition(Ranks(rank=rank, count=3), links, rank_N) for rank in range(3)]
    for number in range(3):
        graph = schedule.at(number)
        index_NK, _, linked_NK = graph.padded()
        views = [HaloPlan.of(part, graph, index_NK, None, torch.device("cpu")) for part in parts]
        for part, view in zip(parts, views, strict=True):
            far_G = np.full(view.num_rows, -1)
            for peer, place in view.receives.items():
                far_G[place] = parts[peer].mine[views[peer].sends[part.ranks.rank].numpy()]
            near_MK, far_MK = view.near_MK.numpy(), view.far_MK.numpy()
            found_MK = np.where(far_MK >= 0, far_G[far_MK] if len(far_G) else -1, part.mine[near_MK])

            assert np.array_equal(found_MK[linked_NK[part.mine]], index_NK[part.mine][linked_NK[part.mine]])
            assert set(far_G) == {int(j) for j in index_NK[part.mine][linked_NK[part.mine]] if rank_N[j] != part.ranks.rank}
            assert not (far_MK[: part.num_inner] >= 0).any()


def test_a_dry_run_says_how_many_links_are_cut(tmp_path, monkeypatch):
    (tmp_path / "e.yaml").write_text(dump_yaml({**BASE, "nodes": 25}), encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    said = CliRunner().invoke(app, ["simulate", str(tmp_path / "e.yaml"), "--dry-run"]).stdout
    monkeypatch.setenv("RANK", "1")

    assert "2 ranks of 12 to 13 nodes, 12 of 50 links between ranks\n" in said
    assert CliRunner().invoke(app, ["simulate", str(tmp_path / "e.yaml"), "--dry-run"]).stdout == ""


def test_each_of_two_ranks_needs_less_memory_than_one():
    plan = plan_of({"task": {"name": "averaging", "dimension": 10_000}, "nodes": 64, "algorithm": {"name": "gradient-tracking"}})
    one, half = forecast_memory(plan), forecast_memory(plan, 2)

    assert half.state_bytes == one.state_bytes / 2
    assert half.peak_bytes < one.peak_bytes
    assert forecast_memory(plan, 2, 2).available_bytes < half.available_bytes


def test_who_is_missing_is_named():
    said = r"rank 2: rank 5 has ended, or has been silent for 600 s \(closed\); continue the run"
    with pytest.raises(TransportError, match=said), _of_rank(2, 5):
        raise RuntimeError("closed\nat line 1")
    with pytest.raises(TransportError, match="rank 2: another rank has ended"), _of_rank(2, None):
        raise RuntimeError("closed")
