"""A node of an event simulation: one row, whose training, sending and merging happen when an event says so.

Shapes: one row a node, P parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from p2pfl.experiment.plan import Plan
from p2pfl.topology.schedule import neighbourhoods_of

Message = Mapping[str, Tensor]
"""Tensors by channel, without the row's axis."""


class EventNode:
    """A node that is computed exactly as its daemon computes it."""

    def __init__(self, plan: Plan, name: str) -> None:
        algorithm = plan.recipe.algorithm
        self.name, self.row = name, plan.names.index(name)
        self.population = plan.population([name])
        self.slots = plan.neighbours(name)
        self.neighbourhood = neighbourhoods_of(plan.schedule, self.row, splits_mass=algorithm.splits_mass)(0)
        self.round = 0
        """Number of rounds that are over."""
        self.loss: float | None = None
        self.merged: list[list[Any]] = []
        """Updates merged in this round, in order, as the records hold them."""
        self.messages: dict[str, dict[int, Message]] = {}
        """Messages that its pace needs, by sender and number."""
        self.squared: float | None = None
        self.norm: float | None = None
        """sum_j ||x_i - x_j||**2 and ||x_i|| of this round's merges; None where no models were compared, or sent."""
        self._plan = plan
        self._model_channel = algorithm.model_channel

    def train(self) -> None:
        """Take this round's local steps."""
        local_steps = self._plan.experiment.local_steps_at(self.round)
        self.loss = float(self.population.train(self.round)[0]) if local_steps and self.population.trains else None

    def outgoing(self) -> dict[str, Tensor]:
        """Tensors that it sends in this round, (1, ...) by channel."""
        return self.population.outgoing(self.round, 0, local_steps=self._plan.experiment.local_steps_at(self.round))

    def keep(self, peer: str, number: int, message: Message) -> None:
        """Keep a neighbour's message until it is released."""
        self.messages.setdefault(peer, {})[number] = message

    def release(self, peer: str, needed: Collection[int]) -> None:
        """Let go of a neighbour's messages, but those of some numbers."""
        messages = self.messages.get(peer, {})
        for number in messages.keys() - set(needed):
            del messages[number]
        if not messages:  # who has nothing here is not looked at again
            self.messages.pop(peer, None)

    def merge(self, sent: Mapping[str, Tensor], messages: Mapping[str, Message], weights: Mapping[str, float]) -> None:
        """Merge messages of neighbours into what was `sent`, with the weight w_ij of each."""
        self_weight, dtype = self.neighbourhood.self_weight, self._plan.layout.dtype
        inbox = self._plan.recipe.inboxes.for_node(sent, self.slots, messages, weights, self_weight=self_weight, dtype=dtype)
        self.population.merge(self.round, 0, inbox, local_steps=self._plan.experiment.local_steps_at(self.round))
        if self._model_channel is not None:
            if inbox.present_NK.any():
                self.squared = (self.squared or 0.0) + float(inbox.squared_distances(self._model_channel)[0])
            self.norm = float(torch.linalg.vector_norm(sent[self._model_channel][0]).double())


def message_of(sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Message with the tensors that a population of one row sends, without the axis of rows."""
    return {channel: tensor[0] for channel, tensor in sent.items()}
