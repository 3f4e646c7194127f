"""Nodes that go at their own pace and meet one neighbour at a time, on a virtual clock.

After its local steps a node asks one neighbour. That one answers at once, also while it trains, and both move to the middle. A node that
waits for an answer meets nobody else in the meantime: it answers the neighbour that it asked itself, lets those before it in the order of
the names wait, and turns the others away; so nobody waits in a circle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from p2pfl.algorithms import State
from p2pfl.experiment.plan import Plan
from p2pfl.protocol.pairwise import HALF, Pairwise, Request
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.simulator.events.paced import CHECKPOINT, Message, PacedDelays, PacedNode, PacedRecords, Timeline, grouped, message_of

_RANKS = ("came", "left", "trained")


class PairwiseNode:
    """One node that trains from where it began its round, whatever it meets meanwhile."""

    def __init__(self, plan: Plan, name: str) -> None:
        self.steps = PacedNode(plan, name)
        self.start: State = self.steps.population.state
        """Where it began this round."""
        self.stage = "training"
        """Or "waiting": after its local steps, until it begins again."""
        self.closed: dict[str, int] = {}
        """By neighbour, the last exchange that is over."""
        self.pace: Pairwise[Message] = Pairwise(me=name, closed_through=lambda peer: self.closed.get(peer, -1))
        self.left: set[str] = set()
        self.is_over = False

    def begin(self) -> None:
        """The next round."""
        self.start, self.stage = self.steps.population.state, "training"

    def finish_training(self) -> None:
        """Add what the local steps made of the start to what x has become meanwhile."""
        population = self.steps.population
        now, population.state = population.state, self.start
        self.steps.train()
        population.state = population.recipe.algorithm.apply_stale_update(now, self.start, population.state)
        self.stage = "waiting"

    def meet(self, peer: str, number: int, message: Message) -> None:
        """Half of the way to a neighbour's model."""
        self.steps.merge(self.steps.outgoing(), {peer: message}, {peer: HALF})
        self.steps.merged.append([peer, number, self.stage])
        self.closed[peer] = number

    def partner(self, seed: int) -> str | None:
        """Choose whom to ask in this round; None: nobody is left."""
        steps = self.steps
        return self.pace.partner(steps.slots, seed=seed, row=steps.row, round=steps.round, is_there=lambda name: name not in self.left)


