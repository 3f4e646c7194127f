"""Checks of the edges: names, links, clocks, and what the neighbours hold."""

from __future__ import annotations

import asyncio
from typing import Any

from p2pfl.errors import P2PFLError, TransportError
from p2pfl.governance.card import Card
from p2pfl.governance.edge_kinds import BROKER, DIRECT, RELAY, EdgeKind
from p2pfl.governance.names import split_address
from p2pfl.node.doctor.examination import Examination, Fact, Finding, Noted, findings_of, unknown
from p2pfl.node.doctor.interview import EdgeMeasurement
from p2pfl.node.doctor.measuring import measure_edges
from p2pfl.node.own_links import own_links
from p2pfl.node.own_probes import first_outputs, own_probes
from p2pfl.node.status import read_edges
from p2pfl.transports import LinkCondition
from p2pfl.transports.base import dials
from p2pfl.transports.dialler import RESOLVE_S
from p2pfl.transports.resolver import Resolver, is_numeric

CLOCK_S = 30.0
"""Clocks that are further apart than this make records and logs of two sites hard to compare, and card and token dates wrong."""
LOSS = 0.05
CLOSE = 1e-3
"""Outputs of the same model on different machines differ in their last bits, by far less than this."""

_UNHEARD = "nothing was heard over this edge"

_REMEDIES = {
    LinkCondition.REFUSED: "ask {peer} to start its node or its doctor, and to open this port",
    LinkCondition.NO_ANSWER: "ask {peer} whether its firewall lets this site in, and this site's whether it lets the node out",
    LinkCondition.NO_ROUTE: "mend this machine's route to that network",
    LinkCondition.WRONG_KEY: "ask {peer} to take the study that has this site's card",
    LinkCondition.HANDSHAKE_FAILED: "ask {peer} to start its node with the keys of its card, or mend the address on its card",
    LinkCondition.SILENT: "ask {peer} whether its node hangs",
    LinkCondition.DOWN: "ask {peer} whether its node has just ended",
    LinkCondition.PROXY: "mend proxy in site.yaml, or ask whoever runs the proxy to let this node out",
    LinkCondition.RELAY: "ask {relay} whether its node runs with relay in its site.yaml, and whether its firewall lets this site in",
    LinkCondition.BROKER: "mend mqtt in site.yaml, or ask whoever runs the broker whether it runs and lets this site in",
}
_NOT_THERE = "ask {peer} to start its node or its doctor, and whether it reaches what carries this edge"
"""The remedy where both ends have to come to a third place."""
_NOT_PASSED_ON = "ask {peer} to start its node or its doctor, and whoever runs the broker to let both ends read and write p2pfl/#"


def check_names(exam: Examination) -> Noted:
    """Look up the host names of all neighbours that this site dials."""
    assert exam.study is not None
    assert exam.site is not None
    names = {}
    if exam.site.proxy is not None:
        yield Fact(what="names", said="the proxy looks them up, and not this machine")
        return
    for peer, addresses in _dialled(exam).items():
        for address in addresses:
            host = split_address(address)[0].strip("[]")
            if not is_numeric(host):
                names[host] = peer
    for host, peer in names.items():
        try:
            found = asyncio.run(Resolver().resolve(host, RESOLVE_S))
        except TransportError as error:
            yield Finding(
                fault=f"{error}, and it is on the card of {peer}",
                remedy=f"ask {peer} whether it is right, or enter it in this site's DNS or /etc/hosts",
            )
            continue
        yield Fact(what=f"name {host}", said=f"is {', '.join(found)}", figures={"addresses": list(found)})


def check_edges(exam: Examination) -> Noted:
    """Open the links as the node would, or ask the node that runs, and say how each edge is."""
    assert exam.study is not None
    assert exam.site is not None
    assert exam.identity is not None
    assert exam.plan is not None
    if exam.status is not None:
        yield from _edges_of_running(exam)
        return
    dialled, neighbours = _dialled(exam), exam.study.neighbours(exam.site.member)
    probes = own_probes(exam.plan, exam.site.member, exam.study.digest)
    probes.forward()  # before a neighbour waits for it
    try:
        transport = own_links(exam.site, exam.study, exam.study.member(exam.site.member), exam.identity.curve_secret)
        by_proxy = exam.site.proxy is not None
        exam.edges = asyncio.run(measure_edges(transport, dialled, neighbours, probes, exam.wait_s, by_proxy=by_proxy))
    except P2PFLError as error:
        yield from findings_of(error, "mend listen in site.yaml")
        return
    carried = _carried(exam)
    for edge in exam.edges.values():
        yield from _edge(edge, dialled.get(edge.peer, ()), carried.get(edge.peer))


