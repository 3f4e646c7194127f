"""A node's links: each edge gets the transport that the study has for it, with this site's own settings.

A new kind of edge is a transport in the registry, its name in `EDGE_KINDS`, and a line in `_OPTIONS` for what it needs to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from p2pfl.errors import ConfigError
from p2pfl.governance.card import Card
from p2pfl.governance.edge_kinds import BROKER, DIRECT, RELAY
from p2pfl.governance.names import split_address
from p2pfl.governance.study import Study
from p2pfl.node.broker import broker_of
from p2pfl.node.site import SiteFile
from p2pfl.transports import TRANSPORTS, Endpoint, LinksByKind, ProxyWay, RelayService, Transport


def own_links(site: SiteFile, study: Study, card: Card, curve_secret: bytes) -> Transport:
    """Make the links of a site's node, closed at first, and the relay for others that the study has it run.

    Raises:
        ConfigError: the settings of the proxy, of the relay or of the place to listen at cannot be, or do not fit the card.
    """
    me, peers = endpoint(card), [endpoint(study.member(name)) for name in study.neighbours(card.name)]
    if site.transport != DIRECT:
        return TRANSPORTS[site.transport](me, curve_secret, peers)
    edges = study.edge_kinds()
    kinds = {peer.name: edges[_pair(card.name, peer.name)].kind for peer in peers}
    links: dict[str, Transport] = {}
    for kind in sorted(set(kinds.values())):
        of_kind = [peer for peer in peers if kinds[peer.name] == kind]
        made = TRANSPORTS[kind](me, curve_secret, of_kind, heartbeat_s=site.heartbeat_s, **_OPTIONS[kind](site, study, card, of_kind))
        links |= dict.fromkeys((peer.name for peer in of_kind), made)
    services = relay_of(site, study, card, curve_secret)
    if len(set(kinds.values())) == 1 and not services:
        return next(iter(links.values()))
    return LinksByKind(card.name, links, services)


def link_to(site: SiteFile, study: Study, card: Card, curve_secret: bytes, peer: Endpoint) -> Transport:
    """Make the link of a site to one neighbour alone, closed at first; the neighbour may be dialled elsewhere than its card says.

    Raises:
        ConfigError: as `own_links`.
    """
    if site.transport != DIRECT:
        return TRANSPORTS[site.transport](endpoint(card), curve_secret, [peer])
    kind = study.edge_kinds()[_pair(card.name, peer.name)].kind
    options = _OPTIONS[kind](site, study, card, [peer])
    return TRANSPORTS[kind](endpoint(card), curve_secret, [peer], heartbeat_s=site.heartbeat_s, **options)


def endpoint(card: Card) -> Endpoint:
    """A member as transports know it."""
    return Endpoint(name=card.name, address=card.address, public_key=card.curve.encode())


def relayed_pairs(site: SiteFile, study: Study, card: Card) -> list[tuple[str, str]]:
    """Find the edges of others that the study has this site relay.

    Raises:
        ConfigError: the site offers it in one place alone, on its card or in its site.yaml.
    """
    pairs = [pair for pair, found in study.edge_kinds().items() if found.relay == card.name]
    if site.relay is not None and card.relay is None:
        raise ConfigError(
            "relay: this site offers it here and not on its card, where others would see it; make a card with p2pfl keys new --relay, "
            "or leave it out here"
        )
    if pairs and site.relay is None:
        said = ", ".join(f"{a} - {b}" for a, b in pairs)
        raise ConfigError(
            f"relay: the card of {card.name} offers it, and the study needs it for {said}; write how much, such as relay: {{mbit_s: 20}}"
        )
    return pairs


def relay_of(site: SiteFile, study: Study, card: Card, curve_secret: bytes) -> list[RelayService]:
    """Make the relay that others' links need of this site; none where no link does."""
    pairs = relayed_pairs(site, study, card)
    if not pairs or site.relay is None:
        return []
    ports = sorted({split_address(address)[1] for address in card.relay_addresses})
    if site.relay.listen is None and len(ports) > 1:
        raise ConfigError(
            f"relay.listen = null: the card has the ports {', '.join(map(str, ports))}; say which one, such as tcp://*:{ports[0]}"
        )
    ends = [(endpoint(study.member(a)), endpoint(study.member(b))) for a, b in pairs]
    listen = site.relay.listen or f"tcp://*:{ports[0]}"
    return [RelayService(endpoint(card), curve_secret, ends, listen=listen, mbit_s=site.relay.mbit_s, heartbeat_s=site.heartbeat_s)]


def _way_out(site: SiteFile) -> ProxyWay | None:
    return None if site.proxy is None else ProxyWay(site.proxy.proxy(), heartbeat_s=site.heartbeat_s)


def _direct(site: SiteFile, _study: Study, card: Card, _peers: Sequence[Endpoint]) -> dict[str, Any]:
    return {"listen": site.listens_at(card), "way_out": _way_out(site)}


def _relayed(site: SiteFile, study: Study, card: Card, peers: Sequence[Endpoint]) -> dict[str, Any]:
    relays, edges = {}, study.edge_kinds()
    for peer in peers:
        relay = study.member(str(edges[_pair(card.name, peer.name)].relay))
        relays[peer.name] = Endpoint(name=relay.name, address=relay.relay, public_key=relay.curve.encode())
    return {"relays": relays, "way_out": _way_out(site)}


def _over_broker(site: SiteFile, study: Study, _card: Card, peers: Sequence[Endpoint]) -> dict[str, Any]:
    return {"broker": broker_of(site.mqtt, [peer.name for peer in peers]), "study": study.digest, "way_out": _way_out(site)}


_OPTIONS: Mapping[str, Callable[[SiteFile, Study, Card, Sequence[Endpoint]], dict[str, Any]]] = {
    DIRECT: _direct,
    RELAY: _relayed,
    BROKER: _over_broker,
}


def _pair(a: str, b: str) -> tuple[str, str]:
    return min(a, b), max(a, b)
