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


def listed_by_the_command(institutions, name, *options, monkeypatch, capfd):
    code, said, errors = run_here("node", "egress", institutions.site(name), *options, monkeypatch=monkeypatch, capfd=capfd)
    return code, said or errors


def test_the_way_of_each_edge_is_listed_and_what_is_relayed_for_others(tmp_path, monkeypatch, capfd):
    """hospital-0 and hospital-1 have no address, and hospital-3, which relays their edge, is no neighbour of theirs."""
    plan = plan_with(nodes=4)
    proxy = {"address": "http://proxy.example:3128", "user": "site", "password_file": "missing"}
    hidden = {"via": lambda name, own: None if name in ("hospital-0", "hospital-1") else own}
    options = {"relays": {"hospital-3": ("tcp://relay.example:7701", {"mbit_s": 20})}, "settings_of": {"hospital-1": {"proxy": proxy}}}
    with Institutions(plan, tmp_path, **hidden, **options) as institutions:
        where = {"monkeypatch": monkeypatch, "capfd": capfd}
        code, said = listed_by_the_command(institutions, "hospital-1", **where)
        assert code == 0
        relayed_ = "to hospital-0: relayed by hospital-3, which this site dials at tcp://relay.example:7701 through the proxy"
        assert f"{relayed_} http://proxy.example:3128; hospital-3 sees who the two ends are, when they talk, and sealed bytes" in said
        address = institutions.study.member("hospital-2").address
        assert f"to hospital-2: directly, and this site dials {address} through the proxy http://proxy.example:3128; the proxy sees" in said
        assert "request to the relay, to hospital-3, whenever a connection is made, at most 128 bytes: public keys" in said
        assert "request to the proxy, to http://proxy.example:3128, whenever a connection is made: host and port" in said

        code, said = listed_by_the_command(institutions, "hospital-3", **where)
        assert (code, "to hospital-2: directly, and this site dials" in said, "proxy" in said) == (0, True, False)
        assert "relayed for others: what hospital-0 - hospital-1 send each other comes in here sealed" in said
        assert "at most 20 Mbit/s in all" in said

        code, said = listed_by_the_command(institutions, "hospital-2", "--json", **where)
        assert json.loads(said)["relayed"] is None
        assert [(way["neighbour"], way["dialled"], way["relay"]) for way in json.loads(said)["ways"]] == [
            ("hospital-1", [], None),
            ("hospital-3", [], None),
        ]


def test_a_broker_is_listed_and_asked_for_where_it_is_missing(tmp_path, monkeypatch, capfd):
    plan = plan_with()
    settings = {"hospital-0": {"mqtt": {"host": "broker.example", "username": "site", "password_file": "missing"}}}
    with Institutions(plan, tmp_path, transports={("hospital-0", "hospital-1"): "mqtt"}, settings_of=settings) as institutions:
        where = {"monkeypatch": monkeypatch, "capfd": capfd}
        code, said = listed_by_the_command(institutions, "hospital-0", **where)
        assert code == 0
        assert "to hospital-1: over the MQTT broker mqtts://broker.example:8883, which this site dials; the broker sees the study" in said
        assert "login at the broker, to mqtts://broker.example:8883, whenever a connection is made: a random name" in said

        code, said = listed_by_the_command(institutions, "hospital-1", **where)
        assert (code, "mqtt = null: the study has the links to hospital-0 go over an MQTT broker" in said) == (2, True)
