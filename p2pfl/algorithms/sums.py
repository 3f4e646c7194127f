"""Rules that send sums instead of models: running sums where links go one way or lose messages, relayed sums over a tree.

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from p2pfl.algorithms.base import PLAIN_STEPS, Algorithm, Context, LocalChange, Requirement, Sender, State
from p2pfl.algorithms.gossip import DPSGD
from p2pfl.algorithms.inbox import Channel, Inbox

_ROUNDING = 1.01  # push-sum's w is the difference of two running sums


@dataclass(frozen=True)
class PushSum(Algorithm):
    """Stochastic gradient push: each node splits x and a weight w among its receivers and itself; the model is x / w.

    x+ = C (x - eta g(x / w)), w+ = C w with sum_i C_ij = 1: the mean of all x counts, whatever the degrees.

    A message carries sigma_j, the sum of all (x_j, w_j) so far, and a receiver takes in C_ij (sigma_j - rho_ij), where rho_ij is the last
    sigma that came. What a lost message would have given is in the next one, so that nothing is ever lost.

    In rounds without local steps it goes on in the same way.

    Source: Assran, Loizou, Ballas & Rabbat, "Stochastic gradient push", Algorithm 1 (arXiv:1811.10792); running sums after Hadjicostis,
    Vaidya & Dominguez-Garcia, "Robust distributed average consensus via exchange of running sums", IEEE TAC 2016.
    """

    channels: ClassVar[Mapping[str, Channel]] = MappingProxyType({"sigma": Channel(missing="zero")})
    requires: ClassVar[frozenset[Requirement]] = frozenset({"column stochastic", "static", "single messages", "fixed slots"})
    local_changes: ClassVar[frozenset[LocalChange]] = frozenset({"estimate"})

    @property
    def alone(self) -> Algorithm:
        """Local steps and nothing else: with W = 1 what it sends changes nothing."""
        return DPSGD()

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Weight 1 each, nothing sent and nothing heard; x and w side by side in "sigma" and "rho"."""
        assert ctx.slots_NK is not None
        w_N1 = torch.ones_like(x_NP[:, :1])
        sigma = torch.zeros_like(torch.cat([x_NP, w_N1], dim=-1))
        return {"x": x_NP, "w": w_N1, "sigma": sigma, "rho": torch.stack([sigma] * ctx.slots_NK.shape[1], dim=1)}

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:
        """The running sum with this round's x and w."""
        return {"sigma": state["sigma"] + torch.cat([state["x"], state["w"]], dim=-1)}

    def as_models(self, state: State, phase: int, message: Mapping[str, Tensor], sender: Sender | None, ctx: Context) -> list[Tensor]:
        """The model x / w of what a running sum has grown by; w grows in each exchange, by the number of nodes at most."""
        if sender is None:
            return [self.estimate(state)]
        grown = message["sigma"] - state["rho"][:, sender.slot]
        x_NP, w_N1 = grown[:, :-1], grown[:, -1:]
        most = sender.num_nodes * sender.num_exchanges * _ROUNDING
        can_be_N1 = (w_N1 >= 0) & (w_N1 <= most)
        return [torch.where(can_be_N1, x_NP / torch.where(w_N1 > 0, w_N1, 1), torch.inf)]

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """Add what is kept to what neighbours have given since they were last heard."""
        sums, weights_NK, present_NK = inbox.stack("sigma")
        sigma, rho = inbox.own("sigma"), state["rho"]
        # what rounding keeps out of a large running sum is not given away: it stays here
        given = (sigma - state["sigma"]).mul_((1 - inbox.own_weights())[:, None])
        total = torch.cat([state["x"], state["w"]], dim=-1).sub_(given)  # in place: models are large
        del given
        heard = sums if bool(present_NK.all()) else torch.where(present_NK[..., None], sums, rho)
        for k in range(heard.shape[1]):
            total += (heard[:, k] - rho[:, k]).mul_(weights_NK[:, k, None])
        return {"x": total[:, :-1], "w": total[:, -1:], "sigma": sigma, "rho": heard}

    def estimate(self, state: State) -> Tensor:
        """The quotient x / w."""
        return state["x"] / state["w"]


@dataclass(frozen=True)
class RelaySGD(Algorithm):
    """RelaySGD: m_{i->j} = x_i + sum_{k != j} m_{k->i}, counts c likewise; x+ = (x_i + sum_k m_{k->i}) / (1 + sum_k c_{k->i}).

    Every node's model reaches every other's mean with the same weight, d rounds late over d edges. A neighbour's last message stands until
    the next one comes.

    In rounds without local steps what is relayed is the model that the last training round made ("trained"): the tree's diameter in rounds
    later every node holds their exact mean.

    Source: Vogels et al., "RelaySum for decentralized deep learning on heterogeneous data", Algorithm 1 (arXiv:2110.04175).
    """

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
