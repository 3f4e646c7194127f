"""Ways by which bytes leave a site: to a neighbour itself, through a proxy, a relay or a broker; and what it relays for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from p2pfl.governance.card import Card
from p2pfl.governance.edge_kinds import BROKER, DIRECT, RELAY
from p2pfl.governance.study import Study
from p2pfl.node.broker import settings_for
from p2pfl.node.own_links import relayed_pairs
from p2pfl.node.site import SiteFile
from p2pfl.transports.base import dials


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeWay:
    """The way of the bytes that leave over one edge."""

    neighbour: str
    carried: str
    """Kind of the edge's transport, as the study has it."""
    dialled: tuple[str, ...]
    """Addresses that this site connects to, of the neighbour, the relay or the broker; none where the neighbour dials this site."""
    relay: str | None = None
    """The member that relays the edge."""
    broker: str | None = None
    """The broker that both ends reach."""
    proxy: str | None = None
    """The proxy by which this site dials."""

    @property
    def text(self) -> str:
        """The way in words, with what those on it see."""
        at = ", ".join(self.dialled)
        by_proxy = f" through the proxy {self.proxy}" if self.proxy is not None else ""
        sees_proxy = ["the proxy sees where connections go, when, and how many bytes pass"]
        if self.relay is not None:
            said = f"relayed by {self.relay}, which this site dials at {at}{by_proxy}"
            sees = [f"{self.relay} sees who the two ends are, when they talk, and sealed bytes"]
        elif self.broker is not None:
            said = f"over the MQTT broker {self.broker}, which this site dials{by_proxy}"
            sees = ["the broker sees the study's digest, when they talk, and sealed bytes"]
        elif self.carried != DIRECT:
            return f"to {self.neighbour}: within this process"
        elif self.dialled:
            said, sees = f"directly, and this site dials {at}{by_proxy}", []
        else:
            said, sees = "directly, over the connection by which it dials this site", []
        return "; ".join([f"to {self.neighbour}: {said}", *sees, *(sees_proxy if self.proxy is not None else [])])


@dataclass(frozen=True, kw_only=True, slots=True)
class Relayed:
    """Edges of other members whose bytes pass through this site."""

    edges: tuple[tuple[str, str], ...]
    mbit_s: float
    """At most so many megabits a second leave here for all of them together, both directions."""

    @property
    def text(self) -> str:
        """Sentence on whose bytes leave here, and to whom."""
        pairs = ", ".join(f"{a} - {b}" for a, b in self.edges)
        return (
            f"relayed for others: what {pairs} send each other comes in here sealed, and leaves to the other end as it came, "
            f"at most {self.mbit_s:g} Mbit/s in all; nothing of this site is in it"
        )


def ways_of(site: SiteFile, study: Study, card: Card) -> tuple[EdgeWay, ...]:
    """Find how a site's bytes get to each of its neighbours.

    Raises:
        ConfigError: the study has a link go over a broker, and site.yaml names none.
    """
    if site.transport != DIRECT:
        return tuple(EdgeWay(neighbour=name, carried=site.transport, dialled=()) for name in study.neighbours(card.name))
    kinds = study.edge_kinds()
    proxy = None if site.proxy is None else site.proxy.address
    found = []
    for name in study.neighbours(card.name):
        kind, peer = kinds[min(card.name, name), max(card.name, name)], study.member(name)
        if kind.kind == RELAY:
            relay = study.member(str(kind.relay))
            way = EdgeWay(neighbour=name, carried=RELAY, dialled=relay.relay_addresses, relay=relay.name, proxy=proxy)
        elif kind.kind == BROKER:
            settings = replace(settings_for(site.mqtt, [name]), username=None, password_file=None)
            broker = settings.broker()
            way = EdgeWay(neighbour=name, carried=BROKER, dialled=(broker.address,), broker=str(broker), proxy=proxy)
        elif dials(card.name, card.address, peer.name, peer.address):
            way = EdgeWay(neighbour=name, carried=kind.kind, dialled=peer.addresses, proxy=proxy)
        else:
            way = EdgeWay(neighbour=name, carried=kind.kind, dialled=())
        found.append(way)
    return tuple(found)


def relayed_by(site: SiteFile, study: Study, card: Card) -> Relayed | None:
    """Find what a site relays for others; None: nothing.

    Raises:
        ConfigError: its card and its site.yaml do not fit together.
    """
    pairs: Sequence[tuple[str, str]] = () if site.transport != DIRECT else relayed_pairs(site, study, card)
    return None if not pairs or site.relay is None else Relayed(edges=tuple(pairs), mbit_s=site.relay.mbit_s)
