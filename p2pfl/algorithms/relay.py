"""Averaging over a tree without mixing weights: sums are passed on.

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from p2pfl.algorithms.base import PLAIN_STEPS, Algorithm, Channel, Context, Inbox, LocalChange, Requirement, Sender, State
from p2pfl.algorithms.gossip import DPSGD


@dataclass(frozen=True)
class RelaySGD(Algorithm):
    """RelaySGD: m_{i->j} = x_i + sum_{k != j} m_{k->i}, counts c likewise; x+ = (x_i + sum_k m_{k->i}) / (1 + sum_k c_{k->i}).

    Every node's model reaches every other's mean with the same weight, d rounds late over d edges. A neighbour's last message stands until
    the next one comes.

    In rounds without local steps what is relayed is the model that the last training round made ("trained"): the tree's diameter in rounds
    later every node holds their exact mean.

    Source: Vogels et al., "RelaySum for decentralized deep learning on heterogeneous data", Algorithm 1 (arXiv:2110.04175).
    """

    phases: ClassVar[int] = 1
    channels: ClassVar[Mapping[str, Channel]] = MappingProxyType(
        {"m": Channel(missing="zero", per_edge=True), "count": Channel(missing="zero", per_edge=True)}
    )
    requires: ClassVar[frozenset[Requirement]] = frozenset({"tree", "static", "single messages", "fixed slots", "reliable", "synchronous"})
    local_changes: ClassVar[frozenset[LocalChange]] = PLAIN_STEPS
    uses_weights: ClassVar[bool] = False

    @property
    def alone(self) -> Algorithm:
        """Local steps and nothing else: with W = 1 what it sends changes nothing."""
        return DPSGD()

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Start with empty sums from all neighbours."""
        assert ctx.slots_NK is not None
        num_slots = ctx.slots_NK.shape[1]
        heard = x_NP.new_zeros((x_NP.shape[0], num_slots, x_NP.shape[1]))
        return {"x": x_NP, "trained": x_NP, "m": heard, "count": torch.zeros_like(heard[..., :1])}

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:
        """To each neighbour the own model and what the other neighbours said."""
        own_NP = _own(state, ctx)
        return {"m": _without_each(own_NP, state["m"]), "count": _without_each(torch.ones_like(own_NP[:, :1]), state["count"])}

    def as_models(self, state: State, phase: int, message: Mapping[str, Tensor], sender: Sender | None, ctx: Context) -> list[Tensor]:
        """The mean of the models in a sum; their number is one to all."""
        if sender is None:
            return []
        count_N1 = message["count"]
        can_be_N1 = (count_N1 >= 1) & (count_N1 <= sender.num_nodes)
        return [torch.where(can_be_N1, message["m"] / count_N1, torch.inf)]

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """The mean of all models known of."""
        messages, _, present_NK = inbox.stack("m")
        counts, _, _ = inbox.stack("count")
        m = torch.where(present_NK[..., None], messages, state["m"])
        count = torch.where(present_NK[..., None], counts, state["count"])
        own_NP = _own(state, ctx)
        total_NP, number_N1 = own_NP, torch.ones_like(own_NP[:, :1])
        for k in range(m.shape[1]):
            total_NP, number_N1 = total_NP + m[:, k], number_N1 + count[:, k]
        return {"x": total_NP / number_N1, "trained": own_NP, "m": m, "count": count}


def _own(state: State, ctx: Context) -> Tensor:
    """The model that a row adds to the relayed sums."""
    return state["x"] if ctx.local_steps else state["trained"]


def _without_each(own: Tensor, heard: Tensor) -> Tensor:
    """The own and the sum over the other slots, for each slot; (N, P), (N, K, P) -> (N, K, P).

    Sums from both ends: to subtract one from the whole would leave the whole's rounding in.
    """
    num_slots = heard.shape[1]
    before, after = [own], [torch.zeros_like(own)]
    for k in range(num_slots - 1):
        before.append(before[-1] + heard[:, k])
        after.append(after[-1] + heard[:, num_slots - 1 - k])
    return torch.stack([b + a for b, a in zip(before, reversed(after), strict=True)], dim=1)
