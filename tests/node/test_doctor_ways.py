"""`p2pfl doctor` at sites whose edges a relay or a broker carries, and whose links go through a proxy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from clinics import DIALS, EXAMPLES, LISTENS, Clinics, founded

from links import Beside
from mosquitto import Mosquitto
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.doctor.checks import CHECKS, examine
from p2pfl.node.doctor.examination import Examination
from p2pfl.node.own_links import own_links
from p2pfl.node.site import SiteFile
from p2pfl.topology import Topology
from p2pfl.transports import reserve_port
from p2pfl.yaml_files import dump_yaml, load_yaml
from site_proxy import SiteProxy

RELAY = "hospital-c"


@pytest.fixture
def clinics(tmp_path, monkeypatch) -> Iterator[Clinics]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with ExitStack() as ports:
        yield founded(tmp_path, ports)
    sys.modules.pop("custom_task", None)


def without_addresses(clinics: Clinics, *, own: str | None = None, relay: str | None = None) -> None:
    """Nobody can dial the two hospitals: a third one relays, or a broker carries their edge."""
    cards = [Identity.load(clinics.place / name / "keys").card(name) for name in (LISTENS, DIALS)]
    edges = [(0, 1)]
    if relay is not None:
        cards.append(Identity.new().card(RELAY, own, relay=relay))
        edges += [(0, 2), (1, 2)]

    def carried(study: Study) -> Study:
        ends = [*edges, *((b, a) for a, b in edges)]
        names, weights = [card.name for card in cards], [0.3] * len(ends)
        graph = Topology.from_edges("given", len(cards), *map(list, zip(*ends, strict=True)), names=names, weights=weights)
        return Study.create(study.experiment, cards, graph, transport=None if relay is not None else "mqtt")

    clinics.make_again(carried)
    for name in (LISTENS, DIALS):
        clinics.set(name, listen=None)


def seen(clinics: Clinics, name: str, wait_s: float = 0.5) -> tuple[list[str], dict[str, str]]:
    """Faults and facts of a site, without those of edges to the relay itself."""
    report = examine(Examination(path=clinics.site(name), wait_s=wait_s))
    assert {check for check, _ in report.noted} >= {check.name for check in CHECKS} - {"names", "table"}
    return [found.text for _, found in report.findings], {fact.what: fact.said for _, fact in report.facts}


@pytest.fixture
def beside() -> Iterator[Beside]:
    beside = Beside()
    yield beside
    beside.close()


PROXIES = {
    "refuses": ({"refuses": 403}, "it does not let this site connect to 127.0.0.1:"),
    "wants a password": ({"login": ("site", "open-sesame")}, "it wants a password (407"),
}


@pytest.mark.parametrize("case", PROXIES)
def test_a_proxy_that_lets_nobody_out_is_found_with_its_reason(case, clinics, beside):
    options, words = PROXIES[case]
    clinics.set(DIALS, proxy={"address": beside.open(SiteProxy("http", **options)).address})
    faults, _ = seen(clinics, DIALS)

    assert len(faults) == 1, faults
    assert faults[0].startswith(f"this site dials {LISTENS} at tcp://127.0.0.1:")
    assert words in faults[0]
    assert faults[0].endswith("; mend proxy in site.yaml, or ask whoever runs the proxy to let this node out")


def test_a_missing_password_of_the_proxy_is_found(clinics, monkeypatch):
    monkeypatch.delenv("P2PFL_PROXY_PASSWORD", raising=False)
    clinics.set(DIALS, proxy={"address": "http://127.0.0.1:3128", "user": "site"})
    faults, facts = seen(clinics, DIALS)

    assert faults == [
        "proxy.user = 'site': no password; write proxy.password_file, a file that only this account can read, or set P2PFL_PROXY_PASSWORD"
    ]
    assert "training" in facts


def test_an_edge_that_has_no_relay_is_found(clinics):
    """Nobody makes such a study with the command: somebody has changed the file by hand, or an earlier version has made it."""
    cards = [Identity.load(clinics.place / name / "keys").card(name) for name in (LISTENS, DIALS)]
    path = clinics.place / "study.yaml"
    path.write_text(dump_yaml({**load_yaml(path), "members": [card.as_dict() for card in cards]}))
    report = examine(Examination(path=clinics.site(DIALS), wait_s=0.0))

    assert [check for check, _ in report.findings] == ["study"]
    text = report.findings[0][1].text
    assert f"{LISTENS} - {DIALS}: neither has an address, so that neither can dial the other" in text
    assert "a third member must offer to relay on its card (p2pfl keys new --relay tcp://host:port)" in text


def test_a_broker_that_drops_what_is_published_is_found(clinics, beside, monkeypatch):
    monkeypatch.setattr("p2pfl.transports.sockets.HANDSHAKE_S", 1.0)
    rules = clinics.place / "rules"
    rules.write_text("topic write p2pfl/#\n")
    without_addresses(clinics)
    broker = Mosquitto(["allow_anonymous true"], [f"acl_file {rules}"]).start()
    try:
        for name in (LISTENS, DIALS):
            clinics.set(name, mqtt={"host": "127.0.0.1", "port": broker.port, "tls": False})
        other, study = SiteFile.load(clinics.site(LISTENS)), clinics.study
        beside.open(own_links(other, study, study.member(LISTENS), Identity.load(other.keys).curve_secret))
        faults, _ = seen(clinics, DIALS, wait_s=3.0)
    finally:
        broker.close()

    assert len(faults) == 1, faults
    assert faults[0].startswith(
        f"the edge to {LISTENS}, over the broker, has no link: {LISTENS} does not answer at the broker mqtt://127.0.0.1:"
    )
    assert "or the broker does not pass on what is published under p2pfl/" in faults[0]
    assert faults[0].endswith("and whoever runs the broker to let both ends read and write p2pfl/#")


def test_an_edge_over_a_broker_is_shown_as_one_and_all_else_is_looked_at(clinics):
    without_addresses(clinics)
    with reserve_port() as port:
        for name in (LISTENS, DIALS):
            clinics.set(name, mqtt={"host": "127.0.0.1", "port": port.port, "tls": False})
        faults, facts = seen(clinics, DIALS)

    assert len(faults) == 1
    assert faults[0].startswith(f"the edge to {LISTENS}, over the broker, has no link: ")
    assert faults[0].endswith("; mend mqtt in site.yaml, or ask whoever runs the broker whether it runs and lets this site in")
    assert "round" in facts


def test_a_relayed_edge_is_shown_with_its_relay_and_all_else_is_looked_at(clinics):
    with reserve_port() as own, reserve_port() as port:
        without_addresses(clinics, own=own.address, relay=port.address)
        faults, facts = seen(clinics, DIALS)

    (relayed,) = [text for text in faults if "the edge to" in text]
    assert relayed.startswith(f"the edge to {LISTENS}, relayed by {RELAY}, has no link: ")
    assert f"; ask {RELAY} whether its node runs with relay in its site.yaml" in relayed
    assert "round" in facts


def test_names_are_not_looked_up_where_the_proxy_does_it(clinics, monkeypatch):
    card = Identity.load(clinics.place / LISTENS / "keys").card(LISTENS, "tcp://node.hospital-a.invalid:7700")
    clinics.make_again(
        lambda study: Study.from_mapping({**study.as_dict(), "members": [card.as_dict(), study.member(DIALS).as_dict()]}, "the study")
    )
    with reserve_port() as port:
        clinics.set(DIALS, proxy={"address": f"http://127.0.0.1:{port.port}"})
        faults, facts = seen(clinics, DIALS)

    assert facts["names"] == "the proxy looks them up, and not this machine"
    assert len(faults) == 1
    assert faults[0].endswith("; mend proxy in site.yaml, or ask whoever runs the proxy to let this node out")
