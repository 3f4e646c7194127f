"""Aggregators, which make one tensor of a row's own message and its neighbours': the interface, and the weighted mean.

Shapes: N rows, K neighbour slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class ChannelMessages:
    """One channel's messages at some rows, slot by slot in sorted node order, and the distances that an aggregator finds on its way."""

    own: Tensor
    """The rows' own messages, (N, ...)."""

    weights_NK: Tensor
    """Mixing weights of the neighbours, in the messages' dtype; 0 in padding."""

    own_weights: Callable[[], Tensor]
    """Computes the self-weights, (N,)."""

    present_NK: Tensor
    """bool: whose message came. Padding is False."""

    keeps_mean: bool
    """Whether the weight of a message that did not come is added to the self-weight, as for models; else it counts as zero."""

    writes_over: bool
    """Whether a message may be written over when it has been read."""

    message: Callable[[int, Tensor | None], Tensor]
    """Finds the k-th neighbours' messages of some rows (None: of all), (len(rows), ...)."""

    take_flow: Callable[[int, Tensor | None, Tensor], None]
    """Takes what came into some rows from slot k, where the other end adds the exact negative."""

    squared_N: Tensor = field(init=False)
    """float64, sum over the neighbours that are there of ||m_i - m_j||**2."""

    weighted_N: Tensor = field(init=False)
    """float64, sum over the neighbours that are there of w_ij ||m_i - m_j||**2."""

    distances: dict[int, Tensor] = field(default_factory=dict)
    """||m_i - m_j||**2 by slot, of slots in which all rows have a message."""

    def __post_init__(self) -> None:
        self.squared_N = torch.zeros(self.own.shape[0], dtype=torch.float64, device=self.own.device)
        self.weighted_N = torch.zeros_like(self.squared_N)

    def rows(self, k: int) -> Tensor | None:
        """The rows whose k-th neighbour's message is there; None for all of them."""
        return rows_with(self.present_NK, k)

    def or_own(self, k: int) -> Tensor:
        """The k-th neighbours' messages, (N, ...), with the own one in place of one that did not come; their distances are measured."""
        theirs, rows = self.own, self.rows(k)
        if rows is None:
            theirs = self.message(k, None)
            self.measure(k, None, theirs - self.own)
        elif len(rows):
            theirs = self.own.clone()
            theirs[rows] = self.message(k, rows)
            self.measure(k, rows, theirs[rows] - self.own[rows])
        return theirs

    def measure(self, k: int, rows: Tensor | None, difference: Tensor) -> None:
        """Add the distances of some rows to their k-th neighbours, from the differences of their messages."""
        norms: Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=-1)
        squared = norms.double().square()
        if rows is None:
            self.distances[k] = squared
            self.squared_N += squared
            self.weighted_N += self.weights_NK[:, k] * squared
        else:
            self.squared_N[rows] += squared
            self.weighted_N[rows] += self.weights_NK[rows, k] * squared


class Aggregator(Protocol):
    """A rule for making one message of several. Implementations are immutable objects."""

    sums_flows: ClassVar[bool]
    """Whether what each slot adds is matched by its exact negative at the other end, so that the mean is preserved."""

    def mix(self, messages: ChannelMessages) -> Tensor:
        """One message for each row, (N, ...). Measures every message that it reads, and reports every flow."""
        ...


@dataclass(frozen=True)
class WeightedMean:
    """The sum of w_ij m_j over neighbours and self, as flows w_ij (m_j - m_i) where the channel keeps the mean."""

    sums_flows: ClassVar[bool] = True

    def mix(self, messages: ChannelMessages) -> Tensor:
        """Add what each slot gives to the own message, in the order of the slots."""
        own, keeps_mean, weights_NK = messages.own, messages.keeps_mean, messages.weights_NK
        total = own.clone() if keeps_mean else _column(messages.own_weights(), own) * own
        for k in range(weights_NK.shape[1]):
            rows = messages.rows(k)
            if rows is None:
                theirs, weight = messages.message(k, None), _column(weights_NK[:, k], own)
                difference = theirs.sub_(own) if messages.writes_over and keeps_mean else theirs - own
                messages.measure(k, None, difference)
                added = difference.mul_(weight) if keeps_mean else weight * theirs  # bit for bit what `flow` gives
                total += added
            elif len(rows):
                theirs, weight = messages.message(k, rows), _column(weights_NK[rows, k], own)
                added = flow(weight, theirs, own[rows]) if keeps_mean else weight * theirs
                total[rows] += added
                messages.measure(k, rows, theirs - own[rows])
            else:
                continue
            if keeps_mean:
                messages.take_flow(k, rows, added)
        return total


def flow(weight: Tensor | float, theirs: Tensor, own: Tensor) -> Tensor:
    """The amount that a merge over one edge adds to the own row: w_ij (m_j - m_i).

    The other side computes exactly the negative, bit for bit, so that what one row gains another loses and the mean is preserved.
    """
    return weight * (theirs - own)


def rows_with(present_NK: Tensor, k: int) -> Tensor | None:
    """The rows whose k-th neighbour's message is there; None for all of them."""
    present_N = present_NK[:, k]
    return None if bool(present_N.all()) else present_N.nonzero().squeeze(-1)


def _column(values_N: Tensor, like: Tensor) -> Tensor:
    """(N,) shaped so that it multiplies (N, ...) row by row."""
    return values_N.reshape(-1, *[1] * (like.dim() - 1))
