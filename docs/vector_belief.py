"""Examples of what one node believes of how far the others are: what it hears of members, and the exchange that it jumps to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pfl.protocol.deadlines import Deadlines, RoundDurations
from p2pfl.protocol.edges import Edges
from p2pfl.protocol.neighbour import Neighbour, Others
from p2pfl.protocol.protocol import Protocol
from p2pfl.protocol.view import NetworkView
from p2pfl.topology.schedule import Neighbourhood
from p2pfl.wire.codec import encode
from p2pfl.wire.link import LinkSession, LinkState, Terms
from p2pfl.wire.messages import NO_STOP, Heartbeat, Records, Report
from p2pfl.wire.round_record import RoundRecord, seal
from p2pfl.wire.update import UpdateFormat

LINKS = {"a": 0, "b": 1, "c": 2, "d": 1, "e": 3}
"""Members by name, with the links between them and a, which is the node that hears."""

_STUDY = b"\xaa" * 32
_TERMS = Terms(study="aa" * 32, layout="bb" * 32, start="cc" * 32)
_FORMAT = UpdateFormat(channels=(("x", "float32", (4,)),))
_LAST_ROUND = 100_000


def belief() -> list[dict[str, Any]]:
    """Examples, each with what comes of it."""
    far, near = _said("d", 300), _said("b", 6)
    own, c_6, c_7, b_29, e_7, e_8 = (_record(*each) for each in (("d", 299), ("c", 6), ("c", 7), ("b", 29), ("e", 7), ("e", 8)))
    given = [
        ("one neighbour is far ahead, the other in step", 5, 1, 1, [far, near]),
        ("its own record confirms nobody", 5, 1, 1, [far, near, own]),
        ("a record of a member that may be so far in step", 5, 1, 1, [far, near, c_6]),
        ("a record of a member that has gone on", 5, 1, 1, [far, near, c_7]),
        ("a second neighbour that has gone on", 5, 1, 1, [far, _said("b", 40)]),
        ("two neighbours by one exchange too many", 5, 1, 1, [_said("d", 7), _said("b", 7)]),
        ("one of two neighbours by one exchange too many", 5, 1, 1, [_said("d", 7), near]),
        ("a neighbour's record says more than it has said", 5, 1, 1, [far, near, b_29]),
        ("a record from three links away that may be in step", 5, 1, 1, [far, near, e_7]),
        ("a record from three links away that has gone on", 5, 1, 1, [far, near, e_8]),
        ("records alone, while neighbours are in step", 5, 1, 1, [_said("d", 6), near, c_7, e_8]),
        ("eight exchanges are kept, and the member may be in step", 5, 8, 1, [far, near, _record("c", 20)]),
        ("eight exchanges are kept, and the member has gone on", 5, 8, 1, [far, near, _record("c", 21)]),
        ("two phases: a record of round 6 is exchange 14", 10, 1, 2, [far, near, c_6]),
        ("two phases: a round is begun at its beginning", 10, 1, 2, [far, _said("b", 41)]),
    ]
    examples = [
        {"what": what, "exchange": exchange, "ahead": ahead, "phases": phases, "links": LINKS, "heard": heard}
        for what, exchange, ahead, phases, heard in given
    ]
    return [{**each, "jumps_to": run_belief(each)} for each in examples]


def run_belief(given: Mapping[str, Any]) -> int | None:
    """The exchange that a node jumps to after what it has heard; None: it stays in its own."""
    names, phases = list(given["links"]), given["phases"]
    me = next(name for name, links in given["links"].items() if not links)
    near = [name for name, links in given["links"].items() if links == 1]
    secrets = {name: Ed25519PrivateKey.from_private_bytes(bytes([place + 1] * 32)) for place, name in enumerate(names)}
    neighbours = {}
    for name in near:
        session = LinkSession(peer=name, member=me, terms=_TERMS, incarnation=1, formats=(_FORMAT,) * phases, ahead=given["ahead"])
        session.state = LinkState.OPEN
        neighbours[name] = Neighbour(name=name, session=session)
    row = Neighbourhood(weights=dict.fromkeys(near, 0.25), receivers=frozenset(near), self_weight=1 - 0.25 * len(near))
    edges = Edges(me=me, neighbours=neighbours, neighbourhoods=lambda _: row, on_event=lambda *_: None, phases=phases, ahead=given["ahead"])
    view = NetworkView(
        me=names.index(me),
        keys=[secrets[name].public_key().public_bytes_raw() for name in names],
        sign=secrets[me].sign,
        study=_STUDY,
        neighbours=near,
        diameter=max(given["links"].values()),
        last_round=_LAST_ROUND,
        bytes_per_s=None,
    )
    others = Others(
        neighbours,
        num_others=len(names) - 1,
        places={name: names.index(name) for name in near},
        steps_to={names.index(name): links for name, links in given["links"].items()},
        view=view,
    )
    deadlines = Deadlines(edges, RoundDurations(factor=5.0, floor_s=30.0, window=20))
    protocol = Protocol(edges, deadlines, num_exchanges=_LAST_ROUND * phases, others=others)
    protocol.begin(given["exchange"], 0.0)
    protocol.start_with(names, 0.0)
    for each in given["heard"]:
        if "says" in each:
            protocol.hear(each["member"], tuple(map(memoryview, encode(_heartbeat(each["says"])))), 0.0)
        else:
            sealed = seal(_round_record(names.index(each["member"]), each["record_of_round"]), secrets[each["member"]].sign, _STUDY)
            protocol.hear(near[0], tuple(map(memoryview, encode(Records(sealed=(sealed,))))), 0.0)
    assert not edges.refused
    return -(-protocol.claims.furthest() // phases) * phases if protocol.claims.is_behind() else None  # as the daemon begins rounds


def _said(member: str, exchange: int) -> dict[str, Any]:
    return {"member": member, "says": exchange}


def _record(member: str, number: int) -> dict[str, Any]:
    return {"member": member, "record_of_round": number}


def _heartbeat(exchange: int) -> Heartbeat:
    report = Report(closed_through=exchange - 1, merged=(), confirmed=-1, settled=-1)
    return Heartbeat(exchange=exchange, report=report, stop=NO_STOP)


def _round_record(place: int, number: int) -> RoundRecord:
    return RoundRecord(
        member=place,
        began=1_790_000_000_000,
        round=number,
        level=0,
        settles=False,
        closing=False,
        disagreement=None,
        norm=None,
        loss=None,
        skipped=0,
        without=(),
        agreed_for=0,
        sent=0,
        milliseconds=(0, 0, 0, 0),
        measured=None,
        metrics=(),
        rows=None,
    )
