"""What real nodes did at their own pace, computed again from their records of who merged what, in which order."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from p2pfl.errors import ConfigError, StoreError
from p2pfl.experiment.plan import Plan
from p2pfl.protocol.pace import Held
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.simulator.events.asynchronous import merge_newest
from p2pfl.simulator.events.paced import Message, PacedDelays, PacedNode, PacedRecords, message_of
from p2pfl.simulator.events.pairwise import PairwiseNode

Row = Mapping[str, Any]


def recorded_rows(place: Path, plan: Plan) -> dict[str, deque[Row]]:
    """Each node's rows in the order of its rounds.

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


class AsynchronousReplay:
    """A run of asynchronous nodes once more.

    The order between nodes is what their records imply: a message must have been sent before it is merged.

    Args:
        plan: of the run; all sites' data are here.
        folder: where this one writes.
        recorded: from `recorded_rows`.
        progress: as the engine's.
        stopwatch: goes on from what the run has taken so far; None: begins here.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        recorded: Mapping[str, deque[Row]],
        progress: Callable[[int, int, Mapping[str, Any]], None] | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self._stopwatch = stopwatch if stopwatch is not None else Stopwatch()
        self._plan, self._rows = plan, recorded
        self._nodes = [PacedNode(plan, name) for name in plan.names]
        self._records = PacedRecords(plan=plan, folder=folder, stopwatch=self._stopwatch, nodes=self._nodes, progress=progress)
        self._delays = PacedDelays(plan)
        self._sent: dict[str, dict[str, Tensor]] = {}
        """By node, what it has sent in the round that it has not merged yet."""
        self._messages: dict[tuple[str, int], Message] = {}
        self._wanted = Counter((peer, number) for rows in recorded.values() for row in rows for peer, number, _ in row["merged"])
        self._stopwatch.lap("setup")

    def run(self) -> None:
        """Every recorded round.

        Raises:
            StoreError: the records name a message that nobody sent.
        """
        while any(self._rows.values()):
            if not any(self._advance(node) for node in self._nodes):
                stuck = next(name for name, rows in self._rows.items() if rows)
                raise StoreError(f"{stuck}, round {self._rows[stuck][0]['round']}: merged a message that no record says was sent")
            self._records.close(lambda node: not self._rows[node.name])
        self._records.conclude(None)

    def _advance(self, node: PacedNode) -> bool:
        """As many rounds of a node as the messages that are there allow; whether there was one."""
        rows, advanced = self._rows[node.name], False
        while rows:
            if node.name not in self._sent:
                node.train()
                self._sent[node.name] = node.outgoing()
                self._messages[node.name, node.round] = message_of(self._sent[node.name])
                advanced = True
            merged = rows[0]["merged"]
            if any((peer, number) not in self._messages for peer, number, _ in merged):
                break
            sent = self._sent.pop(node.name)
            taken = {peer: Held(number=number, update=self._messages[peer, number], age=age) for peer, number, age in merged}
            merge_newest(self._plan, node, sent, taken)
            self._release(merged)
            row = rows.popleft()
            self._records.add(node, skipped=list(row["skipped"]), bytes_sent=int(row["bytes_sent"]), time_s=None)
            advanced = True
        return advanced

    def _release(self, merged: list[list[Any]]) -> None:
        """Forget messages that nobody merges any more."""
        for peer, number, _ in merged:
            self._wanted[peer, number] -= 1
        for key in [key for key in self._messages if not self._wanted[key]]:
            del self._messages[key]


@dataclass(frozen=True, slots=True)
class _Step:
    """One thing that a node did with its model."""

    kind: str
    """"begin" | "met" | "offered" | "returned" | "trained" | "end"."""
    peer: str = ""
    number: int = -1
    row: Row | None = None


def _steps(rows: Iterable[Row]) -> deque[_Step]:
    """A node's rows as what it did, in order."""
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


