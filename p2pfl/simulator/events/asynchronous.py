"""Nodes that go at their own pace with their neighbours' newest models, on a virtual clock.

A node trains, sends, and merges at once what it holds of its neighbours: the newest of each, with a weight that falls with each merge that
it has been in. All that happens at one moment happens together, so that nodes of equal speed without delays do exactly what synchronous
ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from p2pfl.experiment.plan import Plan
from p2pfl.protocol.asynchronous import Asynchronous
from p2pfl.protocol.pace import Held
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.simulator.events.paced import CHECKPOINT, Message, PacedDelays, PacedNode, PacedRecords, Timeline, grouped, message_of

_RANKS = ("trained", "arrived", "left", "merge")


class AsynchronousSimulation:
    """A network without common rounds.

    Args:
        plan: what to run; all sites' data are here.
        folder: where it writes.
        progress: as the engine's.
        stopwatch: goes on from what the run has taken so far; None: begins here.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        progress: Callable[[int, int, Mapping[str, Any]], None] | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self._stopwatch = stopwatch if stopwatch is not None else Stopwatch()
        self._plan, self._folder = plan, folder
        self._nodes = [PacedNode(plan, name) for name in plan.names]
        self._rows = {name: row for row, name in enumerate(plan.names)}
        self._records = PacedRecords(plan=plan, folder=folder, stopwatch=self._stopwatch, nodes=self._nodes, progress=progress)
        self._delays = PacedDelays(plan)
        self._timeline = Timeline(_RANKS)
        self._paces: list[Asynchronous[Message]] = [Asynchronous(max_age=plan.experiment.pace.max_age) for _ in self._nodes]
        self._sent: list[dict[str, Tensor]] = [{} for _ in self._nodes]
        self._left: list[set[str]] = [set() for _ in self._nodes]
        self._over: set[int] = set()
        self._stopwatch.lap("setup")

    def run(self) -> None:
        """Until every node has done its rounds, or has no neighbour left."""
        if self._timeline.is_empty and not self._over:
            for node in self._nodes:
                self._timeline.at(self._delays.training_through_s(node), "trained", node.row)
        handle: dict[str, Callable[..., None]] = {
            "trained": self._trained,
            "arrived": self._arrived,
            "left": self._has_left,
            "merge": self._merge,
        }
        saved = self._records.rounds
        while (event := self._timeline.next()) is not None:
            handle[event.kind](event.row, *event.content)
            if self._records.rounds >= saved + self._plan.experiment.checkpoint_every and not self._timeline.is_at_this_moment("merge"):
                saved = self._records.rounds
                self.save()
        self._records.conclude(self._timeline.now_s)

    def _trained(self, row: int) -> None:
        """A node's local steps are done: it sends."""
        node, now_s = self._nodes[row], self._timeline.now_s
        node.train()
        self._sent[row] = node.outgoing()
        message = message_of(self._sent[row])
        size_bytes = self._delays.bytes_each(node.round, self._sent[row])
        for name in sorted(node.links.receivers):
            if self._delays.is_lost(node.name, name, node.round):
                continue
            delay_s = self._delays.between_s(node.name, name, size_bytes)
            self._timeline.at(now_s + delay_s, "arrived", self._rows[name], node.name, node.round, message)
        self._timeline.at(now_s, "merge", row)

    def _arrived(self, row: int, peer: str, number: int, message: Message) -> None:
        self._paces[row].receive(peer, number, message)

    def _has_left(self, row: int, peer: str) -> None:
        self._left[row].add(peer)

    def _merge(self, row: int) -> None:
        """It goes on with what it holds."""
        node = self._nodes[row]
        self._paces[row].begin(node.round)
        merge_newest(self._plan, node, self._sent[row], self._paces[row].updates())
        size_bytes = self._delays.bytes_each(node.round, self._sent[row])
        skipped = sorted(node.links.weights.keys() - {name for name, *_ in node.merged})
        self._records.add(node, skipped=skipped, bytes_sent=size_bytes * len(node.links.receivers), time_s=self._timeline.now_s)
        if node.round == self._plan.experiment.rounds or self._left[row] >= node.links.weights.keys():
            self._over.add(row)
            for name in sorted(node.links.receivers):
                self._timeline.at(self._timeline.now_s + self._delays.between_s(node.name, name, 0), "left", self._rows[name], node.name)
        else:  # counted from the start, so that nodes of equal speed stay together
            self._timeline.at(self._delays.training_through_s(node), "trained", row)
        self._records.close(lambda other: other.row in self._over)

    def save(self) -> None:
        """A checkpoint from which `restore` continues exactly."""
        tensors: dict[str, Tensor] = {}
        for node in self._nodes:
            tensors |= {f"node/{node.name}/{key}": tensor for key, tensor in node.population.tensors().items()}
            for peer, held in self._paces[node.row].held.items():
                tensors |= {f"newest/{node.name}-{peer}/{channel}": tensor for channel, tensor in held.update.items()}
        events = []
        for event in self._timeline.events:
            content = list(event.content)
            if event.kind == "arrived":
                tensors |= {f"flight/{event.number}/{channel}": tensor for channel, tensor in content.pop().items()}
            events.append([event.time_s, event.row, event.number, event.kind, content])
        story = {
            "events": events,
            "now_s": self._timeline.now_s,
            "held": [{peer: [held.number, held.age] for peer, held in pace.held.items()} for pace in self._paces],
            "left": [sorted(left) for left in self._left],
            "over": sorted(self._over),
            "nodes": [node.round for node in self._nodes],
            "diverged": [list(node.population.diverged) for node in self._nodes],
            **self._records.story(),
        }
        write_checkpoint(self._folder.path / CHECKPOINT, tensors, story)

    def restore(self) -> None:
        """Go on from the folder's checkpoint; from the start where it has none."""
        found = read_checkpoint(self._folder.path / CHECKPOINT)
        if found is None:
            self._folder.truncate(0)
            return
        tensors, story = found
        groups = grouped(tensors)
        for node, number, diverged in zip(self._nodes, story["nodes"], story["diverged"], strict=True):
            node.population.restore(groups[f"node/{node.name}"])
            node.population.diverged, node.round = tuple(diverged), number
            self._paces[node.row].restore(
                {
                    peer: Held(number=held_number, age=age, update=groups[f"newest/{node.name}-{peer}"])
                    for peer, (held_number, age) in story["held"][node.row].items()
                }
            )
            self._left[node.row] = set(story["left"][node.row])
        self._over = set(story["over"])
        self._timeline.now_s = story["now_s"]
        for time_s, row, number, kind, content in sorted(story["events"], key=lambda event: event[2]):
            flying = (groups[f"flight/{number}"],) if kind == "arrived" else ()
            self._timeline.at(time_s, kind, row, *content, *flying)
        self._records.restore(story)


def merge_newest(plan: Plan, node: PacedNode, sent: Mapping[str, Tensor], taken: Mapping[str, Held[Message]]) -> None:
    """One node's merge, and what its record says of it."""
    taken = {name: taken[name] for name in node.links.weights if name in taken}
    weights = plan.weights_by_age(node.links.weights, {name: held.age for name, held in taken.items()})
    node.merge(sent, {name: held.update for name, held in taken.items()}, weights)
    node.merged = [[name, held.number, held.age] for name, held in taken.items()]
