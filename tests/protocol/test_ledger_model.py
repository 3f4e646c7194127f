"""The edge ledger against a model: nodes with one exact number each, gossiping over links that lose, delay, repeat and reorder, killed at
any moment. Whatever happened, once both sides of every edge are settled the numbers sum to what they summed to at the start, and every
exchange that both sides merged still stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from p2pfl.protocol.ledger import EdgeLedger, goes_back
from p2pfl.wire.messages import Remembered, Report
from thorough import first_fast

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer


@dataclass
class Said:
    """An update, or mere news where there is no value."""

    exchange: int
    value: Fraction | None
    report: Report


@dataclass
class Node:
    """A node as the daemon runs it, tensors replaced by one exact number."""

    name: int
    weight: Fraction
    ledgers: dict[int, EdgeLedger]
    value: Fraction
    pending: Fraction = Fraction(0)  # flows to take back at the next merge
    exchange: int = 0
    flows: dict[int, tuple[int, Fraction]] = field(default_factory=dict)  # the last merged flow of each edge
    merges: set[tuple[int, int]] = field(default_factory=set)  # (peer, exchange) of every flow that ever went in
    standing: set[tuple[int, int]] = field(default_factory=set)  # of those, what was not taken back
    inbox: dict[tuple[int, int], Said] = field(default_factory=dict)
    is_written: bool = True
    snapshot: str = ""
    disk: str = ""

    def say(self, peer: int, *, with_value: bool) -> Said:
        return Said(self.exchange, self.value if with_value else None, self.ledgers[peer].report())

    def hear(self, peer: int, said: Said) -> None:
        if said.value is not None and said.exchange in (self.exchange, self.exchange + 1):
            assert said.report.closed_through >= said.exchange - 1
            self.inbox.setdefault((peer, said.exchange), said)
        self.take_back(peer, self.ledgers[peer].hear(said.report))

    def take_back(self, peer: int, exchange: int | None) -> None:
        if exchange is not None:
            of, amount = self.flows[peer]
            assert of == exchange
            self.pending -= amount
            self.standing.remove((peer, exchange))

    def close(self, only: frozenset[int]) -> None:
        """Merge what came from those peers; what happens to this node next is a checkpoint or a crash."""
        own, total = self.value, self.value + self.pending
        self.pending = Fraction(0)
        for peer, ledger in self.ledgers.items():
            said = self.inbox.get((peer, self.exchange))
            merges = said is not None and peer in only and ledger.admits(self.exchange)
            if merges:
                self.flows[peer] = (self.exchange, self.weight * (said.value - own))
                total += self.flows[peer][1]
                self.merges.add((peer, self.exchange))
                self.standing.add((peer, self.exchange))
            self.take_back(peer, ledger.close(self.exchange, merged=merges))
        self.value = total
        self.exchange += 1
        self.is_written = False

    def jump(self, exchange: int) -> None:
        """Take the exchange from what a neighbour said, the value unchanged."""
        for peer, ledger in self.ledgers.items():
            self.take_back(peer, ledger.close(exchange - 1, merged=False))
        self.exchange = exchange
        self.is_written = False

    def take_snapshot(self) -> None:
        state = {
            "value": str(self.value),
            "pending": str(self.pending),
            "exchange": self.exchange,
            "merges": sorted(self.merges),
            "standing": sorted(self.standing),
            "flows": [[peer, of, str(amount)] for peer, (of, amount) in self.flows.items()],
            "ledgers": [[peer, ledger.to_dict()] for peer, ledger in self.ledgers.items()],
        }
        self.snapshot = json.dumps(state)

    def write_snapshot(self) -> None:
        self.disk = self.snapshot
        for peer, saved in json.loads(self.disk)["ledgers"]:
            self.ledgers[peer].checkpointed(saved)
        self.is_written = json.loads(self.disk)["exchange"] == self.exchange

    def checkpoint(self) -> None:
        self.take_snapshot()
        self.write_snapshot()

    def crash(self) -> None:
        state = json.loads(self.disk)
        self.merges, self.standing = ({(peer, of) for peer, of in state[key]} for key in ("merges", "standing"))
        ledger_type = type(next(iter(self.ledgers.values())))
        self.value, self.pending, self.exchange = Fraction(state["value"]), Fraction(state["pending"]), state["exchange"]
        self.flows = {peer: (of, Fraction(amount)) for peer, of, amount in state["flows"]}
        self.ledgers = {peer: ledger_type.from_dict(saved) for peer, saved in state["ledgers"]}
        self.inbox = {}
        self.is_written = True
        self.snapshot = self.disk


class Network(RuleBasedStateMachine):
    """Any number of nodes on a ring (two: one edge); each rule is something that may happen to one of them at any time."""

    num_nodes = 2
    ledger_type: type[EdgeLedger] = EdgeLedger

    @initialize(values=st.lists(st.integers(-1000, 1000), min_size=4, max_size=4))
    def start(self, values: list[int]) -> None:
        n = self.num_nodes
        self.nodes = []
        for i in range(n):
            peers = sorted({(i - 1) % n, (i + 1) % n})
            ledgers = {peer: self.ledger_type() for peer in peers}
            self.nodes.append(Node(name=i, weight=Fraction(1, len(peers) + 1), ledgers=ledgers, value=Fraction(values[i])))
        self.links: dict[tuple[int, int], list[Said]] = {(i, j): [] for i in range(n) for j in self.nodes[i].ledgers}
        self.total = sum(node.value for node in self.nodes)
        for node in self.nodes:
            node.checkpoint()

    def node(self, number: int) -> Node:
        return self.nodes[number % self.num_nodes]

    def link(self, number: int) -> tuple[int, int]:
        return sorted(self.links)[number % len(self.links)]

    numbers = st.integers(0, 7)
    cuts = st.just(frozenset[int]()) | st.frozensets(numbers, max_size=4)
    somebody = st.just(frozenset(range(4))) | st.frozensets(st.integers(0, 3))
    fates = st.lists(st.sampled_from(["written", "written", "killed", "slow"]), min_size=4, max_size=4)

    @rule(which=numbers)
    def send_update(self, which: int) -> None:
        sender, receiver = self.link(which)
        node = self.nodes[sender]
        if node.is_written:  # nothing of an exchange is said before the one before it is on the disk
            self.links[sender, receiver].append(node.say(receiver, with_value=True))

    @rule(which=numbers)
    def send_news(self, which: int) -> None:
        sender, receiver = self.link(which)
        self.links[sender, receiver].append(self.nodes[sender].say(receiver, with_value=False))

    @rule(which=numbers, position=st.integers(0, 3), keep=st.booleans(), jump=st.booleans())
    def deliver(self, which: int, position: int, keep: bool, jump: bool) -> None:
        sender, receiver = self.link(which)
        queue = self.links[sender, receiver]
        if queue:
            place = min(position, len(queue) - 1)
            said = queue[place] if keep else queue.pop(place)
            self.take(sender, receiver, said, jump=jump)

    @rule(which=numbers)
    def lose(self, which: int) -> None:
        queue = self.links[self.link(which)]
        if queue:
            queue.pop(0)

    @rule(which=numbers, only=st.frozensets(st.integers(0, 3)))
    def close_with_some(self, which: int, only: frozenset[int]) -> None:
        if self.node(which).is_written:
            self.node(which).close(only)

    @rule(which=numbers)
    def hurry(self, which: int) -> None:
        """A node that is behind closes two exchanges with what it holds, hearing nothing in between."""
        for _ in range(2):
            self.node(which).checkpoint()
            self.node(which).close(frozenset(range(4)))

    @rule(cut=cuts, closing=somebody, fates=fates, cut_news=cuts, jump=st.booleans())
    def round(self, cut: frozenset[int], closing: frozenset[int], fates: list[str], cut_news: frozenset[int], jump: bool) -> None:
        """Updates go out, some nodes close, news goes out, and then each of them writes, is killed, or takes its time.

        What happens nearly always, with faults; a walk of single steps would seldom get both sides of an edge to merge.
        """
        for number, (sender, receiver) in enumerate(sorted(self.links)):
            if self.nodes[sender].is_written and number not in cut:
                self.tell(sender, receiver, with_value=True, jump=jump)
        closed = [node for node in self.nodes if node.is_written and node.name in closing]
        for node in closed:
            node.close(frozenset(range(4)))
        for number, (sender, receiver) in enumerate(sorted(self.links)):
            if number not in cut_news:
                self.tell(sender, receiver, with_value=False, jump=False)
        for node in closed:
            match fates[node.name]:
                case "written":
                    node.checkpoint()
                case "killed":
                    node.crash()

    def tell(self, sender: int, receiver: int, *, with_value: bool, jump: bool) -> None:
        self.take(sender, receiver, self.nodes[sender].say(receiver, with_value=with_value), jump=jump)

    def take(self, sender: int, receiver: int, said: Said, *, jump: bool) -> None:
        node = self.nodes[receiver]
        node.hear(sender, said)
        if jump and said.exchange > node.exchange:
            node.jump(said.exchange)

    @rule(which=numbers)
    def take_snapshot(self, which: int) -> None:
        self.node(which).take_snapshot()

    @rule(which=numbers)
    def write_snapshot(self, which: int) -> None:
        self.node(which).write_snapshot()

    @rule(which=numbers)
    def checkpoint(self, which: int) -> None:
        self.node(which).checkpoint()

    @rule(which=numbers)
    def crash(self, which: int) -> None:
        self.node(which).crash()

    def ledgers(self) -> Iterator[EdgeLedger]:
        for node in getattr(self, "nodes", []):
            yield from node.ledgers.values()

    @invariant()
    def reports_stay_short_and_no_history_is_lost(self) -> None:
        for ledger in self.ledgers():
            assert len(ledger.merged) <= 3
            assert not ledger.counters

    @invariant()
    def nobody_remembers_more_of_a_node_than_it_has_written(self) -> None:
        """So an honest crash, at whatever moment, is never taken for lost state."""
        for node in getattr(self, "nodes", []):
            for peer, ledger in node.ledgers.items():
                own = Remembered(anew=0, report=self.nodes[peer].ledgers[node.name].report())
                assert not goes_back(ledger.remembered(), own)

    def teardown(self) -> None:
        if hasattr(self, "nodes"):
            self.settle()

            assert self.total == sum(node.value + node.pending for node in self.nodes)
            for node in self.nodes:
                merged_by_both = {(peer, of) for peer, of in node.merges if (node.name, of) in self.nodes[peer].merges}
                assert merged_by_both == node.standing

    def settle(self) -> None:
        """The closing exchange: every node goes to the last exchange, then all report and checkpoint until every edge is settled."""
        last = max(node.exchange for node in self.nodes) + 1
        for node in self.nodes:
            node.jump(last)
            node.checkpoint()
        for _ in range(4):
            for sender, receiver in self.links:
                self.tell(sender, receiver, with_value=False, jump=False)
            for node in self.nodes:
                node.checkpoint()

        assert all(ledger.is_acknowledged and ledger.neighbour_is_acknowledged for ledger in self.ledgers())


class RingOfFour(Network):
    num_nodes = 4


EFFORT = settings(
    max_examples=200, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@pytest.mark.parametrize(("network", "examples"), first_fast([(Network, 60), (Network, 200), (RingOfFour, 200)]))
def test_the_sum_is_kept_whatever_happens(network, examples):
    run_state_machine_as_test(network, settings=settings(EFFORT, max_examples=examples))


class NeverTakesBack(EdgeLedger):
    def _acknowledge(self):
        super()._acknowledge()


class ReportsFromMemory(EdgeLedger):
    def report(self):
        self.checkpointed(self.to_dict())
        return super().report()


class ForgetsWhatWasMatched(EdgeLedger):
    def _acknowledge(self):
        take_back = super()._acknowledge()
        if self.heard:
            self.merged = tuple(e for e in self.merged if e not in self.heard.merged)
        return take_back


class SettlesBeforeItIsDurable(EdgeLedger):
    def report(self):
        durable, settled = super().report(), self.acknowledged
        return Report(
            closed_through=max(durable.closed_through, settled), merged=durable.merged, confirmed=durable.confirmed, settled=settled
        )


class ForgetsWhatWasNotHeardOf(EdgeLedger):
    def _acknowledge(self):
        take_back = super()._acknowledge()
        if self.heard:
            self.merged = tuple(e for e in self.merged if e in self.heard.merged)
        return take_back


class AdmitsBeforeThePastIsKnown(EdgeLedger):
    def admits(self, exchange):
        return True

    def close(self, exchange, *, merged):
        self.open_flow = None
        return super().close(exchange, merged=merged)


@pytest.mark.parametrize(
    "broken",
    first_fast(
        [
            NeverTakesBack,
            ReportsFromMemory,
            ForgetsWhatWasMatched,
            ForgetsWhatWasNotHeardOf,
            SettlesBeforeItIsDurable,
            AdmitsBeforeThePastIsKnown,
        ]
    ),
)
def test_the_model_finds_a_broken_ledger(broken):
    class BrokenNetwork(Network):
        ledger_type = broken

    quick = settings(EFFORT, phases=[Phase.generate], print_blob=False)
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run_state_machine_as_test(BrokenNetwork, settings=quick)
