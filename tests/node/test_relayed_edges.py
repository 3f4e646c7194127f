"""Daemons whose edge is relayed by a member that is nobody's neighbour there."""

from __future__ import annotations

import pytest
import torch

from links import Beside, ZeroMQLinks
from networks import HASTY, PATIENT, Institutions, Network, averaging, finish, until, wait_until
from p2pfl.errors import ConfigError
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.dialling import RelaySettings
from p2pfl.node.own_links import own_links
from p2pfl.node.site import SiteFile
from p2pfl.transports import LinksByKind, RelayService, ZeroMQTransport, reserve_port
from p2pfl.transports.relay import join_relays
from recorder import Recorder
from site_proxy import SiteProxy

HIDDEN = ("node-1", "node-2")
RELAY = "node-4"
PASSWORD = "open-sesame"


@pytest.fixture
def wire():
    """A wire to the relay's port that keeps a copy of what passes, that port, and a proxy that wants a password."""
    beside = Beside()
    with reserve_port() as port:
        yield beside.open(_made(beside, port.port)), port, beside.open(SiteProxy("http", login=("site", PASSWORD)))
    beside.close()


def port_of(address):
    return int(address.rpartition(":")[2])


def _made(beside, port):
    async def make():
        return Recorder(port)

    return beside.call(make())


@pytest.mark.slow
def test_a_relayed_edge_gives_the_same_weights_and_shows_the_relay_nothing(tmp_path, wire):
    plan = averaging({"name": "ring"}, 5)
    recorder, port, proxy = wire

    async def direct():
        async with Network(plan, tmp_path / "direct", timeouts=PATIENT) as network:
            network.start()
            await network.ended()
            return network.models()

    expected = finish(direct(), 120)
    relays = {RELAY: (recorder.address, {"mbit_s": 20, "listen": port.address})}
    with Institutions(plan, tmp_path, via=lambda name, own: None if name in HIDDEN else own, relays=relays) as institutions:
        kinds = institutions.study.edge_kinds()

        assert {ends: found.relay for ends, found in kinds.items() if found.relay is not None} == {HIDDEN: RELAY}
        assert not set(HIDDEN) & set(institutions.study.neighbours(RELAY))

        behind = institutions.site(HIDDEN[1])
        behind.write_text(behind.read_text() + f"proxy: {{address: '{proxy.address}', user: site, password_file: password}}\n")
        (behind.parent / "password").write_text(PASSWORD)
        (behind.parent / "password").chmod(0o600)
        institutions.start()
        wait_until(institutions.is_over)

        assert [institutions.exit_code(name) for name in plan.names] == [0] * 5
        assert not any(row["skipped"] for name in plan.names for row in institutions.rows(name))
        assert torch.equal(institutions.models(), expected)
        secrets = [*plan.names, institutions.study.digest, "averaging", "schema", "exchange"]
        assert {place for _, place in proxy.targets} == {port_of(recorder.address), port_of(institutions.study.member("node-3").address)}
        assert PASSWORD not in (behind.parent / "node.log").read_text()
        models = [row.numpy().tobytes()[:8] for row in institutions.models()]
    heard = b"\0".join(recorder.heard)

    assert len(heard) > 10_000
    assert [said for said in secrets if said.encode() in heard] == []
    assert bytes.fromhex(institutions.study.digest)[:16] not in heard
    assert [model for model in models if model in heard] == []


def members(hidden=(), relays=()):
    identities = {f"node-{i}": Identity.new() for i in range(5)}
    cards = [
        identity.card(
            name,
            None if name in hidden else f"tcp://127.0.0.1:{7700 + i}",
            relay=f"tcp://127.0.0.1:{7800 + i}" if name in relays else None,
        )
        for i, (name, identity) in enumerate(identities.items())
    ]
    return identities, cards


def links_of(name, study, identities, tmp_path, **settings):
    site = SiteFile(member=name, study=tmp_path / "study.yaml", **settings)
    return own_links(site, study, study.member(name), identities[name].curve_secret)


def test_each_node_gets_the_links_that_the_study_has_for_it(tmp_path):
    plan = averaging({"name": "ring"}, 5)
    identities, cards = members(HIDDEN, [RELAY])
    study = Study.create(plan.experiment.as_dict(), cards, plan.topology)
    assert isinstance(links_of("node-0", study, identities, tmp_path), ZeroMQTransport)
    assert isinstance(links_of("node-1", study, identities, tmp_path), LinksByKind)
    offered = links_of(RELAY, study, identities, tmp_path, relay=RelaySettings(mbit_s=20))
    assert isinstance(offered, LinksByKind)
    assert offered.counters["relayed"] == 0
    with pytest.raises(ConfigError, match=r"the study needs it for node-1 - node-2; write how much, such as relay: \{mbit_s: 20\}"):
        links_of(RELAY, study, identities, tmp_path)


def test_an_offer_to_relay_stands_on_the_card_and_in_the_site_file(tmp_path):
    plan = averaging({"name": "ring"}, 5)
    identities, cards = members()
    study = Study.create(plan.experiment.as_dict(), cards, plan.topology)

    with pytest.raises(ConfigError, match="relay: this site offers it here and not on its card"):
        links_of(RELAY, study, identities, tmp_path, relay=RelaySettings(mbit_s=20))


def test_the_end_of_a_relay_costs_its_edge_and_no_node(tmp_path):
    plan = averaging({"name": "ring"}, 3, tolerance=1e-300)
    links = RelayedPair(plan.names[0], plan.names[1])
    a, b, _ = plan.names

    async def main():
        async with Network(plan, tmp_path, links=links, timeouts=HASTY) as network:
            async with links.service():
                network.start()
                await network.reached(2)
                await until(lambda: network.nodes[a].daemon.node.transport.link(b).is_up)
            await until(lambda: network.rows(a) and network.rows(a)[-1]["skipped"] == [b])
            began = network.round(a)
            await network.reached(began + 3)
            async with links.service():
                await until(lambda: network.nodes[a].daemon.node.transport.link(b).is_up)
                began = network.round(a)
                await until(lambda: any(row["skipped"] == [] for row in network.rows(a) if row["round"] > began))

    try:
        finish(main(), 60)
    finally:
        links.close()


class RelayedPair(ZeroMQLinks):
    """Links over ZeroMQ, of which one is relayed by a third party."""

    def __init__(self, one, other):
        super().__init__()
        self.pair = (one, other)
        self.relay = self.endpoint("relay")

    def service(self):
        pairs = [tuple(map(self.endpoint, self.pair))]
        return RelayService(self.relay, self.keys["relay"][1], pairs, listen=self.ports["relay"].address, mbit_s=100)

    def member(self, name, neighbours, **options):
        relayed = [peer for peer in neighbours if {name, peer} == set(self.pair)]
        direct = super().member(name, [peer for peer in neighbours if peer not in relayed], **options)
        made = dict.fromkeys(neighbours, direct)
        if relayed:
            ends = map(self.endpoint, relayed)
            secret = self.keys[name][1]
            through = join_relays(self.endpoint(name), secret, ends, relays=dict.fromkeys(relayed, self.relay), **options)
            made |= dict.fromkeys(relayed, through)
        return LinksByKind(name, made)
