"""The inbox over neighbour slots that every runtime fills, and what travels over an edge.

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from p2pfl.algorithms.base import Channel


def flow(weight: Tensor | float, theirs: Tensor, own: Tensor) -> Tensor:
    """What a merge over one edge adds to the own row: w_ij (m_j - m_i).

    The other side computes exactly the negative, bit for bit, so that what one row gains another loses and the mean stands still.
    """
    return weight * (theirs - own)


@dataclass(kw_only=True)
class SlotInbox:
    """An inbox over neighbour slots in sorted node order; subclassed by nobody: a runtime hands it a function that finds a slot's messages.

    The same arithmetic in the same order serves one row and N rows, which is what makes a daemon's weights equal a simulator's.
    """

    channels: Mapping[str, Channel]
    sent: Mapping[str, Tensor]
    """The own rows' messages, (N, ...)."""

    weights_NK: Tensor
    """Of the messages' dtype; column k belongs to each row's k-th neighbour in sorted order; 0 in padding."""

    present_NK: Tensor
    """bool: whose message came. Padding is False."""

    slot: SlotMessages
    """Finds the k-th neighbours' messages."""

    self_weights_N: Tensor | None = None
    """What the own message counts for; None: what the neighbours' weights leave of 1."""

    returns: Mapping[str, Tensor] = field(default_factory=dict)
    """What earlier flows have to be taken back, (N, ...), by channel; empty for most rounds."""

    flows: dict[tuple[int, int], dict[str, Tensor]] | None = None
    """Takes what came into each row from each slot, by (row, slot) and channel, for a ledger; None: nobody asks."""

    asked_NK: Tensor | None = None
    """bool: whose flows are taken; None: all."""

    writes_over: bool = False
    """Whether a message may be written over when it has been mixed: its flow then takes its place, and no more memory. Only where each is
    asked for once; see Algorithm.reads_once."""

    _squared: dict[str, Tensor] = field(default_factory=dict)
    _apart: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    _weighted: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_one_row(
        cls,
        channels: Mapping[str, Channel],
        sent: Mapping[str, Tensor],
        slots: Sequence[str],
        messages: Mapping[str, Mapping[str, Tensor]],
        weights: Mapping[str, float],
        *,
        self_weight: float,
        dtype: torch.dtype,
        returns: Mapping[str, Tensor] | None = None,
        flows: dict[tuple[int, int], dict[str, Tensor]] | None = None,
        writes_over: bool = False,
    ) -> SlotInbox:
        """The inbox of one node.

        Args:
            channels: of the algorithm.
            sent: its own messages, (1, ...).
            slots: its neighbours' names, sorted.
            messages: what came, by neighbour and channel, without the row's axis.
            weights: w_ij by neighbour; nobody else counts.
            self_weight: what the own message counts for.
            dtype: of the model.
            returns: as the attribute.
            flows: as the attribute.
            writes_over: as the attribute.
        """

        def slot(channel: str, k: int, rows: Tensor | None) -> Tensor:  # noqa: ARG001  # one row: all or none
            return messages[slots[k]][channel].unsqueeze(0)

        return cls(
            channels=channels,
            sent=dict(sent),
            weights_NK=torch.tensor([[weights.get(name, 0.0) for name in slots]], dtype=torch.float64).to(dtype),
            self_weights_N=torch.tensor([self_weight], dtype=torch.float64).to(dtype),
            present_NK=torch.tensor([[name in messages for name in slots]], dtype=torch.bool),
            slot=slot,
            returns=returns or {},
            flows=flows,
            writes_over=writes_over,
        )

    def own(self, channel: str) -> Tensor:
        """What this row itself sent, (N, ...)."""
        return self.sent[channel]

    def mix(self, channel: str, *, scale_NK: Tensor | float | None = None) -> Tensor:
        """sum_j W_ij m_j with the own row; a missing neighbour's weight stays at home or counts as nothing, as the channel says."""
        own = self.sent[channel]
        keeps_mean = self.channels[channel].missing == "own"
        weights_NK = self.weights_NK if scale_NK is None else self.weights_NK * scale_NK
        total = own.clone() if keeps_mean else _column(self.own_weights(), own) * own
        squared_N = torch.zeros(own.shape[0], dtype=torch.float64, device=own.device)
        weighted_N = torch.zeros_like(squared_N)
        by_slot = self._apart[channel] = {}
        for k in range(weights_NK.shape[1]):
            rows = self._rows(k)
            if rows is None:
                theirs, weight = self.slot(channel, k, None), _column(weights_NK[:, k], own)
                difference = theirs.sub_(own) if self.writes_over and keeps_mean else theirs - own
                squared_N += (apart_N := _squared_norms(difference))
                by_slot[k] = apart_N
                weighted_N += weights_NK[:, k] * apart_N
                added = difference.mul_(weight) if keeps_mean else weight * theirs  # bit for bit what `flow` gives
                total += added
            elif len(rows):
                theirs, weight = self.slot(channel, k, rows), _column(weights_NK[rows, k], own)
                added = flow(weight, theirs, own[rows]) if keeps_mean else weight * theirs
                total[rows] += added
                squared_N[rows] += (apart_N := _squared_norms(theirs - own[rows]))
                weighted_N[rows] += weights_NK[rows, k] * apart_N
            else:
                continue
            if keeps_mean:
                self._note(channel, k, rows, added)
        self._squared[channel], self._weighted[channel] = squared_N, weighted_N
        if channel in self.returns:
            total += self.returns[channel]
        return total

    def take_in(self, channel: str, into: Tensor, flows: Iterable[Tensor]) -> Tensor:
        """*into* with each slot's flow and with what earlier ones have to be taken back."""
        total = into.clone()
        for k, added in enumerate(flows):
            total += added
            self._note(channel, k, None, added)
        if channel in self.returns:
            total += self.returns[channel]
        return total

    def own_weights(self) -> Tensor:
        """What each row's own message counts for, (N,)."""
        return self.self_weights_N if self.self_weights_N is not None else 1 - self.weights_NK.sum(dim=-1)

    def stack(self, channel: str) -> tuple[Tensor, Tensor, Tensor]:
        """Single messages (N, K, ...), zeros where none came, with weights and presence."""
        own = self.sent[channel]
        num_slots = self.weights_NK.shape[1]
        stacked = own.new_zeros((own.shape[0], num_slots, *own.shape[2 if self.channels[channel].per_edge else 1 :]))
        for k in range(num_slots):
            rows = self._rows(k)
            if rows is None:
                stacked[:, k] = self.slot(channel, k, None)
            elif len(rows):
                stacked[rows, k] = self.slot(channel, k, rows)
        return stacked, self.weights_NK, self.present_NK

    def squared_distances(self, channel: str) -> Tensor:
        """Sum over the neighbours that are there of ||m_i - m_j||**2, (N,) float64; a by-product of `mix`."""
        if channel not in self._squared:
            self.mix(channel)
        return self._squared[channel]

    def distances(self, channel: str) -> dict[int, float]:
        """||m_i - m_j|| of one row to each neighbour that is there, by slot; a by-product of `mix`, empty where there was none."""
        return {k: math.sqrt(apart_N.item()) for k, apart_N in self._apart.get(channel, {}).items()}

    def weighted_squared_distances(self, channel: str) -> Tensor:
        """Sum over the neighbours that are there of w_ij ||m_i - m_j||**2, (N,) float64; a by-product of the last `mix`."""
        return self._weighted[channel]

    def _note(self, channel: str, k: int, rows: Tensor | None, added: Tensor) -> None:
        if self.flows is None:
            return
        if self.asked_NK is None:
            for place, row in enumerate(range(len(added)) if rows is None else rows.tolist()):
                self.flows.setdefault((row, k), {})[channel] = added[place]
            return
        asked = self.asked_NK[:, k] if rows is None else self.asked_NK[rows, k]
        for place in asked.nonzero().squeeze(-1).tolist():
            row = place if rows is None else int(rows[place])
            self.flows.setdefault((row, k), {})[channel] = added[place].clone()  # not a view: the others' are not to be kept

    def _rows(self, k: int) -> Tensor | None:
        """The rows whose k-th neighbour's message is there; None for all of them."""
        present_N = self.present_NK[:, k]
        return None if bool(present_N.all()) else present_N.nonzero().squeeze(-1)


