"""The simulation of nodes that go at their own pace, whatever the pace is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from p2pfl.evaluation.progress import Progress
from p2pfl.experiment.plan import Plan
from p2pfl.runs.checkpoint import changes_told, read_checkpoint, write_checkpoint
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.simulator.events.node import EventNode
from p2pfl.simulator.events.records import EventRecords
from p2pfl.simulator.events.timeline import Timeline

CHECKPOINT = "checkpoint.safetensors"

Groups = Mapping[str, Mapping[str, Tensor]]
"""A checkpoint's tensors KIND/NAME/REST as {KIND/NAME: {REST: tensor}}."""


class Events(Protocol):
    """Events of one run: what happens to which node, in which order."""

    nodes: list[EventNode]
    timeline: Timeline

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


def run_events(
    plan: Plan, folder: RunFolder, events: Events, progress: Progress | None, stopwatch: Stopwatch, *, resume: bool = False
) -> None:
    """Let events happen until every node has done its rounds, or has no neighbour left; then conclude the run.

    A run to `resume` goes on from its folder's checkpoint, and from the start where it has none.
    """
    records = EventRecords(plan=plan, folder=folder, stopwatch=stopwatch, nodes=events.nodes, progress=progress)
    stopwatch.lap("setup")
    if resume:
        with changes_told(folder.path / CHECKPOINT):
            _restore(events, records)
    saved = records.rounds
    while events.next(records):
        if records.rounds >= saved + plan.experiment.checkpoint_every and events.may_be_saved:
            saved = records.rounds
            tensors = events.tensors()
            for node in events.nodes:
                tensors |= {f"node/{node.name}/{key}": tensor for key, tensor in node.population.tensors().items()}
            write_checkpoint(folder.path / CHECKPOINT, tensors, {**events.metadata(), **records.metadata()})
    records.conclude(events.timeline.now_s)


def _restore(events: Events, records: EventRecords) -> None:
    """Go on exactly from the checkpoint that the records' folder has."""
    found = read_checkpoint(records.folder.path / CHECKPOINT)
    if found is None:
        records.folder.truncate(0)
        return
    tensors, metadata = found
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name, rest = key.split("/", 2)
        groups.setdefault(f"{kind}/{name}", {})[rest] = tensor
    for node in events.nodes:
        node.population.restore(groups[f"node/{node.name}"])
    events.restore(groups, metadata)
    records.restore(metadata)
