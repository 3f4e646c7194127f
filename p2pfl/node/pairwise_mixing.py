"""The model of a node that exchanges with one neighbour at a time, beside the population that trains in the meantime.

Shapes: one row, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from p2pfl.algorithms import State
from p2pfl.algorithms.guard import DistanceWatch
from p2pfl.errors import BadMessage
from p2pfl.experiment.plan import Plan
from p2pfl.node.mixing import RoundStatistics, array_of, is_finite
from p2pfl.paces.pairwise import HALF
from p2pfl.params import tensor_over
from p2pfl.protocol.edges import Flow
from p2pfl.protocol.neighbour import Neighbour
from p2pfl.protocol.protocol import Protocol
from p2pfl.runs.events import EventKind
from p2pfl.training import Population
from p2pfl.wire.update import EncodedUpdate, ReceivedUpdate, UpdateFormat

Entry = list[Any]
"""[neighbour, number of the exchange over that edge, "training" | "waiting", and perhaps what else happened]."""


class PairwiseMixing:
    """A model that moves half of the way to a neighbour's, and back where the neighbour did not."""

    def __init__(self, plan: Plan, population: Population, protocol: Protocol, update_format: UpdateFormat) -> None:
        self._plan, self._population, self._protocol, self._format = plan, population, protocol, update_format
        self._algorithm = plan.recipe.algorithm
        self._state: State = population.state
        """The model as it is, with all that it has merged; the population's may be one that trains."""
        self._start: State = population.state
        self._before: dict[str, Tensor] = {}
        """The population's tensors as they were when the training began, for a checkpoint in the meantime."""
        self._stage = "training"
        self.merged: list[Entry] = []
        """Exchanges since the last recorded round, in their order."""
        self._distances = {name: DistanceWatch() for name in protocol.neighbours}
        self._squared: float | None = None
        self._norm: float | None = None

    def begin_training(self) -> None:
        """Leave the model as it is to the training."""
        population = self._population
        self._stage, self._start = "training", self._state
        population.replace_state(self._state)
        self._before = {name: tensor.clone() if name.startswith("buffers/") else tensor for name, tensor in population.tensors().items()}

    def end_training(self) -> None:
        """Add to the model what the training has changed."""
        self._state = self._algorithm.apply_stale_update(self._state, self._start, self._population.state)
        self._before, self._stage = {}, "waiting"
        self._population.replace_state(self._state)

    def end_round(self, skipped: list[str]) -> tuple[RoundStatistics, list[Entry]]:
        """Return what the round's exchanges have shown, and which they were."""
        self._stage = "training"
        self._population.replace_state(self._state)
        seen, merged = RoundStatistics(squared=self._squared, norm=self._norm, skipped=set(skipped)), self.merged
        self._squared, self.merged = None, []
        return seen, merged

    def outgoing(self, number: int) -> dict[str, Tensor]:
        """Tensors that a neighbour is sent."""
        return self._algorithm.outgoing(self._state, 0, self._context(number))

    def pack(self, number: int, outgoing: Mapping[str, Tensor]) -> EncodedUpdate:
        """Encode an update of an exchange."""
        return self._format.pack(number, {name: array_of(tensor[0]) for name, tensor in outgoing.items()})

    def merge(self, neighbour: Neighbour, received: ReceivedUpdate, own: Mapping[str, Tensor], round: int) -> Flow | BadMessage | None:
        """Go half of the way to a neighbour's model.

        Returns:
            The flow; why the update is refused; or None where the middle is not finite, and nothing was taken in.
        """
        theirs = {channel: tensor_over(array) for channel, array in received.arrays.items()}
        names, ctx, guard = list(self._protocol.neighbours), self._context(round), self._plan.guard
        norm = guard.norm(self._state, 0, theirs, ctx, slot=names.index(neighbour.name), norms=received.norms)
        refusal = guard.refusal(norm, self._state, 0, own, ctx, diverged=bool(self._population.diverged))
        if refusal is not None:
            return refusal
        inbox = self._plan.recipe.inboxes.for_node(
            own,
            names,
            {neighbour.name: theirs},
            {neighbour.name: HALF},
            self_weight=HALF,
            dtype=self._plan.layout.dtype,
            flows={},
            writes_over=self._algorithm.reads_once,
        )
        merged = self._algorithm.merge(self._state, 0, inbox, ctx)
        if not all(is_finite(tensor) for tensor in merged.values()):
            return None
        self._state = merged
        self._squared = (self._squared or 0.0) + float(inbox.squared_distances("x")[0])
        self._norm = float(torch.linalg.vector_norm(own["x"][0]).double())
        (distance,) = inbox.distances("x").values()
        report = self._distances[neighbour.name].look(distance, self._norm, neighbour.handshakes)
        if report is not None:
            self._protocol.edges.on_event(EventKind.FAR_UPDATE, f"{neighbour.name}: {report}")
        self.note(neighbour.name, received.exchange)
        (amounts,) = (inbox.flows or {}).values()
        return Flow(exchange=received.exchange, amounts=amounts)

    def compensate(self) -> None:
        """Roll back what only this side has merged."""
        for neighbour, unmatched in self._protocol.edges.take_compensations():
            self._state = {**self._state, "x": self._state["x"] - unmatched.amounts["x"].unsqueeze(0)}
            self.note(neighbour.name, unmatched.exchange, "returned")

    def note(self, name: str, number: int, *more: str) -> None:
        """Keep for the record what happened to an exchange."""
        self.merged.append([name, number, self._stage, *more])

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, as the population's at a moment that a later start can go on from."""
        held = self._before or self._population.tensors()
        return held | {f"state/{name}": tensor for name, tensor in self._state.items()}

    def restore(self, merged: list[Entry]) -> None:
        """Take up a checkpoint; the round's training begins once more, with the model as it is now."""
        self._state = self._population.state
        self.merged = [*merged, [self._protocol.edges.me, 0, "training", "began"]]

    def _context(self, number: int) -> Any:
        return self._population.context(number, local_steps=self._plan.experiment.algorithm.local_steps)
