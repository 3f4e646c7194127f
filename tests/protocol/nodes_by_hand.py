"""One node's side of its edges, without sockets: messages are carried by hand and time is an argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from p2pfl.protocol.deadlines import Deadlines, RoundDurations
from p2pfl.protocol.edges import Edges, Flow
from p2pfl.protocol.neighbour import Neighbour, Others, SendUpdate
from p2pfl.protocol.protocol import Protocol
from p2pfl.protocol.view import NetworkView
from p2pfl.topology.schedule import Neighbourhood
from p2pfl.wire.codec import decode, encode
from p2pfl.wire.link import LinkSession, LinkState, Terms
from p2pfl.wire.messages import NO_STOP, NOTHING_REMEMBERED, NOTHING_SAID, Heartbeat, Hello, Report, ResendRequest, StopNews
from p2pfl.wire.update import FullUpdate, UpdateFormat

FORMAT = UpdateFormat(channels=(("x", "float64", (2,)),))
ENCODED = UpdateFormat(channels=(("q", "int8", (2,)),), full=FORMAT)
TERMS = Terms(study="aa" * 32, layout="bb" * 32, start="cc" * 32)
NUM_EXCHANGES = 100_000
EARLIEST_STOP = 10
FLOOR_S = 10.0


def want(exchange: int, *, whole: bool = False, lost: bool = False, offset: int = 0, digest: bytes | None = None) -> ResendRequest:
    return ResendRequest(exchange=exchange, whole=whole, lost=lost, offset=offset, digest=digest)


class Node:
    """A protocol, what it said happened, and a clock that the test moves."""

    def __init__(
        self,
        me: str,
        *peers: str,
        terms: Terms = TERMS,
        incarnation: int = 1,
        update_format: UpdateFormat = FORMAT,
        ahead: int = 1,
        anew: int = 0,
        view: NetworkView | None = None,
        num_others: int = 0,
        places: Mapping[str, int] | None = None,
        prove: Callable[[], bytes | None] = lambda: None,
        waits_for_others: Callable[[str, int], bool] = lambda _name, _round: False,
        was_held_up: Callable[[str, int], bool] = lambda _name, _round: False,
        starting_exchanges: int = 1,
        durations: RoundDurations | None = None,
        **parts,
    ) -> None:
        self.me, self.now_s, self.update_format = me, 0.0, update_format
        self.events: list[tuple[str, str]] = []
        neighbours = {}
        for peer in sorted(peers):
            session = LinkSession(peer=peer, member=me, terms=terms, incarnation=incarnation, formats=(update_format,), ahead=ahead)
            neighbours[peer] = Neighbour(name=peer, session=session)
        edges = Edges(
            me=me,
            neighbours=neighbours,
            neighbourhoods=lambda _: Neighbourhood(weights=dict.fromkeys(sorted(peers), 0.25), receivers=frozenset(peers), self_weight=0.5),
            on_event=lambda kind, detail, about="": self.events.append((kind, detail)),
            anew=anew,
        )
        durations = durations or RoundDurations(factor=5.0, floor_s=FLOOR_S, window=20)
        self.protocol = Protocol(
            edges,
            Deadlines(edges, durations, starting_exchanges=starting_exchanges, waits_for_others=waits_for_others, was_held_up=was_held_up),
            others=Others(neighbours, num_others=num_others, places=places, view=view, prove=prove),
            **{"num_exchanges": NUM_EXCHANGES, "earliest_stop": EARLIEST_STOP} | parts,
        )
        self.protocol.begin(0, 0.0)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def frames_for(self, peer: str) -> list[tuple]:
        """Empty the outbox, as the daemon's sender does."""
        neighbour = self.protocol.neighbours[peer]
        messages = []
        while neighbour.outbox:
            item = neighbour.outbox.popleft()
            if isinstance(item, SendUpdate):
                messages += list(self.protocol.transfers.frames_of(neighbour, item))
                self.protocol.transfers.note_handed_over(peer, item)
            else:
                messages.append(encode(item))
        return messages

    def said_to(self, peer: str) -> list:
        return [decode(frames)[0] for frames in self.frames_for(peer)]

    def hear(self, peer: str, *messages) -> None:
        for message in messages:
            self.protocol.hear(peer, tuple(map(memoryview, encode(message))), self.now_s)

    def hear_update(self, peer: str, exchange: int, *, report: Report | None = None, stop: StopNews = NO_STOP, value: float = 1.0) -> None:
        report = report or Report(closed_through=exchange - 1, merged=(), confirmed=-1, settled=-1)
        for frames in FORMAT.pack(exchange, {"x": np.full(2, value)}).messages(report, stop):
            self.protocol.hear(peer, tuple(map(memoryview, frames)), self.now_s)

    def hear_encoded(self, peer: str, exchange: int, after: bytes | None, mark: bytes) -> None:
        """An update that continues something, or one that stands by itself."""
        report = Report(closed_through=exchange - 1, merged=(), confirmed=-1, settled=-1)
        update_format, arrays = (FORMAT, {"x": np.ones(2)}) if after is None else (ENCODED, {"q": np.ones(2, dtype=np.int8)})
        for frames in update_format.pack(exchange, arrays, (after, mark)).messages(report, NO_STOP):
            self.protocol.hear(peer, tuple(map(memoryview, frames)), self.now_s)

    def post(self) -> None:
        exchange, peers = self.protocol.edges.exchange, self.protocol.neighbours
        if self.update_format.full is None:
            update = self.update_format.pack(exchange, {"x": np.zeros(self.update_format.channels[0][2])})
            self.protocol.send(dict.fromkeys(peers, update), self.now_s)
            return
        after, mark = self.protocol.values.own.get(0, NOTHING_SAID), mark_of(exchange)
        update = ENCODED.pack(exchange, {"q": np.zeros(2, dtype=np.int8)}, (after, mark))
        whole = FullUpdate(FORMAT, exchange, {"x": np.full(2, float(exchange))}, mark)
        self.protocol.send(dict.fromkeys(peers, update), self.now_s, full=dict.fromkeys(peers, whole), state_digest=mark)

    def close(self, *, keep: bool = True) -> list[str]:
        """Merge what is there, write it down, and be at the next exchange."""
        protocol = self.protocol
        for name, received in protocol.came().items():
            protocol.hold(name, received, {"x": f"of exchange {received.exchange}"})
        protocol.values.advance()
        merged = {name: Flow(exchange=held.number, amounts=held.update.arrays) for name, held in protocol.admitted().items()}
        skipped = protocol.close(merged, self.now_s)
        if keep:
            protocol.edges.checkpointed(protocol.edges.ledgers())
        protocol.begin(protocol.edges.exchange + 1, self.now_s)
        return skipped

    def alone_until_the_deadline(self) -> None:
        self.post()
        self.now_s = max(self.now_s, self.protocol.deadlines.deadline_s)
        assert self.protocol.pace.is_over(self.now_s)
        self.close()


