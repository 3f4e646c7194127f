"""`p2pfl node egress` lists what leaves a site; the bytes are those that a run then sends."""

from __future__ import annotations

import json

import pytest

from commands import run_here
from networks import Institutions, Network, finish, plan_of
from p2pfl.governance.identity import Identity
from p2pfl.node.egress import egress_of
from p2pfl.protocol.network_view import ViewPolicy
from p2pfl.wire.codec import encode

ALGORITHMS = [
    {"algorithm": {"name": "gradient-tracking"}},
    {"algorithm": {"name": "choco"}, "compressor": {"name": "top-k", "share": 0.25}},
]


def plan_with(**experiment):
    return plan_of(
        **{
            "task": {"name": "breast-cancer"},
            "nodes": 3,
            "partition": {"name": "iid"},
            "topology": {"name": "path"},
            "rounds": 3,
            "stop": None,
        }
        | experiment
    )


def listed(plan, name, **policy):
    return egress_of(plan, Identity.new().card(name, "tcp://127.0.0.1:7700", 40), ViewPolicy(**policy), heartbeat_s=2)


@pytest.mark.parametrize("experiment", ALGORITHMS, ids=lambda experiment: experiment["algorithm"]["name"])
def test_a_run_sends_as_many_bytes_as_were_listed(experiment, tmp_path):
    plan = plan_with(**experiment)

    async def run() -> Network:
        async with Network(plan, tmp_path) as network:
            network.start()
            await network.ended()
            return network

    network = finish(run())
    for name in plan.names:
        found = listed(plan, name)
        sent = {row["bytes_sent"] for row in network.rows(name)}

        assert tuple(plan.neighbours(name)) == found.receivers
        assert sent == {found.round_bytes}


def test_tensors_are_named_with_their_shapes():
    found = listed(plan_with(), "hospital-1")

    assert [(one.channel, one.dtype, one.shape, one.size_bytes) for one in found.tensors] == [("x", "float32", (31,), 124)]
    assert found.travels == ("weight float32 1 x 30", "bias float32 1")
    assert (found.stays, found.is_most) == ((), False)


def test_no_handshake_of_a_run_is_longer_than_listed(tmp_path):
    plan = plan_with()
    longest = next(one.most_bytes for one in listed(plan, "hospital-0").messages if one.what == "handshake")
    network = Network(plan, tmp_path)

    async def start() -> int:
        async with network:
            network.start("hospital-0")
            protocol = network.nodes["hospital-0"].daemon.protocol
            return max(len(encode(protocol.stopping.hello(each))[0]) for each in protocol.neighbours.values())

    assert 0.5 * longest < finish(start()) <= longest


def test_a_full_update_goes_on_request_only():
    found = listed(plan_with(**ALGORITHMS[1]), "hospital-0")

    always, on_request = ({one.channel for one in found.tensors if one.on_request == asked} for asked in (False, True))
    assert "xhat" in on_request - always
    assert always - on_request


def test_personal_tensors_are_listed_as_those_that_stay():
    found = listed(plan_with(personal=["bias"]), "hospital-0")

    assert found.stays == ("bias (personal)",)
    assert [one.shape for one in found.tensors] == [(30,)]


def test_a_site_that_says_less_to_the_network_is_listed_so():
    open_, closed = listed(plan_with(), "hospital-0"), listed(plan_with(), "hospital-0", metrics=False, counts="withheld")

    assert "auroc" in next(one.holds for one in open_.messages if one.what == "round record, signed")
    holds = next(one.holds for one in closed.messages if one.what == "round record, signed")
    assert "neither losses nor metrics; not how many rows it has" in holds


def test_the_command_lists_it_for_people_and_for_machines(tmp_path, monkeypatch, capfd):
    with Institutions(plan_with(), tmp_path) as institutions:
        site = institutions.site("hospital-1")
        code, said, _ = run_here("node", "egress", site, monkeypatch=monkeypatch, capfd=capfd)
        assert code == 0
        assert "hospital-1 sends updates to hospital-0, hospital-2" in said
        assert "made of the model's weight float32 1 x 30, bias float32 1" in said
        assert "What stays: rows, labels, groups, private keys" in said

        code, said, _ = run_here("node", "egress", site, "--json", monkeypatch=monkeypatch, capfd=capfd)
        found = json.loads(said)
        assert (code, found["receivers"]) == (0, ["hospital-0", "hospital-2"])
        assert found["round_bytes"] == 2 * found["update_bytes"]
