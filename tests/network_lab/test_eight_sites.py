"""Eight sites with firewalls, a proxy and slow lines between them: real daemons, each in a network namespace of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import msgpack
import pytest
import torch
from lab import LabProcess, NetworkLab
from packets import Flow

from links import MemoryLinks
from mosquitto import program
from networks import DEADLINE_S, PATIENT, Institutions, Network, finish, plan_of, wait_until
from p2pfl.governance.edge_kinds import BROKER as OVER_BROKER
from p2pfl.governance.edge_kinds import RELAY

PORT, RELAY_PORT, PROXY_PORT, BROKER_PORT = 7700, 7701, 3128, 1883
SITES = tuple(f"hospital-{number}" for number in range(8))
HIDDEN = (SITES[2], SITES[3])
"""Neighbours that let nobody in."""
RELAYING = SITES[6]
BEHIND_PROXY = SITES[5]
APART = (SITES[0], SITES[7])
"""Neighbours whose packets never reach each other: they share a broker."""
PROXY, BROKER = "proxy", "broker"
LINES = {"delay_s": 0.040, "jitter_s": 0.010, "loss": 0.01, "bytes_per_s": 20e6 / 8}

EXPERIMENT = {
    "topology": {"name": "ring"},
    "algorithm": {"name": "dpsgd", "local_steps": 10, "batch_size": 8},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "rounds": 12,
    "stop": None,
    "seed": 16,
}
needs_heart_disease = pytest.mark.skipif(
    "P2PFL_DATA" not in os.environ, reason="P2PFL_DATA is not set: the four files of heart-disease are not here"
)


class Hospitals(Institutions):
    """The daemons of the sites, in the lab."""

    def __init__(self, plan, place: Path, lab: NetworkLab) -> None:
        self.lab = lab
        # a machine with much else to do may need a minute to make a link anew: nobody is to be given up because of that
        for_all = {"listen": f"tcp://*:{PORT}", "heartbeat_s": 2, "linger_s": 20.0, "deadline_floor_s": DEADLINE_S / 2}
        only_dial = {name: {"listen": None} for name in (*HIDDEN, BEHIND_PROXY)}
        only_dial[BEHIND_PROXY] |= {"proxy": {"address": f"http://{lab.addresses[PROXY]}:{PROXY_PORT}"}}
        broker = {"mqtt": {"host": lab.addresses[BROKER], "port": BROKER_PORT, "tls": False}}
        super().__init__(
            plan,
            place,
            via=lambda name, _: None if name in only_dial else f"tcp://{lab.addresses[name]}:{PORT}",
            relays={RELAYING: (f"tcp://{lab.addresses[RELAYING]}:{RELAY_PORT}", {"mbit_s": 20})},
            transports={APART: OVER_BROKER},
            settings_of={**only_dial, **dict.fromkeys(APART, broker)},
            **for_all,
        )

    def start_one(self, name: str, *arguments: str, log: Path) -> LabProcess:
        return self.lab.start_node(name, name, *arguments, log=log)


class Undisturbed:
    """The same run over links in memory, and all that was said there."""

    def __init__(self, plan, place: Path) -> None:
        links = MemoryLinks(max_queued=32)
        self.frames: list[bytes] = []
        network = Network(plan, place, links=links, timeouts=PATIENT)
        links.network.lost = self._hear

        async def run() -> None:
            async with network:
                network.start()
                await network.ended()

        finish(run())
        self.models = network.models()
        self.auroc = {name: auroc(network.summary(name), name) for name in plan.names}

    def _hear(self, _sender: str, _receiver: str, frames: tuple[memoryview, ...]) -> bool:
        self.frames += map(bytes, frames)
        return False

    def secrets(self) -> set[bytes]:
        """Pieces of all models that travelled, and words of the headers."""
        headers, payloads = set(), set()
        for frame in self.frames:
            try:
                headers |= set(words(msgpack.unpackb(frame)))
            except (ValueError, msgpack.UnpackException):
                payloads |= {frame[at : at + 8] for at in range(0, len(frame) - 7, 8)}
        assert len(payloads) > 500
        assert b"exchange" in headers
        return {secret for secret in headers | payloads if len(set(secret)) > 4}  # such as zeros are no secret


def words(header: object) -> Iterable[bytes]:
    """Every text and every bytes in a header, keys included."""
    if isinstance(header, dict):
        yield from chain.from_iterable(words(each) for each in chain(header.keys(), header.values()))
    elif isinstance(header, list):
        yield from chain.from_iterable(map(words, header))
    elif isinstance(header, str | bytes):
        yield header.encode() if isinstance(header, str) else header


def auroc(summary, name):
    return summary["metrics"].get("auroc", {"per_node": {}})["per_node"].get(name)


def ran_to_their_ends(hospitals: Hospitals, deadline_s: float) -> None:
    try:
        wait_until(hospitals.is_over, deadline_s)
    except AssertionError:
        running = [name for name in SITES if hospitals.exit_code(name) is None]
        pytest.fail(f"still running after {deadline_s:g} s: {running}\n{hospitals.account_of(*running)}")


def said(streams: dict[Flow, list[bytes]], *hosts: str) -> bytes:
    """What passed between two hosts, or to and from one, or between all."""
    ends = set(hosts)
    return b"\0".join(piece for (a, _, b, _), pieces in streams.items() for piece in pieces if ends <= {a, b})


@pytest.mark.slow
@pytest.mark.parametrize("task", ["breast-cancer", pytest.param("heart-disease", marks=needs_heart_disease)])
def test_eight_sites_behind_firewalls_come_to_the_undisturbed_result(task, tmp_path):
    plan = plan_of(task={"name": task, "nodes": len(SITES)}, **EXPERIMENT)
    assert tuple(plan.names) == SITES
    expected = Undisturbed(plan, tmp_path / "undisturbed")
    rules = {"closed": (*HIDDEN, BEHIND_PROXY), "only_to": {BEHIND_PROXY: [PROXY]}, "apart": [APART]}

    mosquitto = program()
    with NetworkLab([*SITES, PROXY, BROKER], tmp_path, **rules, **LINES) as lab, Hospitals(plan, tmp_path, lab) as hospitals:
        kinds = hospitals.study.edge_kinds()
        assert {ends: found.relay for ends, found in kinds.items() if found.kind == RELAY} == {HIDDEN: RELAYING}
        assert not set(HIDDEN) & set(hospitals.study.neighbours(RELAYING))
        proxy = Path(__file__).with_name("proxy.py")
        path = f"PYTHONPATH={os.pathsep.join(sys.path)}"
        lab.start(PROXY, PROXY, "env", path, sys.executable, str(proxy), str(PROXY_PORT), log=tmp_path / "proxy.log")
        settings = f"user root\npersistence false\nlistener {BROKER_PORT} 0.0.0.0\nallow_anonymous true\n"
        (tmp_path / "mosquitto.conf").write_text(settings)
        lab.start(BROKER, BROKER, mosquitto, "-c", str(tmp_path / "mosquitto.conf"), log=tmp_path / "broker.log")
        hospitals.start()
        ran_to_their_ends(hospitals, 2 * DEADLINE_S)

        hospitals.all_ended_as_agreed()
        missed = [row for name in SITES for row in hospitals.rows(name) if row["skipped"]]
        if missed:
            for name in SITES:
                assert auroc(hospitals.summary(name), name) == pytest.approx(expected.auroc[name], abs=0.005)
        else:
            torch.testing.assert_close(hospitals.models(), expected.models, rtol=0, atol=1e-6)

    assert lab.counters["lost"] > 0
    streams = lab.streams()
    for hidden in (HIDDEN, APART):
        assert said(streams, *hidden) == b""
    assert {b for a, _, b, _ in streams if a == BEHIND_PROXY} == {PROXY}
    assert f"CONNECT {lab.addresses[SITES[4]]}:{PORT}".encode() in said(streams, BEHIND_PROXY)  # what is plain is found
    digest = hospitals.study.digest
    assert f"p2pfl/{digest}/".encode() in said(streams, APART[0], BROKER)
    for pair in ((HIDDEN[0], RELAYING), (APART[1], BROKER)):
        assert len(said(streams, *pair)) > 10_000
        assert b"CURVE" in said(streams, *pair)

    everything = said(streams)
    secrets = {*expected.secrets(), task.encode(), *(name.encode() for name in SITES)} - {digest.encode()}

    assert [secret for secret in secrets if secret in everything] == []
    but_brokers = said({flow: pieces for flow, pieces in streams.items() if BROKER not in flow})
    assert [word for word in (digest.encode(), bytes.fromhex(digest)) if word in but_brokers] == []
