"""Events of the pairwise pace, on a virtual clock: after its local steps a node exchanges with one neighbour, and both move to the middle.

The neighbour answers at once, also while it trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from p2pfl.algorithms import State
from p2pfl.experiment.plan import Plan
from p2pfl.faults.script import FaultScript
from p2pfl.paces.pairwise import HALF, Pairwise, Request
from p2pfl.simulator.events.node import EventNode, Message, message_of
from p2pfl.simulator.events.simulation import EventRecords, Groups
from p2pfl.simulator.events.timeline import Timeline


class PairwiseNode:
    """One node that trains from where it began its round, whatever it meets meanwhile."""

    def __init__(self, plan: Plan, name: str) -> None:
        self.steps = EventNode(plan, name)
        self.start: State = self.steps.population.state
        """Model with which it began this round."""
        self.stage = "training"
        """Or "waiting": after its local steps, until it begins again."""
        self.closed: dict[str, int] = {}
        """By neighbour, the last exchange that is over."""
        self.pace = Pairwise(me=name, closed_through=lambda peer: self.closed.get(peer, -1))
        self.left: set[str] = set()
        self.is_over = False

    def begin(self) -> None:
        """Begin the next round."""
        self.start, self.stage = self.steps.population.state, "training"

    def finish_training(self) -> None:
        """Add what the local steps made of the start to what x has become meanwhile."""
        population = self.steps.population
        now = population.state
        population.replace_state(self.start)
        self.steps.train()
        population.replace_state(population.recipe.algorithm.apply_stale_update(now, self.start, population.state))
        self.stage = "waiting"

    def receive(self, peer: str, number: int, message: Message | None) -> None:
        """Take a neighbour's request or answer; None: a refusal."""
        if message is None:
            self.pace.note_busy(peer, number)
        elif self.pace.receive(peer, number):
            self.steps.keep(peer, number, message)

    def release(self) -> None:
        """Let go of messages that the pace needs no more."""
        for peer in list(self.steps.messages):
            self.steps.release(peer, self.pace.needed(peer))

    def meet(self, peer: str, number: int, message: Message) -> None:
        """Go half of the way to a neighbour's model."""
        self.steps.merge(self.steps.outgoing(), {peer: message}, {peer: HALF})
        self.steps.merged.append([peer, number, self.stage])
        self.closed[peer] = number

    def partner(self, seed: int) -> str | None:
        """Choose whom to ask in this round; None: nobody is left."""
        steps = self.steps
        return self.pace.partner(steps.slots, seed=seed, row=steps.row, round=steps.round, is_there=lambda name: name not in self.left)

    def metadata(self) -> dict[str, Any]:
        """Metadata of a checkpoint."""
        steps = self.steps
        return {
            "round": steps.round,
            "loss": steps.loss,
            "merged": steps.merged,
            "squared": steps.squared,
            "norm": steps.norm,
            "diverged": list(steps.population.diverged),
            "stage": self.stage,
            "asked": self.pace.asked,
            "closed": self.closed,
            "deferred": [[peer, number] for peer, number in self.pace.deferred.items()],
            "left": sorted(self.left),
            "is_over": self.is_over,
        }

    def restore(self, groups: Groups, saved: Mapping[str, Any]) -> None:
        """Take up a checkpoint."""
        steps = self.steps
        steps.population.mark_diverged(saved["diverged"])
        steps.round, steps.loss, steps.merged = saved["round"], saved["loss"], saved["merged"]
        steps.squared, steps.norm = saved["squared"], saved["norm"]
        self.start, self.stage, self.closed = dict(groups[f"start/{steps.name}"]), saved["stage"], saved["closed"]
        for place, (peer, number) in enumerate(saved["deferred"]):
            steps.keep(peer, number, groups[f"deferred/{steps.name}.{place}"])
        self.pace.restore_requests(saved["asked"], dict(saved["deferred"]), has_ended=saved["is_over"])
        self.left, self.is_over = set(saved["left"]), saved["is_over"]


