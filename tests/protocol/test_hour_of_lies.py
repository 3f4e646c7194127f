"""An hour of lies against a network of honest nodes, in virtual time: each of them loses one round of training at most."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import count

import numpy as np
import pytest
from members_by_hand import HOUR_S, LARGE, MEMBERS, RULE, Member, node_terms, record, signed
from nodes_by_hand import FORMAT, NUM_EXCHANGES, hello

from p2pfl.protocol.deadlines import RoundDurations
from p2pfl.protocol.neighbour import SendNew, SendUpdate
from p2pfl.wire.codec import encode
from p2pfl.wire.link import LinkSession
from p2pfl.wire.messages import NO_STOP, Closing, Goodbye, Heartbeat, Hello, ProofRequest, Records, Report, ResendRequest, StopNews

LIAR = "d"
HONEST = "abc"
COMPLETE = {name: tuple(other for other in MEMBERS if other != name) for name in HONEST}
PATH = {"a": ("b",), "b": ("a", "c"), "c": ("b", LIAR)}
GRAPHS = {"complete": COMPLETE, "path": PATH}
TRUE_ROUNDS = 5
"""After them the liar begins."""
FLOOR_S, FACTOR = 30.0, 5.0
"""As a site that says nothing of them has it."""
LATENCY_S = 0.02
TICK_S = 1.0
MOST_LOST = 1
"""Rounds of training that one liar costs an honest node in an hour."""

MOST_DEADLINES = 4
"""How long it makes one wait, in all."""


Program = Callable[["Honest", int], Iterator]
"""Gives, for a node that the liar speaks to and the number of the step, messages, or frames of them."""


class Honest(Member):
    """A node that trains, exchanges and speaks of its rounds as the daemon does."""

    def __init__(self, name: str, graph: dict[str, tuple[str, ...]], train_s: float) -> None:
        self.graph = graph
        super().__init__(
            name,
            *graph[name],
            durations=RoundDurations(factor=FACTOR, floor_s=FLOOR_S, window=20),
            stop_rule=RULE,
            earliest_stop=RULE.earliest(0),
            starting_exchanges=4,
            waits_for_others=self.waits_for_others,
            was_held_up=self.was_held_up,
        )
        self.protocol.deadlines.wait_at_start(0.0, 5.0 + FLOOR_S, 5.0 + FLOOR_S)
        self.train_s, self.until_s = train_s, train_s
        self.is_training = True
        self.posted_s = 0.0
        self.lost = self.trained = 0
        self.skipped: Counter[str] = Counter()
        self.waits_s: list[float] = []

    def waits_for_others(self, name: str, number: int) -> bool:
        return any(self.has_missed(member, name, number) for member in MEMBERS if member not in (self.me, name))

    def was_held_up(self, name: str, number: int) -> bool:
        return self.has_missed(name, name, number)

    def has_missed(self, member: str, name: str, number: int) -> bool:
        """As `NetworkViewAdapter` has it; the liar's neighbours are those that have it as one."""
        heard = self.protocol.view.newest.get(MEMBERS.index(member))
        nearby = self.graph.get(name, [each for each in HONEST if name in self.graph[each]])
        others = {MEMBERS.index(other) for other in nearby if other != self.me}
        return heard is not None and heard.record.round >= number and not others.isdisjoint(heard.record.without)

    def frames_for(self, peer: str) -> list[tuple]:
        neighbour, frames = self.protocol.neighbours[peer], []
        while neighbour.outbox:
            item = neighbour.outbox.popleft()
            if isinstance(item, SendUpdate):
                frames += list(self.protocol.transfers.frames_of(neighbour, item))
                self.protocol.transfers.note_handed_over(peer, item)
            elif item is SendNew.RECORDS:
                while sealed := self.protocol.view.take(peer, self.now_s):
                    frames.append(encode(Records(sealed=tuple(sealed))))
            elif item is not SendNew.READY:
                frames.append(encode(item))
        return frames

    def look(self) -> None:
        """Go on where there is nothing to wait for."""
        protocol = self.protocol
        if self.is_training:
            if self.now_s < self.until_s:
                return
            self.is_training = False
            if protocol.claims.is_behind():
                self.jump_over()
            self.post()
            self.posted_s = self.now_s
        while protocol.claims.is_behind():
            self.jump_over()
            self.post()
            self.posted_s = self.now_s
        if protocol.pace.is_over(self.now_s):
            self.end_round()

    def jump_over(self) -> None:
        before = self.protocol.edges.exchange
        self.lost += self.jump() - before
        self.protocol.edges.checkpointed(self.protocol.edges.ledgers())

    def end_round(self) -> None:
        number = self.protocol.edges.exchange
        skipped = self.close()
        self.skipped.update(skipped)
        self.waits_s.append(self.now_s - self.posted_s)
        self.trained, self.ended = self.trained + 1, number
        self.protocol.stopping.agree(number, 0, None)
        view = self.protocol.view
        view.begin(number + 1, self.now_s)
        without = tuple(MEMBERS.index(name) for name in skipped)
        view.publish(record(self.me, number, skipped=len(skipped), without=without), self.now_s)
        self.protocol.spread(self.now_s)
        self.is_training, self.until_s = True, self.now_s + self.train_s


