"""Events of nodes without common rounds, on a virtual clock: a node trains, sends, and merges when its pace waits no longer.

All that happens at one moment happens together, so that nodes of equal speed without delays do exactly what synchronous ones do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from p2pfl.experiment.plan import Plan
from p2pfl.faults.script import FaultScript
from p2pfl.paces import Chosen, Pace
from p2pfl.simulator.events.node import EventNode, Message, message_of
from p2pfl.simulator.events.simulation import EventRecords, Groups
from p2pfl.simulator.events.timeline import Timeline


class _SimulatedEdges:
    """One simulated node's edges and times as its pace sees them: whoever has not left has all the time that it needs."""

    ahead = 0
    deadline_s = math.inf

    def __init__(self, node: EventNode) -> None:
        self.me, self.neighbourhood, self.exchange = node.name, node.neighbourhood, 0
        self.left: set[str] = set()

    def refusing(self) -> frozenset[str]:
        """Nobody closes an exchange without the others."""
        return frozenset()

    def is_missed(self, name: str) -> bool:
        """Whether a neighbour sends nothing more."""
        return name in self.left

    def closed_through(self, name: str) -> int:  # noqa: ARG002
        """Edges have no numbers of their own."""
        return -1

    def may_answer(self, name: str, number: int) -> bool:  # noqa: ARG002
        """Whether a neighbour still sends something."""
        return name not in self.left

    def note_time(self, now_s: float) -> None:
        """Time is the virtual clock's."""

    def has_time(self, name: str, now_s: float) -> bool:  # noqa: ARG002
        """Whether a neighbour still sends something."""
        return name not in self.left