def _edge(edge: EdgeMeasurement, addresses: tuple[str, ...], carried: EdgeKind | None) -> Noted:
    who = f"this site dials {edge.peer} at {', '.join(addresses)}" if edge.is_dialled else f"{edge.peer} dials this site"
    what = f"edge to {edge.peer}"
    figures: dict[str, Any] = {"dials": edge.is_dialled, "link": edge.condition.value}
    if carried is not None:
        who = f"relayed by {carried.relay}" if carried.kind == RELAY else "over the broker"
        figures |= {"dials": None, "carried": carried.kind, "relay": carried.relay}
    if edge.condition == LinkCondition.UNKNOWN_NAME:
        yield unknown(what, f"{who}; it was not reached: {edge.detail}", **figures)  # said of the name
        return
    if edge.condition == LinkCondition.AWAITED:
        if edge.detail:
            yield Finding(
                fault=f"{edge.detail} while {edge.peer} was awaited",
                remedy=f"ask {edge.peer} whether it holds this study, and dials with the keys of its card",
            )
        else:
            has_not = f"{who}, and has not yet" if carried is None else f"{who}; {edge.peer} has not come yet"
            yield unknown(what, f"{has_not}; ask it to start its node or its doctor now", **figures)
        return
    if edge.condition != LinkCondition.UP:
        fault = f"{who}, and has no link" if carried is None else f"the edge to {edge.peer}, {who}, has no link"
        yield Finding(fault=f"{fault}: {edge.detail or edge.condition.value}", remedy=_remedy(edge.condition, edge.peer, carried))
        return
    if edge.loses_large:
        yield Finding(
            fault=f"messages to {edge.peer} stop coming through once one is large: large packets vanish on the way (MTU black hole)",
            remedy="lower the MTU of this machine's interface (ip link set dev NAME mtu 1280), or let ICMP 'fragmentation needed' in",
        )
        return
    if edge.loss is not None and edge.loss > LOSS:
        yield Finding(
            fault=f"{100 * edge.loss:.0f} % of the packets to {edge.peer} had to be sent again",
            remedy="have the line looked at: rounds take longer, and nothing is lost",
        )
    trip = "unknown" if edge.round_trip_s is None else f"{1000 * edge.round_trip_s:.3g} ms"
    capacity = "unknown" if edge.mbit_s is None else f"{edge.mbit_s:,.3g} Mbit/s"
    loss = "unknown" if edge.loss is None else f"{100 * edge.loss:.2g} %"
    figures |= {"schema": edge.schema, "round_trip_s": edge.round_trip_s, "mbit_s": edge.mbit_s, "loss": edge.loss}
    said = f"{who}; up, round trip {trip}, capacity {capacity}, sent again {loss}"
    yield Fact(what=what, said=said, is_known=edge.answer is not None, figures=figures)


def _remedy(condition: LinkCondition, peer: str, carried: EdgeKind | None) -> str:
    """Choose what to do about a link that is not up."""
    said = _REMEDIES.get(condition, "ask {peer} whether its node runs, and whether its firewall lets this site in")
    if carried is not None and condition == LinkCondition.NO_ANSWER:
        said = _NOT_PASSED_ON if carried.kind == BROKER else _NOT_THERE
    return said.format(peer=peer, relay=carried.relay if carried is not None else None)


def _edges_of_running(exam: Examination) -> Noted:
    """Have the node that runs measure its links, and say what it knows of them; this doctor has none of its own beside them."""
    assert exam.status is not None
    assert exam.site is not None
    dialled, carried, exam.edges = _dialled(exam), _carried(exam), {}
    try:
        measured = read_edges(exam.site.state)
    except P2PFLError as error:
        yield unknown("edges", f"the node does not tell: {error}")
        return
    for name, link in exam.status["neighbours"].items():
        state, detail = link.get("link", "unknown"), link.get("link_detail") or ""
        condition = next((each for each in LinkCondition if each.value == state), LinkCondition.DOWN)
        edge = EdgeMeasurement(peer=name, is_dialled=name in dialled, condition=condition, detail=detail, schema=link.get("schema"))
        if name in measured:
            edge.take_up(measured[name])
        exam.edges[name] = edge
        if condition == LinkCondition.UP:
            yield from _edge(edge, dialled.get(name, ()), carried.get(name))
        elif state == "left":
            yield Fact(what=f"edge to {name}", said="it has finished", figures={"link": state})
        elif state in ("awaited", "greeting", "connecting", "resolving", "paused", "unknown"):
            yield unknown(f"edge to {name}", f"{state}: {detail or 'the node has not heard of it yet'}", link=state)
        else:
            remedy = "take the same study at both ends" if state == "other study" else _remedy(condition, name, carried.get(name))
            yield Finding(fault=f"the node has no link with {name}: {detail or state}", remedy=remedy)


def check_clocks(exam: Examination) -> Noted:
    """Compare this machine's clock with the neighbours'."""
    for edge in (exam.edges or {}).values():
        if edge.loses_large or edge.clock_ahead_s is None:
            why = "it does not tell its time" if edge.was_heard and not edge.loses_large else _UNHEARD
            yield unknown(f"clock of {edge.peer}", why, ahead_s=None)
        elif abs(edge.clock_ahead_s) > CLOCK_S:
            direction = "ahead of" if edge.clock_ahead_s > 0 else "behind"
            yield Finding(
                fault=f"the clock of {edge.peer} is {abs(edge.clock_ahead_s):,.0f} s {direction} this machine's",
                remedy="have both set by NTP: timedatectl set-ntp true, at the one that is wrong",
            )
        else:
            said = f"within {max(abs(edge.clock_ahead_s), 0.001):.3f} s of this one"
            yield Fact(what=f"clock of {edge.peer}", said=said, figures={"ahead_s": edge.clock_ahead_s})