class Network:
    """Honest nodes, what is on its way between them, and a liar that sees all of it."""

    def __init__(self, graph: dict[str, tuple[str, ...]], program: Program, *, train_s: float, lie_every_s: float) -> None:
        self.now_s = 0.0
        self.nodes = {name: Honest(name, graph, train_s * (1 + 0.1 * place)) for place, name in enumerate(graph)}
        self.victims = [node for node in self.nodes.values() if LIAR in node.protocol.neighbours]
        self._order = count()
        self._coming: list[tuple[float, int, Callable[[], None]]] = []
        self.program, self.lie_every_s, self.came_to = program, lie_every_s, Counter()
        self.lies_from_s: float | None = None
        for node in self.nodes.values():
            self.at(0.0, lambda node=node: self.tick(node))
        self.at(0.0, lambda: self.lie(0))

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._coming, (when_s, next(self._order), what))

    def run(self, for_s: float) -> None:
        while self.lies_from_s is None or self._coming[0][0] <= self.lies_from_s + for_s:
            self.now_s, _, what = heapq.heappop(self._coming)
            what()

    def tick(self, node: Honest) -> None:
        node.now_s = self.now_s
        node.protocol.tick(self.now_s)
        self.go_on(node)
        self.at(self.now_s + TICK_S, lambda: self.tick(node))

    def go_on(self, node: Honest) -> None:
        was = node.is_training
        node.look()
        if node.is_training and not was:
            self.at(node.until_s, lambda: self.wake(node))
        elif not node.is_training:
            again_s = node.protocol.deadlines.look_again_s(self.now_s, TICK_S, node.protocol.pace.awaited())
            if again_s < self.now_s + TICK_S:
                self.at(again_s, lambda: self.wake(node))
        for peer in node.protocol.neighbours:
            frames = node.frames_for(peer)
            if frames and peer in self.nodes:
                self.at(self.now_s + LATENCY_S, lambda peer=peer, frames=frames: self.deliver(node.me, self.nodes[peer], frames))

    def wake(self, node: Honest) -> None:
        node.now_s = self.now_s
        self.go_on(node)

    def deliver(self, sender: str, node: Honest, frames: list[tuple]) -> None:
        node.now_s = self.now_s
        changed = False
        for message in frames:
            changed |= node.protocol.hear(sender, tuple(map(memoryview, message)), self.now_s)
        if changed:
            self.go_on(node)

    def lie(self, step: int) -> None:
        is_true = any(node.protocol.edges.exchange < TRUE_ROUNDS for node in self.nodes.values())
        if not is_true and self.lies_from_s is None:
            self.lies_from_s = self.now_s
        for node in self.victims:
            exchange = node.protocol.edges.exchange
            if is_true:
                if exchange in node.protocol.transfers.sent and self.came_to[node.me] <= exchange:
                    self.came_to[node.me] = exchange + 1
                    self.deliver(LIAR, node, update(exchange, true_report(exchange)))
            else:
                frames = []
                for each in self.program(node, step):
                    frames += each if isinstance(each, list) else [encode(each)]
                self.deliver(LIAR, node, frames)
        self.at(self.now_s + (LATENCY_S * 5 if is_true else self.lie_every_s), lambda: self.lie(0 if is_true else step + 1))


