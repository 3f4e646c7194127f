"""The simulation of nodes that go at their own pace, whatever the pace is and whether events are drawn or recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from p2pfl.evaluation.progress import Progress
from p2pfl.experiment.plan import Plan
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.simulator.events.node import EventNode
from p2pfl.simulator.events.records import EventRecords

CHECKPOINT = "checkpoint.safetensors"

Groups = Mapping[str, Mapping[str, Tensor]]
"""A checkpoint's tensors KIND/NAME/REST as {KIND/NAME: {REST: tensor}}."""


class Events(Protocol):
    """Events of one run: what happens to which node, in which order."""

    nodes: list[EventNode]

    @property
    def now_s(self) -> float | None:
        """Seconds of the virtual clock; None where there is none."""

    @property
    def may_be_saved(self) -> bool:
        """Whether a checkpoint may be written between the last event and the next one."""

    def next(self, records: EventRecords) -> bool:
        """Let the next event happen, and record what it ends; False where none is to come."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint, by KIND/NAME/REST."""

    def metadata(self) -> dict[str, Any]:
        """Metadata of a checkpoint."""

    def restore(self, groups: Groups, metadata: Mapping[str, Any]) -> None:
        """Take up a checkpoint."""


class EventSimulation:
    """A network without common rounds.

    Args:
        plan: what to run; all sites' data are here.
        folder: where it writes.
        events: what happens; owned by this simulation.
        progress: called after each round that all nodes have done.
        stopwatch: goes on from what the run has taken so far.
    """

    def __init__(self, plan: Plan, folder: RunFolder, events: Events, progress: Progress | None, stopwatch: Stopwatch) -> None:
        self._plan, self._folder, self._events = plan, folder, events
        self._records = EventRecords(plan=plan, folder=folder, stopwatch=stopwatch, nodes=events.nodes, progress=progress)
        stopwatch.lap("setup")

    def run(self) -> None:
        """Let events happen until every node has done its rounds, or has no neighbour left; then conclude the run.

        Raises:
            StoreError: recorded events do not fit together.
        """
        saved = self._records.rounds
        while self._events.next(self._records):
            if self._records.rounds >= saved + self._plan.experiment.checkpoint_every and self._events.may_be_saved:
                saved = self._records.rounds
                self.save()
        self._records.conclude(self._events.now_s)

    def save(self) -> None:
        """Write a checkpoint from which `restore` continues exactly."""
        tensors = self._events.tensors()
        for node in self._events.nodes:
            tensors |= {f"node/{node.name}/{key}": tensor for key, tensor in node.population.tensors().items()}
        write_checkpoint(self._folder.path / CHECKPOINT, tensors, {**self._events.metadata(), **self._records.metadata()})

    def restore(self) -> None:
        """Go on from the folder's checkpoint; from the start where it has none."""
        found = read_checkpoint(self._folder.path / CHECKPOINT)
        if found is None:
            self._folder.truncate(0)
            return
        tensors, metadata = found
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, name, rest = key.split("/", 2)
            groups.setdefault(f"{kind}/{name}", {})[rest] = tensor
        for node in self._events.nodes:
            node.population.restore(groups[f"node/{node.name}"])
        self._events.restore(groups, metadata)
        self._records.restore(metadata)