class AsynchronousEvents:
    """Events of nodes that merge their neighbours' newest updates."""

    def __init__(self, plan: Plan, faults: FaultScript | None) -> None:
        self._plan = plan
        self.nodes = [EventNode(plan, name) for name in plan.names]
        self.timeline = Timeline(plan, faults, "trained", "arrived", "left", "merge")
        pace = plan.experiment.pace
        self._edges = [_SimulatedEdges(node) for node in self.nodes]
        self._paces: list[Pace] = [pace.kind.of(edges, edges, max_age=pace.max_age) for edges in self._edges]
        self._sent: list[dict[str, Tensor]] = [{} for _ in self.nodes]
        self._sent_s = [0.0] * len(self.nodes)
        self._waited_s = [0.0] * len(self.nodes)
        """By row, for how long its merges have waited so far, and a script has made its training longer."""
        self._waiting: set[int] = set()
        """Rows that have sent, and whose merge waits for a neighbour."""
        self._over: set[int] = set()

    @property
    def may_be_saved(self) -> bool:
        """Whether no node still has to merge at this moment; a script of faults is not kept."""
        return not self.timeline.is_scripted and not self._waiting and not self.timeline.is_at_this_moment("merge")

    def next(self, records: EventRecords) -> bool:
        """Let the next event happen; False where every node is over."""
        if self.timeline.is_empty and not self._over:
            for node in self.nodes:
                self._begin(node)
        if (event := self.timeline.next()) is None:
            return False
        kind, row, content, message = event
        match kind:
            case "trained":
                self._send(self.nodes[row])
            case "arrived":
                assert message is not None
                peer, number = content
                self._receive(self.nodes[row], peer, number, message)
            case "left":
                self._edges[row].left.add(*content)
            case "merge" if self._paces[row].is_over(self.timeline.now_s):
                self._merge(self.nodes[row], records)
            case "merge":
                self._waiting.add(row)
        if kind in ("arrived", "left") and row in self._waiting:
            self._waiting.remove(row)
            self.timeline.at(self.timeline.now_s, "merge", row)
        return True

    def _receive(self, node: EventNode, peer: str, number: int, message: Message) -> None:
        """Keep a neighbour's message, if the node's pace needs it."""
        pace = self._paces[node.row]
        if pace.receive(peer, number):
            node.keep(peer, number, message)
        node.release(peer, pace.needed(peer))

    def _begin(self, node: EventNode) -> None:
        self._waited_s[node.row] += self.timeline.slowed_s(node)  # counted from the start, so that nodes of equal speed stay together
        self.timeline.at(self._waited_s[node.row] + self.timeline.training_through_s(node), "trained", node.row)

    def _send(self, node: EventNode) -> None:
        """Train a node, and send what it has learnt."""
        node.train()
        self._sent[node.row], self._sent_s[node.row] = node.outgoing(), self.timeline.now_s
        message = message_of(self._sent[node.row])
        size_bytes = self.timeline.bytes_each(node.round, self._sent[node.row])
        for name in sorted(node.neighbourhood.receivers):
            if not self.timeline.is_lost(node.name, name, node.round):
                arrival_s = self.timeline.arrival_s(node.name, name, size_bytes)
                self.timeline.send(arrival_s, "arrived", node.name, name, node.round, message=message)
        self.timeline.at(self.timeline.now_s, "merge", node.row)

    def _merge(self, node: EventNode, records: EventRecords) -> None:
        """Merge what a node holds of its neighbours, and begin its next round."""
        sent, pace = self._sent[node.row], self._paces[node.row]
        pace.begin(node.round)
        chosen = pace.chosen()
        for peer in list(node.messages):
            node.release(peer, pace.needed(peer))  # what has become too old
        merge_newest(self._plan, node, sent, {peer: node.messages[peer][each.number] for peer, each in chosen.items()}, chosen)
        size_bytes = self.timeline.bytes_each(node.round, sent)
        skipped = sorted(node.neighbourhood.weights.keys() - {name for name, *_ in node.merged})
        records.add(node, skipped=skipped, bytes_sent=size_bytes * len(node.neighbourhood.receivers), time_s=self.timeline.now_s)
        if node.round == self._plan.experiment.rounds or self._edges[node.row].left >= node.neighbourhood.weights.keys():
            self._over.add(node.row)
            for name in sorted(node.neighbourhood.receivers):
                self.timeline.send(self.timeline.arrival_s(node.name, name, 0), "left", node.name, name)
        else:
            self._waited_s[node.row] += self.timeline.now_s - self._sent_s[node.row]
            self._begin(node)
        records.close(lambda other: other.row in self._over)

    def tensors(self) -> dict[str, Tensor]:
        """Messages that are held or on their way."""
        held = [(node, peer, each.number) for node in self.nodes for peer, each in self._paces[node.row].kept().items()]
        newest = {
            f"newest/{node.name}-{peer}/{channel}": tensor
            for node, peer, number in held
            for channel, tensor in node.messages[peer][number].items()
        }
        return newest | self.timeline.tensors()

    def metadata(self) -> dict[str, Any]:
        """Metadata of a checkpoint."""
        return {
            **self.timeline.metadata(),
            "held": [{peer: [held.number, held.age] for peer, held in pace.kept().items()} for pace in self._paces],
            "left": [sorted(edges.left) for edges in self._edges],
            "over": sorted(self._over),
            "nodes": [node.round for node in self.nodes],
            "diverged": [list(node.population.diverged) for node in self.nodes],
            **({"waited_s": self._waited_s} if any(self._waited_s) else {}),
        }

    def restore(self, groups: Groups, metadata: Mapping[str, Any]) -> None:
        """Take up a checkpoint."""
        for node, number, diverged, all_held in zip(self.nodes, metadata["nodes"], metadata["diverged"], metadata["held"], strict=True):
            node.population.mark_diverged(diverged)
            node.round = number
            self._paces[node.row].restore({peer: Chosen(number=held_number, age=age) for peer, (held_number, age) in all_held.items()})
            for peer, (held_number, _) in all_held.items():
                node.keep(peer, held_number, groups[f"newest/{node.name}-{peer}"])
        for edges, left in zip(self._edges, metadata["left"], strict=True):
            edges.left = set(left)
        self._over, self._waited_s = set(metadata["over"]), metadata.get("waited_s", self._waited_s)
        self.timeline.restore(groups, metadata)


def merge_newest(
    plan: Plan, node: EventNode, sent: Mapping[str, Tensor], messages: Mapping[str, Message], chosen: Mapping[str, Chosen]
) -> None:
    """Merge the chosen messages into a node, weighted by their ages, and note them for its record."""
    names = [name for name in node.neighbourhood.weights if name in chosen]
    weights = plan.weights_by_age(node.neighbourhood.weights, {name: chosen[name].age for name in names})
    node.merge(sent, {name: messages[name] for name in names}, weights)
    node.merged = [[name, chosen[name].number, chosen[name].age] for name in names]