# ---- what the liar says


def true_report(exchange: int) -> Report:
    before = max(exchange - 2, -1)
    return Report(closed_through=exchange - 1, merged=(exchange - 1,) if exchange else (), confirmed=before, settled=before)


def said_at(exchange: int) -> Report:
    """What it says of an edge so that it is waited for there: it has merged nothing since it lies."""
    return Report(closed_through=exchange - 1, merged=(), confirmed=TRUE_ROUNDS - 2, settled=TRUE_ROUNDS - 2)


def update(exchange: int, report: Report) -> list[tuple]:
    return list(FORMAT.pack(exchange, {"x": np.ones(2)}).messages(report, NO_STOP))


def says(node: Honest, exchange: int) -> Heartbeat:
    return Heartbeat(exchange=exchange, report=said_at(node.protocol.edges.exchange), stop=NO_STOP)


def greeting(node: Honest, incarnation: int) -> Hello:
    exchange = node.protocol.edges.exchange
    return replace(hello(member=LIAR, exchange=exchange, report=said_at(exchange)), incarnation=incarnation)


@lru_cache(maxsize=4)
def begun(exchange: int) -> list[tuple]:
    """The first two chunks of an update of three."""
    return list(LARGE.pack(exchange, {"x": np.zeros(300_000)}).messages(said_at(exchange), NO_STOP))[:2]


# ---- the programs: what the liar says to a node, at each step


def far_ahead(node: Honest, step: int) -> Iterator:
    yield says(node, 90_000)


def a_ladder(node: Honest, step: int) -> Iterator:
    yield says(node, min(node.protocol.edges.exchange + 2 + step % 40, NUM_EXCHANGES))


def just_ahead(node: Honest, step: int) -> Iterator:
    yield says(node, node.protocol.edges.exchange + 1 + step % 2)


def signed_ahead(node: Honest, step: int) -> Iterator:
    yield Records(sealed=(signed(LIAR, node.protocol.edges.exchange + 50),))
    yield says(node, node.protocol.edges.exchange + 51)


def forged_ahead(node: Honest, step: int) -> Iterator:
    if step % 20 == 0:
        yield Records(sealed=(signed("b", 90_000, key=LIAR),))
    yield says(node, 90_000)


def updates_ahead(node: Honest, step: int) -> Iterator:
    """Complete ones, of exchanges that have not been."""
    at = node.protocol.edges.exchange
    for exchange in (at, at + 1, at + 2, at + 30):
        yield update(exchange, said_at(exchange))


def stops(node: Honest, step: int) -> Iterator:
    at = node.protocol.edges.exchange
    for stop_round in (RULE.earliest(0), at, at + 1, at + 6):
        yield replace(says(node, at), stop=StopNews(agreed_for=10**6, stop_round=stop_round))


def closes(node: Honest, step: int) -> Iterator:
    at = node.protocol.edges.exchange
    yield Closing(exchange=at + 30, report=said_at(at), stop=StopNews(agreed_for=9, stop_round=at + 2), reason="converged")


def waits(node: Honest, step: int) -> Iterator:
    yield says(node, max(node.protocol.edges.exchange - 1, 0))


def waits_and_is_ahead(node: Honest, step: int) -> Iterator:
    yield says(node, 90_000)
    yield says(node, max(node.protocol.edges.exchange - 1, 0))


def heartbeats(node: Honest, step: int) -> Iterator:
    yield says(node, node.protocol.edges.exchange)


def restarts(node: Honest, step: int) -> Iterator:
    yield greeting(node, 1000 + step)


