"""Events of a recorded run: what real nodes did at their own pace, computed again from who merged what, in which order."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from p2pfl.errors import ConfigError, StoreError
from p2pfl.evaluation.progress import Progress
from p2pfl.experiment.plan import Plan
from p2pfl.paces import Chosen
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.simulator.events.asynchronous import merge_newest
from p2pfl.simulator.events.node import EventNode, Message, message_of
from p2pfl.simulator.events.pairwise import PairwiseNode
from p2pfl.simulator.events.simulation import EventRecords

Row = Mapping[str, Any]


def recorded_rows(place: Path, plan: Plan) -> dict[str, deque[Row]]:
    """Read the rows of each node, in the order of its rounds.

    Raises:
        ConfigError: no such run, one whose nodes waited for each other, or one that has not ended.
    """
    records = read_run(place)
    if records.summary is None:
        raise ConfigError("the run has not ended: replay it afterwards", str(place))
    rows: dict[str, deque[Row]] = {name: deque() for name in plan.names}
    for row in sorted(records.nodes, key=lambda row: int(row["round"])):
        if "merged" not in row:
            raise ConfigError("its nodes went round by round, together: simulate its experiment instead", str(place))
        rows[row["node"]].append(row)
    return rows


@dataclass(frozen=True, slots=True)
class _Step:
    """One step that a node took with its model."""

    kind: str
    """"begin" | "met" | "offered" | "returned" | "trained" | "end"; of asynchronous nodes "trained" | "end"."""
    peer: str = ""
    number: int = -1
    row: Row | None = None


def _pairwise_steps(rows: Iterable[Row]) -> deque[_Step]:
    """Steps that the rows of a pairwise node tell of, in order."""
    steps: deque[_Step] = deque()
    for row in rows:
        steps.append(_Step("begin"))
        is_trained = False
        for peer, number, stage, *happened in row["merged"]:
            if stage == "waiting" and not is_trained:
                steps.append(_Step("trained"))
                is_trained = True
            steps.append(_Step("begin") if happened == ["began"] else _Step(happened[0] if happened else "met", peer, number))
        if not is_trained:
            steps.append(_Step("trained"))
        steps.append(_Step("end", row=row))
    return steps


class AsynchronousReplay:
    """Events of asynchronous nodes as recorded: a message must have been sent before it is merged."""

    def __init__(self, plan: Plan, recorded: Mapping[str, deque[Row]]) -> None:
        self._plan = plan
        self.nodes = [EventNode(plan, name) for name in plan.names]
        self.steps = {name: deque(_Step(kind, row=row) for row in rows for kind in ("trained", "end")) for name, rows in recorded.items()}
        self._sent: dict[str, dict[str, Tensor]] = {}
        """By node, what it has sent in the round that it has not merged yet."""
        self._messages: dict[tuple[str, int], Message] = {}
        self._wanted = Counter((peer, number) for rows in recorded.values() for row in rows for peer, number, _ in row["merged"])

    def do(self, row: int, step: _Step, records: EventRecords) -> bool:
        """Train, or merge what is there; False where a message has not been sent yet."""
        node = self.nodes[row]
        assert step.row is not None
        if step.kind == "trained":
            node.train()
            self._sent[node.name] = node.outgoing()
            self._messages[node.name, node.round] = message_of(self._sent[node.name])
            return True
        merged = step.row["merged"]
        if any((peer, number) not in self._messages for peer, number, _ in merged):
            return False
        messages = {peer: self._messages[peer, number] for peer, number, _ in merged}
        chosen = {peer: Chosen(number=number, age=age) for peer, number, age in merged}
        merge_newest(self._plan, node, self._sent.pop(node.name), messages, chosen)
        for peer, number, _ in merged:
            self._wanted[peer, number] -= 1
        for key in [key for key in self._messages if not self._wanted[key]]:
            del self._messages[key]
        records.add(node, skipped=list(step.row["skipped"]), bytes_sent=int(step.row["bytes_sent"]), time_s=None)
        return True

    def missing(self, name: str) -> str:
        """Say what a node waits for in vain."""
        row = self.steps[name][0].row
        assert row is not None
        return f"{name}, round {row['round']}: merged a message that no record says was sent"

    def finish(self) -> None:
        """After the last step a run is over."""


class PairwiseReplay:
    """Events of pairwise nodes as recorded, exchange by exchange."""

    def __init__(self, plan: Plan, recorded: Mapping[str, deque[Row]]) -> None:
        self.steps = {name: _pairwise_steps(rows) for name, rows in recorded.items()}
        self._met = {(name, step.peer, step.number) for name, steps in self.steps.items() for step in steps if step.kind == "met"}
        self._offered = {(name, step.peer, step.number) for name, steps in self.steps.items() for step in steps if step.kind == "offered"}
        self._nodes = {name: PairwiseNode(plan, name) for name in plan.names}
        self.nodes = [node.steps for node in self._nodes.values()]
        self._flows: dict[tuple[str, str, int], Tensor] = {}

    def missing(self, name: str) -> str:
        """Say what a node waits for in vain, as where one was killed between an offer and its record."""
        step = self.steps[name][0]
        return f"{name}: its meeting {step.number} with {step.peer} is not in the records of {step.peer}"

    def finish(self) -> None:
        """Take back what only one side has merged and still had at its last round: it did so as it closed."""
        for (name, peer, number), flow in self._flows.items():
            if (peer, name, number) not in self._met:
                population = self._nodes[name].steps.population
                population.replace_state({**population.state, "x": population.state["x"] - flow})

    def do(self, row: int, step: _Step, records: EventRecords) -> bool:
        """Take one step, and the other side's of an exchange; False where the other side is not there yet."""
        name = self.nodes[row].name
        node = self._nodes[name]
        if step.kind in ("met", "offered") and not self._meet(node, step):
            return False
        if step.kind == "begin":
            node.begin()
        elif step.kind == "trained":
            node.finish_training()
        elif step.kind == "returned":
            state = node.steps.population.state
            node.steps.population.replace_state({**state, "x": state["x"] - self._flows.pop((name, step.peer, step.number))})
        elif step.kind == "end":
            assert step.row is not None
            node.steps.merged = list(step.row["merged"])
            records.add(node.steps, skipped=list(step.row["skipped"]), bytes_sent=int(step.row["bytes_sent"]), time_s=None)
        return True

    def _meet(self, node: PairwiseNode, step: _Step) -> bool:
        """Let both sides merge each other's message; False where the other side is not there yet."""
        name = node.steps.name
        there = (step.peer, name, step.number)
        if there not in self._met and there not in self._offered:
            return step.kind == "offered"  # it was turned away, and nothing came of it
        other = self._nodes[step.peer]
        theirs = self.steps[step.peer][0] if self.steps[step.peer] else None
        if theirs is None or theirs.kind not in ("met", "offered") or (theirs.peer, theirs.number) != (name, step.number):
            return False
        messages = message_of(node.steps.outgoing()), message_of(other.steps.outgoing())
        for one, kind, peer, message in ((node, step.kind, step.peer, messages[1]), (other, theirs.kind, name, messages[0])):
            if kind == "met":
                before = one.steps.population.state["x"]
                one.meet(peer, step.number, message)
                self._flows[one.steps.name, peer, step.number] = one.steps.population.state["x"] - before
        self.steps[step.peer].popleft()
        return True


Replay = AsynchronousReplay | PairwiseReplay


def run_recorded(plan: Plan, folder: RunFolder, replay: Replay, progress: Progress | None, stopwatch: Stopwatch) -> None:
    """Let nodes take the steps that their records tell, each as far as it can before it has to wait for another; then conclude the run.

    Raises:
        StoreError: nobody can go on, as the records do not fit together.
    """
    records, steps = EventRecords(plan=plan, folder=folder, stopwatch=stopwatch, nodes=replay.nodes, progress=progress), replay.steps
    stopwatch.lap("setup")
    while waiting := [node for node in replay.nodes if steps[node.name]]:
        if not any(_advance(replay, node, records) for node in waiting):  # the first that can
            raise StoreError(replay.missing(waiting[0].name))
        records.close(lambda node: not steps[node.name])
    replay.finish()
    records.conclude(None)


def _advance(replay: Replay, node: EventNode, records: EventRecords) -> bool:
    """Take all steps of a node that others allow; whether there was one."""
    steps, advanced = replay.steps[node.name], False
    while steps and replay.do(node.row, steps[0], records):
        steps.popleft()
        advanced = True
    return advanced
