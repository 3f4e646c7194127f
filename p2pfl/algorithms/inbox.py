"""Inboxes, which hold the neighbours' messages of one phase by channel, and the factory by which every runtime has them made.

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from p2pfl.algorithms.aggregators import Aggregator, ChannelMessages, WeightedMean, rows_with


@dataclass(frozen=True, kw_only=True, slots=True)
class Channel:
    """One kind of message that an algorithm sends in a round."""

    missing: Literal["own", "zero"] = "own"
    """Stand-in for a message that did not come: "own": its weight is added to the self-weight; "zero": zero, for differences."""

    per_edge: bool = False
    """Whether each neighbour gets a message of its own: `outgoing` then gives (N, K, ...), column k for the neighbour in slot k."""

    model: bool = False
    """Whether it carries the model itself, so that differences between neighbours measure disagreement."""

    encodes: str | None = None
    """The channel in whose place it travels: what `Algorithm.decode` makes that one's next value of. Every receiver holds the value, and
    where one has missed something the runtime sends it whole; an inbox shows the value and never this channel. All channels that encode
    one, and it, are sent in one and the same phase of a round."""


SlotMessages = Callable[[str, int, Tensor | None], Tensor]
"""Finds the messages of a channel from the k-th neighbours of some rows (None: of all), (len(rows), ...)."""


@dataclass(kw_only=True)
class Inbox:
    """The neighbours' messages of one phase, by slot in sorted node order; a runtime hands it a function that finds a slot's messages.

    The same arithmetic in the same order serves one row and N rows, which is what makes a daemon's weights equal a simulator's.
    """

    channels: Mapping[str, Channel]
    sent: Mapping[str, Tensor]
    """The own rows' messages, (N, ...)."""

    weights_NK: Tensor
    """Mixing weights in the messages' dtype; column k belongs to each row's k-th neighbour in sorted order; 0 in padding."""

    present_NK: Tensor
    """bool: whose message came. Padding is False."""

    slot: SlotMessages
    aggregator: Aggregator = field(default_factory=WeightedMean)
    """How `mix` makes one message of several."""

    self_weights_N: Tensor | None = None
    """Self-weights; None: what the neighbours' weights leave of 1."""

    compensation: Mapping[str, Tensor] = field(default_factory=dict)
    """The negatives of earlier flows that were not matched, (N, ...), by channel; empty for most rounds."""

    flows: dict[tuple[int, int], dict[str, Tensor]] | None = None
    """Takes what came into each row from each slot, by (row, slot) and channel, for a ledger; None: nobody asks."""

    asked_NK: Tensor | None = None
    """bool: whose flows are taken; None: all."""

    writes_over: bool = False
    """Whether a message may be written over when it has been mixed: its flow then takes its place, and no more memory. Only where each is
    asked for once; see Algorithm.reads_once."""

    _measured: dict[str, tuple[Tensor, Tensor, dict[int, Tensor]]] = field(default_factory=dict)
    """Distances that `mix` has found. The messages are not kept: they know this inbox, and a circle of tensors would outlive the round."""

    def own(self, channel: str) -> Tensor:
        """The row's own message, (N, ...)."""
        return self.sent[channel]

    def mix(self, channel: str, *, scale_NK: Tensor | float | None = None) -> Tensor:
        """sum_j W_ij m_j with the own row, (N, ...), or what else the aggregator makes; see `Channel.missing` for what did not come.

        Args:
            channel: its messages.
            scale_NK: factor on each neighbour's weight, the same at both ends of an edge; the rest of it is added to the self-weight.
        """
        messages = ChannelMessages(
            own=self.sent[channel],
            weights_NK=self.weights_NK if scale_NK is None else self.weights_NK * scale_NK,
            own_weights=self.own_weights,
            present_NK=self.present_NK,
            keeps_mean=self.channels[channel].missing == "own",
            writes_over=self.writes_over,
            message=lambda k, rows: self.slot(channel, k, rows),
            take_flow=lambda k, rows, added: self._take_flow(channel, k, rows, added),
        )
        total = self.aggregator.mix(messages)
        self._measured[channel] = messages.squared_N, messages.weighted_N, messages.distances
        if channel in self.compensation:
            total += self.compensation[channel]
        return total

    def take_in(self, channel: str, into: Tensor, flows: Iterable[Tensor]) -> Tensor:
        """A rule's own flows, added to *into* (N, ...): what goes over each edge in the order of the slots, (N, ...), 0 where nothing came.

        The other end's flow must be the exact negative. Only a flow that comes in this way, or by `mix`, can be rolled back where the other
        end turns out to have missed its message; the channel is one of its messages, with missing="own".
        """
        total = into.clone()
        for k, added in enumerate(flows):
            total += added
            self._take_flow(channel, k, None, added)
        if channel in self.compensation:
            total += self.compensation[channel]
        return total

    def own_weights(self) -> Tensor:
        """Weights of the rows' own messages, (N,): W_ii."""
        return self.self_weights_N if self.self_weights_N is not None else 1 - self.weights_NK.sum(dim=-1)

    def stack(self, channel: str) -> tuple[Tensor, Tensor, Tensor]:
        """Single messages (N, K, ...), zeros where none came, their weights (N, K) and which are there (N, K) bool."""
        own = self.sent[channel]
        num_slots = self.weights_NK.shape[1]
        stacked = own.new_zeros((own.shape[0], num_slots, *own.shape[2 if self.channels[channel].per_edge else 1 :]))
        for k in range(num_slots):
            rows = rows_with(self.present_NK, k)
            if rows is None:
                stacked[:, k] = self.slot(channel, k, None)
            elif len(rows):
                stacked[rows, k] = self.slot(channel, k, rows)
        return stacked, self.weights_NK, self.present_NK

    def squared_distances(self, channel: str) -> Tensor:
        """Sum over the neighbours that are there of ||m_i - m_j||**2, (N,) float64; a by-product of `mix`."""
        if channel not in self._measured:
            self.mix(channel)
        return self._measured[channel][0]

    def distances(self, channel: str) -> dict[int, float]:
        """||m_i - m_j|| of one row to each neighbour that is there, by slot; a by-product of `mix`, empty where there was none."""
        if channel not in self._measured:
            return {}
        return {k: math.sqrt(squared_N.item()) for k, squared_N in self._measured[channel][2].items()}

    def weighted_squared_distances(self, channel: str) -> Tensor:
        """Sum over the neighbours that are there of w_ij ||m_i - m_j||**2, (N,) float64; a by-product of the last `mix`."""
        return self._measured[channel][1]

    def _take_flow(self, channel: str, k: int, rows: Tensor | None, added: Tensor) -> None:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class InboxFactory:
    """Makes the inboxes of a rule, so that all of them aggregate alike."""

    channels: Mapping[str, Channel]
    aggregator: Aggregator = field(default_factory=WeightedMean)

    def for_rows(self, sent: Mapping[str, Tensor], slot: SlotMessages, **others: Any) -> Inbox:
        """Make the inbox of many rows, whose messages a function finds; the other arguments as the attributes of `Inbox`."""
        return Inbox(channels=self.channels, aggregator=self.aggregator, sent=sent, slot=slot, **others)

    def for_node(
        self,
        sent: Mapping[str, Tensor],
        slots: Sequence[str],
        messages: Mapping[str, Mapping[str, Tensor]],
        weights: Mapping[str, float],
        *,
        self_weight: float,
        dtype: torch.dtype,
        **others: Any,
    ) -> Inbox:
        """Make the inbox of one node.

        Args:
            sent: its own messages, (1, ...).
            slots: its neighbours' names, sorted.
            messages: received ones, by neighbour and channel, without the row's axis.
            weights: w_ij by neighbour; others count as 0.
            self_weight: weight of the own message.
            dtype: of the model.
            others: compensation, flows and writes_over.
        """
        return self.for_rows(
            dict(sent),
            lambda channel, k, _: messages[slots[k]][channel].unsqueeze(0),  # one row: all or none
            weights_NK=torch.tensor([[weights.get(name, 0.0) for name in slots]], dtype=torch.float64).to(dtype),
            self_weights_N=torch.tensor([self_weight], dtype=torch.float64).to(dtype),
            present_NK=torch.tensor([[name in messages for name in slots]], dtype=torch.bool),
            **others,
        )

    def without_messages(
        self, sent: Mapping[str, Tensor], num_slots: int, dtype: torch.dtype, compensation: Mapping[str, Tensor] | None = None
    ) -> Inbox:
        """Make an inbox into which no message came: every row keeps its own, and takes the compensation."""
        first = next(iter(sent.values()))
        weights_NK = first.new_zeros((len(first), num_slots), dtype=dtype)
        return self.for_rows(sent, _no_message, weights_NK=weights_NK, present_NK=weights_NK.bool(), compensation=compensation or {})


def _no_message(channel: str, k: int, rows: Tensor | None) -> Tensor:
    raise AssertionError(f"channel {channel}, slot {k}, rows {rows}: no message came")


def over_an_edge(
    channels: Mapping[str, Channel], sent: Mapping[str, Tensor], *, whole: bool = False, row: int = 0, slot: int = 0
) -> dict[str, Tensor]:
    """Parts of a phase's `outgoing` that travel from one row to its neighbour in one slot, by channel in the order of the names.

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