class PairwiseSimulation:
    """A network whose nodes meet in pairs.

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
        self._nodes = [PairwiseNode(plan, name) for name in plan.names]
        self._rows = {name: row for row, name in enumerate(plan.names)}
        steps = [node.steps for node in self._nodes]
        self._records = PacedRecords(plan=plan, folder=folder, stopwatch=self._stopwatch, nodes=steps, progress=progress)
        self._delays = PacedDelays(plan)
        self._timeline = Timeline(_RANKS)
        self._arrival_s: dict[tuple[str, str], float] = {}
        """By sender and receiver, when the last message arrives."""
        self._sent_bytes = [0] * len(self._nodes)
        self._stopwatch.lap("setup")

    def run(self) -> None:
        """Until every node has done its rounds, or has no neighbour left."""
        if self._timeline.is_empty and not any(node.is_over for node in self._nodes):
            for node in self._nodes:
                self._timeline.at(self._delays.training_s(node.steps), "trained", node.steps.row)
        handle: dict[str, Callable[..., None]] = {
            "trained": self._trained,
            "came": self._came,
            "left": self._has_left,
        }
        saved = self._records.rounds
        while (event := self._timeline.next()) is not None:
            handle[event.kind](self._nodes[event.row], *event.content)
            if self._records.rounds >= saved + self._plan.experiment.checkpoint_every:
                saved = self._records.rounds
                self.save()
        self._records.conclude(self._timeline.now_s)

    def _trained(self, node: PairwiseNode) -> None:
        """A node's local steps are done: it asks a neighbour."""
        node.finish_training()
        peer = node.partner(self._plan.experiment.seed)
        if peer is None:
            self._end_round(node, skipped=[])
            return
        self._send(node, peer, node.pace.ask(peer), message_of(node.steps.outgoing()))

    def _came(self, node: PairwiseNode, peer: str, number: int, message: Message | None) -> None:
        """What a neighbour sent: its answer, or its question."""
        node.pace.receive(peer, number, message)
        while (request := node.pace.next()) is not None:
            self._answer(node, request)
        asked = node.pace.asked
        if asked is None or not node.pace.is_over(self._timeline.now_s):
            return
        answers = node.pace.updates()
        for held in answers.values():
            node.meet(*asked, held.update)
        node.closed[asked[0]] = asked[1]
        for request in node.pace.conclude():
            self._answer(node, request)
        self._end_round(node, skipped=[] if answers else [asked[0]])

    def _answer(self, node: PairwiseNode, request: Request[Message]) -> None:
        own = message_of(node.steps.outgoing()) if request.is_welcome else None
        if request.is_welcome:
            node.meet(request.peer, request.number, request.update)
        node.closed[request.peer] = request.number
        self._send(node, request.peer, request.number, own)

    def _end_round(self, node: PairwiseNode, *, skipped: list[str]) -> None:
        steps, now_s = node.steps, self._timeline.now_s
        self._records.add(steps, skipped=skipped, bytes_sent=self._sent_bytes[steps.row], time_s=now_s)
        self._sent_bytes[steps.row] = 0
        if steps.round == self._plan.experiment.rounds or node.left >= set(steps.slots):
            node.is_over = True
            node.pace.end()
            for name in steps.slots:
                self._timeline.at(now_s + self._delays.between_s(steps.name, name, 0), "left", self._rows[name], steps.name)
        else:
            node.begin()
            self._timeline.at(now_s + self._delays.training_s(steps), "trained", steps.row)
        self._records.close(lambda other: self._nodes[other.row].is_over)

    def _has_left(self, node: PairwiseNode, peer: str) -> None:
        node.left.add(peer)

    def _send(self, node: PairwiseNode, peer: str, number: int, message: Message | None) -> None:
        name, size_bytes = node.steps.name, 0
        if message is not None:
            size_bytes = self._delays.bytes_each(number, {channel: tensor.unsqueeze(0) for channel, tensor in message.items()})
        self._sent_bytes[node.steps.row] += size_bytes
        arrival_s = self._timeline.now_s + self._delays.between_s(name, peer, size_bytes, alone=True)
        # what is sent later comes later, also where it is shorter
        self._arrival_s[name, peer] = max(arrival_s, self._arrival_s.get((name, peer), 0.0))
        self._timeline.at(self._arrival_s[name, peer], "came", self._rows[peer], name, number, message)

    def save(self) -> None:
        """A checkpoint from which `restore` continues exactly."""
        tensors: dict[str, Tensor] = {}
        for node in self._nodes:
            name = node.steps.name
            tensors |= {f"node/{name}/{key}": tensor for key, tensor in node.steps.population.tensors().items()}
            tensors |= {f"start/{name}/{key}": tensor for key, tensor in node.start.items()}
            for place, (_, message) in enumerate(node.pace.deferred.values()):
                tensors |= {f"deferred/{name}.{place}/{channel}": tensor for channel, tensor in message.items()}
        events = []
        for event in self._timeline.events:
            content = list(event.content)
            if event.kind == "came":
                message = content.pop()
                content.append(message is not None)
                tensors |= {f"flight/{event.number}/{channel}": tensor for channel, tensor in (message or {}).items()}
            events.append([event.time_s, event.row, event.number, event.kind, content])
        story = {
            "events": events,
            "now_s": self._timeline.now_s,
            "arrival_s": [[*ends, seconds] for ends, seconds in self._arrival_s.items()],
            "sent_bytes": self._sent_bytes,
            "nodes": [
                {
                    "round": node.steps.round,
                    "loss": node.steps.loss,
                    "merged": node.steps.merged,
                    "squared": node.steps.squared,
                    "norm": node.steps.norm,
                    "diverged": list(node.steps.population.diverged),
                    "stage": node.stage,
                    "asked": node.pace.asked,
                    "closed": node.closed,
                    "deferred": [[peer, number] for peer, (number, _) in node.pace.deferred.items()],
                    "left": sorted(node.left),
                    "is_over": node.is_over,
                }
                for node in self._nodes
            ],
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
        for node, saved in zip(self._nodes, story["nodes"], strict=True):
            steps = node.steps
            steps.population.restore(groups[f"node/{steps.name}"])
            steps.population.diverged = tuple(saved["diverged"])
            steps.round, steps.loss, steps.merged = saved["round"], saved["loss"], saved["merged"]
            steps.squared, steps.norm = saved["squared"], saved["norm"]
            node.start, node.stage, node.closed = groups[f"start/{steps.name}"], saved["stage"], saved["closed"]
            deferred = {peer: (number, groups[f"deferred/{steps.name}.{place}"]) for place, (peer, number) in enumerate(saved["deferred"])}
            node.pace.restore(saved["asked"], deferred, has_ended=saved["is_over"])
            node.left, node.is_over = set(saved["left"]), saved["is_over"]
        self._arrival_s = {(sender, receiver): seconds for sender, receiver, seconds in story["arrival_s"]}
        self._sent_bytes = story["sent_bytes"]
        self._timeline.now_s = story["now_s"]
        for time_s, row, number, kind, content in sorted(story["events"], key=lambda event: event[2]):
            if kind == "came":
                content[-1] = groups[f"flight/{number}"] if content[-1] else None
            self._timeline.at(time_s, kind, row, *content)
        self._records.restore(story)