def check_agreement(exam: Examination) -> Noted:
    """Compare study, layout and first parameters at both ends of each edge, and the neighbour's versions with the result contract."""
    assert exam.study is not None
    assert exam.plan is not None
    own = {"study": exam.study.digest, "layout": exam.plan.layout.digest, "start": exam.plan.start_digest}
    words = {"study": "another study", "layout": "another layout of the model", "start": "other first parameters"}
    remedies = {
        "study": "compare the digests that p2pfl study show prints, and take the same file",
        "layout": "take the same version of the task's code and the same options at both ends",
        "start": "take the same version of the task's code, and of torch, at both ends",
    }
    for edge in (exam.edges or {}).values():
        said = edge.hello or edge.answer
        if said is None or edge.loses_large:
            yield unknown(f"agreement with {edge.peer}", _UNHEARD, **dict.fromkeys(own))
            continue
        theirs = {name: getattr(said, name).hex() for name in own}
        wrong = next((name for name in own if theirs[name] != own[name]), None)
        if wrong is not None:
            yield Finding(
                fault=f"{edge.peer} holds {words[wrong]}: {theirs[wrong][:16]}… there, {own[wrong][:16]}… here", remedy=remedies[wrong]
            )
            continue
        yield Fact(what=f"agreement with {edge.peer}", said="the same study, layout and first parameters", figures=theirs)
        contract = exam.study.result_contract
        if edge.answer is None or contract is None:
            yield unknown(f"versions of {edge.peer}", "it does not answer a doctor")
            continue
        there = {"torch": edge.answer.torch, "arithmetic": edge.answer.arithmetic}
        agreed = {"torch": contract.torch, "arithmetic": contract.arithmetic}
        if there != agreed:
            shown = ", ".join(f"{name} {there[name]} there, {agreed[name]} in the study" for name in there if there[name] != agreed[name])
            yield Finding(
                fault=f"{edge.peer} does not keep the result contract: {shown}",
                remedy=f"ask {edge.peer} to install what the study names, unless it has accepted that on record",
            )
            continue
        figures = {"p2pfl": edge.answer.version, **there}
        yield Fact(what=f"versions of {edge.peer}", said=f"p2pfl {edge.answer.version}, torch {edge.answer.torch}", figures=figures)


def check_forward(exam: Examination) -> Noted:
    """Compare what the first model makes of agreed numbers at both ends of each edge."""
    assert exam.plan is not None
    assert exam.site is not None
    own = first_outputs(exam.plan, exam.site.member)
    for edge in (exam.edges or {}).values():
        what = f"forward pass at {edge.peer}"
        if edge.loses_large or not edge.was_heard:
            yield unknown(what, _UNHEARD, same=None)
            continue
        if own is None or edge.answer is None or edge.answer.forward is None:
            yield unknown(what, "it was not computed at both ends", same=None)
            continue
        pairs = list(zip(own.outputs, edge.answer.outputs, strict=False))
        scale = max((abs(value) for pair in pairs for value in pair), default=0.0)
        apart = max((abs(here - there) for here, there in pairs), default=0.0)
        if own.digest == edge.answer.forward:
            yield Fact(what=what, said="the same bits as here", figures={"same": True})
        elif apart <= CLOSE * max(scale, 1e-30) and edge.answer.start == bytes.fromhex(exam.plan.start_digest):
            yield Fact(what=what, said=f"as here but for rounding ({apart:.1e})", figures={"same": False, "apart": apart})
        elif edge.answer.start == bytes.fromhex(exam.plan.start_digest):
            yield Finding(
                fault=f"the first model gives other numbers at {edge.peer} than here, up to {apart:.2g} apart",
                remedy="take the same version of torch and of the task's code at both ends",
            )


def _dialled(exam: Examination) -> dict[str, tuple[str, ...]]:
    """Addresses of the neighbours that the site dials, by name."""
    assert exam.study is not None
    assert exam.site is not None
    me, carried = exam.study.member(exam.site.member), _carried(exam)
    cards: list[Card] = [exam.study.member(name) for name in exam.study.neighbours(me.name) if name not in carried]
    return {card.name: card.addresses for card in cards if dials(me.name, me.address, card.name, card.address)}


def _carried(exam: Examination) -> dict[str, EdgeKind]:
    """The edges that a relay or a broker carries, by neighbour."""
    assert exam.study is not None
    assert exam.site is not None
    me = exam.site.member
    own = {(a if b == me else b): found for (a, b), found in exam.study.edge_kinds().items() if me in (a, b)}
    return {name: found for name, found in own.items() if found.kind != DIRECT}