class PairwiseReplay:
    """A run of nodes that met in pairs once more, meeting by meeting.

    Args:
        plan: of the run; all sites' data are here.
        folder: where this one writes.
        recorded: from `recorded_rows`.
        progress: as the engine's.
        stopwatch: goes on from what the run has taken so far; None: begins here.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        recorded: Mapping[str, deque[Row]],
        progress: Callable[[int, int, Mapping[str, Any]], None] | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self._stopwatch = stopwatch if stopwatch is not None else Stopwatch()
        self._steps = {name: _steps(rows) for name, rows in recorded.items()}
        self._met = {(name, step.peer, step.number) for name, steps in self._steps.items() for step in steps if step.kind == "met"}
        self._offered = {(name, step.peer, step.number) for name, steps in self._steps.items() for step in steps if step.kind == "offered"}
        self._nodes = {name: PairwiseNode(plan, name) for name in plan.names}
        self._flows: dict[tuple[str, str, int], Tensor] = {}
        steps = [node.steps for node in self._nodes.values()]
        self._records = PacedRecords(plan=plan, folder=folder, stopwatch=self._stopwatch, nodes=steps, progress=progress)
        self._stopwatch.lap("setup")

    def run(self) -> None:
        """Every recorded meeting.

        Raises:
            StoreError: two nodes' records do not fit together, as where one was killed between an offer and its record.
        """
        while any(self._steps.values()):
            if not any(self._advance(node) for node in self._nodes.values()):
                name, steps = next((name, steps) for name, steps in self._steps.items() if steps)
                raise StoreError(f"{name}: its meeting {steps[0].number} with {steps[0].peer} is not in the records of {steps[0].peer}")
            self._records.close(lambda node: not self._steps[node.name])
        self._settle()
        self._records.conclude(None)

    def _settle(self) -> None:
        """What only one side has merged and had not taken back by its last round, it took back as it closed."""
        for (name, peer, number), flow in self._flows.items():
            if (peer, name, number) not in self._met:
                population = self._nodes[name].steps.population
                population.state = {**population.state, "x": population.state["x"] - flow}

    def _advance(self, node: PairwiseNode) -> bool:
        """As much as a node did before it met somebody who is not there yet; whether there was anything."""
        steps, advanced = self._steps[node.steps.name], False
        while steps and self._do(node, steps[0]):
            advanced = True
        return advanced

    def _do(self, node: PairwiseNode, step: _Step) -> bool:
        """One step, and the other side's; False where it is not there yet."""
        name = node.steps.name
        if step.kind in ("met", "offered") and not self._meet(node, step):
            return False
        if step.kind == "begin":
            node.begin()
        elif step.kind == "trained":
            node.finish_training()
        elif step.kind == "returned":
            state = node.steps.population.state
            node.steps.population.state = {**state, "x": state["x"] - self._flows.pop((name, step.peer, step.number))}
        elif step.kind == "end":
            assert step.row is not None
            row = step.row
            node.steps.merged = list(row["merged"])
            self._records.add(node.steps, skipped=list(row["skipped"]), bytes_sent=int(row["bytes_sent"]), time_s=None)
        self._steps[name].popleft()
        return True

    def _meet(self, node: PairwiseNode, step: _Step) -> bool:
        """Both sides' share of a meeting, each of what the other sent; False where the other is not there yet."""
        name = node.steps.name
        there = (step.peer, name, step.number)
        if there not in self._met and there not in self._offered:
            return step.kind == "offered"  # it was turned away, and nothing came of it
        other = self._nodes[step.peer]
        theirs = self._steps[step.peer][0] if self._steps[step.peer] else None
        if theirs is None or theirs.kind not in ("met", "offered") or (theirs.peer, theirs.number) != (name, step.number):
            return False
        messages = message_of(node.steps.outgoing()), message_of(other.steps.outgoing())
        for one, kind, peer, message in ((node, step.kind, step.peer, messages[1]), (other, theirs.kind, name, messages[0])):
            if kind == "met":
                before = one.steps.population.state["x"]
                one.meet(peer, step.number, message)
                self._flows[one.steps.name, peer, step.number] = one.steps.population.state["x"] - before
        self._steps[step.peer].popleft()
        return True
