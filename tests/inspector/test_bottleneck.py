"""Who costs a network most: planted slow nodes, disks and links are found in records, with the gain of what would help."""

from __future__ import annotations

import asyncio
import io
import json

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from networks import Line, Network, finish, plan_of
from p2pfl.cli import app
from p2pfl.inspector.bottleneck import bottleneck
from p2pfl.inspector.sections import time_spent
from p2pfl.inspector.terminal import page
from p2pfl.inspector.utilisation import utilisation
from p2pfl.node.clock import Timeouts
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import RunRecords, read_run

NAMES = [f"node-{i}" for i in range(6)]
RING = [[i, (i + 1) % 6, 1 / 3] for i in range(6)]
SIZE = 1000


def recorded(*, train=None, ways=None, checkpoint=None, rounds=20, edges=RING, size=SIZE, local_steps=5, latenesses=True, **changes):
    """Records of nodes in step, whose times follow from what each takes; each node's clock begins at another time."""
    train, ways, checkpoint = {**dict.fromkeys(range(6), 0.1), **(train or {})}, ways or {}, checkpoint or {}
    ends = [(i, j) for i, j, _ in edges]
    way = {pair: ways.get((i, j), 0.01) for i, j in ends for pair in ((i, j), (j, i))}
    sent, rows = dict.fromkeys(range(6), 0.0), []
    begun = dict(sent)
    for number in range(rounds):
        sends = {i: begun[i] + train[i] for i in range(6)}
        came = {(j, i): sends[j] + way[j, i] for j, i in way}
        over = {i: max([sends[i], *(at for (_, to), at in came.items() if to == i)]) for i in range(6)}
        for i in range(6):
            seconds = {"train": train[i], "wait": over[i] - sends[i], "mix": 0.002, "evaluate": 0.0, "checkpoint": checkpoint.get(i, 0.003)}
            late = {NAMES[j]: came[j, i] - sends[i] for j, to in way if to == i}
            known = {"lateness": late, "sending_s": 0.001} if latenesses else {}
            degree = sum(i in pair for pair in ends)
            rows.append(
                {
                    "round": number,
                    "node": NAMES[i],
                    "kind": "train",
                    "skipped": [],
                    "bytes_sent": size * degree,
                    "seconds": seconds,
                    **known,
                }
            )
            begun[i] = over[i] + 0.002 + checkpoint.get(i, 0.003)
    graph = {"nodes": NAMES, "edges": [list(edge) for edge in edges]}
    found = {
        "experiment": {"name": "planted", "algorithm": {"name": "dpsgd", "local_steps": local_steps}},
        "environment": {"engine": "daemons"},
        "topology": graph,
        "rounds": [],
        "nodes": rows,
        "events": [],
        "summary": None,
    }
    return RunRecords(**{**found, **changes})


def test_nothing_is_said_where_nothing_stands_out():
    assert bottleneck(recorded()) is None
    assert bottleneck(recorded(train={2: 0.105})) is None


def test_a_slow_node_is_named_with_what_a_faster_one_would_save():
    found = bottleneck(recorded(train={2: 0.4}))

    assert (found.kind, found.names) == ("training", ("node-2",))
    assert found.round_s == pytest.approx(0.415, rel=0.05)  # nodes far from it feel it some rounds later
    assert found.sentence == (
        "node-2 costs most: it trains for 400 ms a round, the median node for 100 ms. The others wait for it: 290 ms of a round of 405 ms."
    )
    gains = {remedy.kind: remedy.gain for remedy in found.remedies}
    assert gains == pytest.approx({"as the others": 290 / 405, "no waiting": 290 / 405}, rel=1e-6)
    assert "a round would take 115 ms instead of 405 ms (72% less)" in found.remedies[0].sentence
    assert "rounds 0-19" in found.method


def test_two_slow_nodes_save_nothing_alone_and_the_slower_is_named():
    found = bottleneck(recorded(train={2: 0.4, 5: 0.2}))

    assert found.names == ("node-2",)
    (gain,) = {round(remedy.gain, 6) for remedy in found.remedies}
    assert gain == round((0.405 - 0.205) / 0.405, 6)


def test_a_slow_disk_is_told_from_slow_training():
    found = bottleneck(recorded(checkpoint={4: 0.2}))

    assert (found.kind, found.names) == ("disk", ("node-4",))
    assert "writes its checkpoint for 200 ms a round, the median node for 3 ms" in found.sentence
    assert "a faster disk" in found.remedies[0].sentence


def test_a_far_link_is_named_and_a_compressor_is_not_advised():
    found = bottleneck(recorded(ways={(2, 3): 0.5}))

    assert (found.kind, found.names) == ("edge", ("node-2", "node-3"))
    assert "an update takes 500 ms over it, 10 ms over the median one" in found.sentence
    assert "With updates of 1 kB the link is far, not narrow: a compressor would not help." in found.sentence
    gains = {remedy.kind: remedy.gain for remedy in found.remedies}
    # the ring without the link is a path, which mixes in more and shorter rounds
    assert gains.keys() == {"graph", "local steps"}
    assert gains["local steps"] == pytest.approx(1 - (0.605 + 0.1) / 2 / 0.605, rel=1e-6)
    assert "With algorithm.local_steps 10 instead of 5" in next(r.sentence for r in found.remedies if r.kind == "local steps")


def test_a_link_with_large_updates_may_be_narrow():
    found = bottleneck(recorded(ways={(2, 3): 0.5}, size=10**7))
    (compressor,) = (remedy for remedy in found.remedies if remedy.kind == "compressor")

    assert compressor.gain == pytest.approx(0.25 / 0.605, rel=1e-6)
    assert "halves updates of 10 MB (fp16)" in compressor.sentence