def mark_of(exchange: int) -> bytes:
    """Of what a node's updates have led to in tests where all is regular."""
    return b"exchange"[:7] + bytes([exchange])


def carry(one: Node, other: Node) -> None:
    """Everything that two nodes have to say to each other."""
    while one.protocol.neighbours[other.me].outbox or other.protocol.neighbours[one.me].outbox:
        for sender, receiver in ((one, other), (other, one)):
            for frames in sender.frames_for(receiver.me):
                receiver.protocol.hear(sender.me, tuple(map(memoryview, frames)), receiver.now_s)


def greeted(*nodes: Node) -> None:
    for node in nodes:
        node.protocol.tick(node.now_s)
    for i, one in enumerate(nodes):
        for other in nodes[i + 1 :]:
            carry(one, other)


def pair(update_format: UpdateFormat = FORMAT, **parts) -> tuple[Node, Node]:
    a, b = Node("a", "b", update_format=update_format, **parts), Node("b", "a", incarnation=2, update_format=update_format, **parts)
    greeted(a, b)
    return a, b


def hello(*, exchange: int = 0, member: str = "b", terms: Terms = TERMS, report: Report | None = None, echo: int = 1) -> Hello:
    return Hello(
        member=member,
        study=bytes.fromhex(terms.study),
        layout=bytes.fromhex(terms.layout),
        start=bytes.fromhex(terms.start),
        incarnation=77,
        echo=echo,
        is_open=True,
        anew=0,
        remembered=NOTHING_REMEMBERED,
        exchange=exchange,
        report=report or Report(closed_through=exchange - 1, merged=(), confirmed=-1, settled=-1),
        stop=NO_STOP,
    )


def alive(exchange: int, **report: int) -> Heartbeat:
    said = {"closed_through": exchange - 1, "merged": (), "confirmed": -1, "settled": -1, **report}
    return Heartbeat(exchange=exchange, report=Report(**said), stop=NO_STOP)


def in_step(a: Node, num_exchanges: int, duration_s: float) -> None:
    """Rounds of a node with one neighbour that does as it does."""
    for _ in range(num_exchanges):
        exchange = a.protocol.edges.exchange
        a.post()
        a.now_s += duration_s
        before = max(exchange - 2, -1)
        merged = (exchange - 1,) if exchange else ()
        a.hear_update("b", exchange, report=Report(closed_through=exchange - 1, merged=merged, confirmed=before, settled=before))
        assert a.close() == []


def meeting_in_pairs(*, ahead: int) -> Node:
    node = Node("b", "a", ahead=ahead, pace="pairwise")
    node.protocol.neighbours["a"].session.state = LinkState.OPEN
    return node