def over_an_edge(
    channels: Mapping[str, Channel], sent: Mapping[str, Tensor], *, whole: bool = False, row: int = 0, slot: int = 0
) -> dict[str, Tensor]:
    """What of a phase's `outgoing` travels from one row to its neighbour in one slot, by channel in the order of the names.

    Args:
        channels: the algorithm's.
        sent: of all rows.
        whole: the values themselves instead of what encodes them.
        row: of the sender.
        slot: of the receiver, for channels that are per edge.
    """
    encoded = {channels[name].encodes for name in sent}
    travels = {name: channels[name].encodes is None if whole else name not in encoded for name in sent}
    return {name: sent[name][row, slot] if channels[name].per_edge else sent[name][row] for name in sorted(sent) if travels[name]}


class SlotMessages(Protocol):
    """How a runtime finds messages."""

    def __call__(self, channel: str, k: int, rows: Tensor | None) -> Tensor:
        """The k-th neighbours' messages of the given rows (None: of all), (len(rows), ...)."""
        ...


def _squared_norms(difference: Tensor) -> Tensor:
    norms_N: Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=-1)
    return norms_N.double().square()


def _column(values_N: Tensor, like: Tensor) -> Tensor:
    """(N,) shaped so that it multiplies (N, ...) row by row."""
    return values_N.reshape(-1, *[1] * (like.dim() - 1))
