"""The factory of inboxes, by which every runtime has them made, and what travels over an edge.

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from p2pfl.algorithms.aggregators import Aggregator, WeightedMean
from p2pfl.algorithms.base import Channel, Inbox, SlotMessages


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