def test_a_graph_that_falls_apart_without_the_link_is_not_advised():
    path = [[i, i + 1, 1 / 3] for i in range(5)]
    found = bottleneck(recorded(ways={(2, 3): 0.5}, edges=path))

    assert found.names == ("node-2", "node-3")
    assert {remedy.kind for remedy in found.remedies} == {"local steps"}


def test_clocks_of_the_nodes_are_not_compared():
    """A node may begin late, and each edge's way follows from what both ends saw all the same."""
    run = recorded(ways={(2, 3): 0.5})
    late = {row["node"]: row["lateness"] for row in run.nodes if row["round"] == 10}

    assert late["node-2"]["node-3"] + late["node-3"]["node-2"] == pytest.approx(1.0)
    assert late["node-0"]["node-1"] + late["node-1"]["node-0"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 4},
        {"environment": {"engine": "simulator"}},
        {"experiment": {"pace": {"name": "asynchronous"}}},
        {"topology": None},
        {"topology": {"nodes": [*NAMES, "node-6"], "edges": RING}},
        {"nodes": []},
    ],
)
def test_nothing_is_said_where_the_figures_are_not_known(changes):
    assert bottleneck(recorded(train={2: 0.4}, **changes)) is None


def test_records_that_do_not_explain_their_own_rounds_explain_nothing():
    run = recorded(train={2: 0.4})
    for row in run.nodes:
        row["seconds"]["wait"] += 0.3  # of something that nobody recorded

    assert bottleneck(run) is None


def test_an_older_run_without_lateness_still_shows_a_slow_node_and_no_link():
    assert bottleneck(recorded(train={2: 0.4}, latenesses=False)).names == ("node-2",)
    assert bottleneck(recorded(ways={(2, 3): 0.5}, latenesses=False)) is None


def test_fractions_of_a_round_are_of_each_node():
    found = utilisation(recorded(train={2: 0.4}))

    assert list(found) == NAMES
    for own in found.values():
        assert sum(own.fractions.values()) == pytest.approx(1)
        assert own.sending == pytest.approx(0.001 / own.round_s)
    assert found["node-2"].fractions["train"] > 0.9 > found["node-5"].fractions["train"]
    assert utilisation(recorded(latenesses=False))["node-0"].sending is None


def text_of(run):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(page(run))
    return console.export_text()


def test_terminal_and_page_say_who_costs_most_and_who_waits_least():
    slow, even = recorded(train={2: 0.4}), recorded()

    for told in (text_of(slow), time_spent(slow)):
        assert "node-2 costs most: it trains for" in " ".join(told.split())
        assert told.index("node-2") < told.index("node-5")
    assert "costs most" not in text_of(even) + time_spent(even)
    assert time_spent(recorded(nodes=[])) == ""


PATIENT = {"deadline_floor_s": 30.0, "linger_s": 20.0, "start_within_s": 30.0}
SLOW_NODE, SLOW_LINK = "node-2", {"node-0", "node-1"}


class FarLink(Line):
    """A node's links, over one of which updates take a while."""

    async def send(self, peer, frames, timeout_s):
        if len(frames) > 1 and {self.me, peer} == SLOW_LINK:
            await asyncio.sleep(0.25)
        await super().send(peer, frames, timeout_s)


@pytest.mark.parametrize("planted", [pytest.param("node", marks=pytest.mark.slow), "link"])
def test_real_nodes_record_who_was_slow(tmp_path, monkeypatch, planted):
    """Daemons in this process, of which one trains for long, or two have a link that is far."""
    training = {"task": {"name": "synthetic-logistic", "features": 3, "samples": 12}, "nodes": 4, "topology": {"name": "ring"}}
    experiment = {**training, "rounds": 6, "stop": None}
    timeouts = {SLOW_NODE: Timeouts(**PATIENT, round_at_least_s=0.4)} if planted == "node" else {}

    def line(inner):
        made = (Line if planted == "node" else FarLink)(inner)
        made.me = inner.name
        return made

    monkeypatch.setattr("networks.Line", line)

    async def main():
        async with Network(plan_of(**experiment), tmp_path / "nodes", timeouts_of=timeouts) as network:
            network.start()
            assert set(await network.ended()) == {"rounds"}
        plan = network.plan
        folder = RunFolder.create(tmp_path / "run", plan.experiment.as_dict(), topology=plan.graph_record(), engine="daemons")
        folder.append_node(*(row for name in plan.names for row in network.rows(name)))

    finish(main())
    run = read_run(tmp_path / "run")
    late = {
        (row["node"], name): np.median([each["lateness"][name] for each in run.nodes if each["node"] == row["node"]])
        for row in run.nodes
        for name in row["lateness"]
    }
    found = bottleneck(run)  # None: a busy machine made the rounds uneven

    assert len(late) == 8
    assert all(row["sending_s"] >= 0 for row in run.nodes)
    if planted == "node":
        assert late["node-1", SLOW_NODE] > 0.2 > late[SLOW_NODE, "node-1"]
        assert utilisation(run)[SLOW_NODE].fractions["train"] > 0.5
        assert found is None or found.names == (SLOW_NODE,)
    else:
        assert late["node-0", "node-1"] + late["node-1", "node-0"] > 0.45
        assert found is None or set(found.names) == SLOW_LINK
    document = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "run"), "--json"]).output)
    assert document["utilisation"].keys() == {f"node-{i}" for i in range(4)}
    assert (document["bottleneck"] is None) == (found is None)