def pauses(node: Honest, step: int) -> Iterator:
    yield Goodbye(reason="pausing") if step % 2 else greeting(node, 1000 + step)


def asks(node: Honest, step: int) -> Iterator:
    yield ProofRequest(relayed=False)
    yield ResendRequest(exchange=node.protocol.edges.exchange, whole=False, lost=True, offset=0, digest=None)


def stale_updates(node: Honest, step: int) -> Iterator:
    """So that a missed neighbour's update seems to be late by very little."""
    yield says(node, node.protocol.edges.exchange)
    yield update(node.protocol.edges.exchange - 1, said_at(node.protocol.edges.exchange))


def endless(node: Honest, step: int) -> Iterator:
    """Begins an update, sends a second chunk, begins again."""
    exchange, neighbour = node.protocol.edges.exchange, node.protocol.neighbours[LIAR]
    if step == 0:
        neighbour.session = LinkSession(peer=LIAR, member=node.me, terms=node_terms(node), incarnation=1, formats=(LARGE,))
        yield greeting(node, 1)
    yield [begun(exchange)[min(step % 3, 1)]]


def now_and_then(node: Honest, step: int) -> Iterator:
    """Comes to two of three, and is silent in the third."""
    yield says(node, node.protocol.edges.exchange)
    if node.protocol.edges.exchange % 3:
        yield update(node.protocol.edges.exchange, said_at(node.protocol.edges.exchange))


def all_of_it(node: Honest, step: int) -> Iterator:
    """Comes to one of three exchanges, to be waited for in the next ones, and tells all lies but those that end its link or are true."""
    if node.protocol.edges.exchange % 3 == 0:
        yield update(node.protocol.edges.exchange, said_at(node.protocol.edges.exchange))
        return
    programs = [each for each in PROGRAMS if each not in (all_of_it, updates_ahead, now_and_then, endless)]
    yield from programs[step % len(programs)](node, step)
    yield from programs[(step // 7) % len(programs)](node, step)


PROGRAMS = [
    all_of_it,
    far_ahead,
    a_ladder,
    just_ahead,
    signed_ahead,
    forged_ahead,
    updates_ahead,
    stops,
    closes,
    waits,
    waits_and_is_ahead,
    heartbeats,
    restarts,
    pauses,
    asks,
    stale_updates,
    now_and_then,
    endless,
]


def lied_to_for_an_hour(graph: str, program: Program, *, train_s: float, lie_every_s: float) -> Network:
    network = Network(GRAPHS[graph], program, train_s=train_s, lie_every_s=lie_every_s)
    network.run(HOUR_S)
    return network


def hold_to_the_promise(network: Network, least: float = 1.0) -> None:
    slowest_s = max(node.train_s for node in network.nodes.values())
    quiet = (HOUR_S - MOST_DEADLINES * max(FLOOR_S, FACTOR * slowest_s)) / (slowest_s + 1.0)
    for node in network.nodes.values():
        skipped = {name: times for name, times in node.skipped.items() if name != LIAR}
        said = f"{node.me}: {node.trained} trained, {node.lost} lost, {sum(node.waits_s):.0f} s waited, without {dict(node.skipped)}"
        print(said, dict(Counter(node.kinds())), dict(node.protocol.edges.refused))  # noqa: T201

        assert node.lost <= MOST_LOST
        assert sum(skipped.values()) <= MOST_LOST
        assert node.protocol.stopping.stop_round is None
        assert node.trained >= least * quiet


@pytest.mark.slow
@pytest.mark.no_cover
def test_an_hour_of_lies_costs_nobody_more_than_a_round_of_training():
    hold_to_the_promise(lied_to_for_an_hour("path", all_of_it, train_s=20.0, lie_every_s=4.0))


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_no_program_costs_more_than_a_round_of_training_in_an_hour(graph, program):
    # who comes to two of three exchanges is waited for again, as a slow site is: it costs time, and no round
    least = 0.5 if program is now_and_then else 1.0
    hold_to_the_promise(lied_to_for_an_hour(graph, program, train_s=10.0, lie_every_s=2.0), least)