class PairwiseEvents:
    """Events of nodes that exchange in pairs."""

    def __init__(self, plan: Plan, faults: FaultScript | None) -> None:
        self._plan = plan
        self._nodes = [PairwiseNode(plan, name) for name in plan.names]
        self.nodes = [node.steps for node in self._nodes]
        self.may_be_saved = faults is None  # an event leaves nothing half done
        self.timeline = Timeline(plan, faults, "came", "left", "trained")
        self._arrival_s: dict[tuple[str, str], float] = {}
        """By sender and receiver, when the last message arrives."""
        self._sent_bytes = [0] * len(self._nodes)

    def next(self, records: EventRecords) -> bool:
        """Let the next event happen; False where every node is over."""
        if self.timeline.is_empty and not any(node.is_over for node in self._nodes):
            for steps in self.nodes:
                self.timeline.at(self.timeline.training_s(steps), "trained", steps.row)
        if (event := self.timeline.next()) is None:
            return False
        match event:
            case "trained", row, _, _:
                self._ask(self._nodes[row], records)
            case "came", row, (peer, number, _), message:
                node = self._nodes[row]
                node.receive(peer, number, message)
                self._answer_all(node, records)
                node.release()
            case "left", row, (peer,), _:
                self._nodes[row].left.add(peer)
        return True

    def _ask(self, node: PairwiseNode, records: EventRecords) -> None:
        """End a node's training, and ask a neighbour."""
        node.finish_training()
        peer = node.partner(self._plan.experiment.seed)
        if peer is None:
            self._end_round(node, records, skipped=[])
            return
        self._send(node, peer, node.pace.ask(peer), message_of(node.steps.outgoing()))

    def _answer_all(self, node: PairwiseNode, records: EventRecords) -> None:
        """Answer requests, and take in the answer to the node's own, where it has come."""
        while (request := node.pace.next()) is not None:
            self._answer(node, request)
        asked = node.pace.asked
        if asked is None or not node.pace.is_over(self.timeline.now_s):
            return
        answers = node.pace.chosen()
        for peer, answer in answers.items():
            node.meet(peer, answer.number, node.steps.messages[peer][answer.number])
        node.closed[asked[0]] = asked[1]
        for request in node.pace.conclude():
            self._answer(node, request)
        self._end_round(node, records, skipped=[] if answers else [asked[0]])

    def _answer(self, node: PairwiseNode, request: Request) -> None:
        own = message_of(node.steps.outgoing()) if request.is_welcome else None
        if request.is_welcome:
            node.meet(request.peer, request.number, node.steps.messages[request.peer][request.number])
        node.closed[request.peer] = request.number
        self._send(node, request.peer, request.number, own)

    def _end_round(self, node: PairwiseNode, records: EventRecords, *, skipped: list[str]) -> None:
        steps = node.steps
        records.add(steps, skipped=skipped, bytes_sent=self._sent_bytes[steps.row], time_s=self.timeline.now_s)
        self._sent_bytes[steps.row] = 0
        if steps.round == self._plan.experiment.rounds or node.left >= set(steps.slots):
            node.is_over = True
            node.pace.end()
            for name in steps.slots:
                self.timeline.send(self.timeline.arrival_s(steps.name, name, 0), "left", steps.name, name)
        else:
            node.begin()
            self.timeline.at(self.timeline.now_s + self.timeline.training_s(steps), "trained", steps.row)
        records.close(lambda other: self._nodes[other.row].is_over)

    def _send(self, node: PairwiseNode, peer: str, number: int, message: Message | None) -> None:
        name, size_bytes = node.steps.name, 0
        if message is not None:
            size_bytes = self.timeline.bytes_each(number, {channel: tensor.unsqueeze(0) for channel, tensor in message.items()})
        self._sent_bytes[node.steps.row] += size_bytes
        arrival_s = self.timeline.arrival_s(name, peer, size_bytes, alone=True)
        # what is sent later comes later, also where it is shorter
        self._arrival_s[name, peer] = max(arrival_s, self._arrival_s.get((name, peer), 0.0))
        self.timeline.send(self._arrival_s[name, peer], "came", name, peer, number, message is not None, message=message)

    def tensors(self) -> dict[str, Tensor]:
        """Models at the start of the round, and messages that wait or are on their way."""
        found = self.timeline.tensors()
        for node in self._nodes:
            name = node.steps.name
            found |= {f"start/{name}/{key}": tensor for key, tensor in node.start.items()}
            for place, (peer, number) in enumerate(node.pace.deferred.items()):
                message = node.steps.messages[peer][number]
                found |= {f"deferred/{name}.{place}/{channel}": tensor for channel, tensor in message.items()}
        return found

    def metadata(self) -> dict[str, Any]:
        """Metadata of a checkpoint."""
        return {
            **self.timeline.metadata(),
            "arrival_s": [[*ends, seconds] for ends, seconds in self._arrival_s.items()],
            "sent_bytes": self._sent_bytes,
            "nodes": [node.metadata() for node in self._nodes],
        }

    def restore(self, groups: Groups, metadata: Mapping[str, Any]) -> None:
        """Take up a checkpoint."""
        for node, saved in zip(self._nodes, metadata["nodes"], strict=True):
            node.restore(groups, saved)
        self._arrival_s = {(sender, receiver): seconds for sender, receiver, seconds in metadata["arrival_s"]}
        self._sent_bytes = metadata["sent_bytes"]
        self.timeline.restore(groups, metadata)
