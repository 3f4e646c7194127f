"""Algorithms that send compressed differences instead of models.

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from p2pfl.algorithms.base import Algorithm, Channel, Context, Inbox, Requirement, State
from p2pfl.algorithms.compressors import PART_NAMES, Compressor, Identity

_HALVE_AFTER = 3  # rounds of growth
_GROWTH = 4.0  # of ||x - xhat||**2 over its least since the last halving; noise of gradients does not reach it
_MOST_HALVINGS = 10


@dataclass(frozen=True)
class Choco(Algorithm):
    """CHOCO-SGD: q_i = C(x'_i - xhat_i); xhat_i += q_i at all that hold it; x+_i = x'_i + gamma sum_j w_ij (xhat_j - xhat_i).

    x' is what the local steps made of x. Of its neighbours' xhat each row keeps their pull, sum_j w_ij (xhat_j - xhat_i), the paper's
    s_i - xhat_i; an exchange adds sum_j w_ij (q_j - q_i). xhat starts at 0. The mean stands still at any gamma that both ends of an edge
    use, also where the models run away because gamma is too large.

    gamma "auto" starts at min(1, 2 omega). A row halves its own, at most ten times, where sum_j ||xhat_j - xhat_i||**2 has grown in three
    exchanges running and its own ||x' - xhat||**2 is four times its least since the last halving: the first alone also grows while xhat is
    on its way from 0, and under noisy gradients. Over an edge the smaller gamma of both
    ends counts, or the mean would drift: one byte beside each message says how often its sender has halved. As gamma then differs by edge,
    a row keeps xhat_j - xhat_i for each neighbour, K vectors instead of one.

    Source: Koloskova, Stich & Jaggi, "Decentralized stochastic optimization and gossip algorithms with compressed communication",
    Algorithm 2 (arXiv:1902.00340); with local steps and any compressor Koloskova et al. 2020 (arXiv:1907.09356).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "arbitrary_types_allowed": True}

    gamma: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Step size of the exchange."""
    compressor: Compressor = field(default_factory=Identity)

    phases: ClassVar[int] = 1
    channels: ClassVar[Mapping[str, Channel]] = MappingProxyType({name: Channel(missing="zero") for name in (*PART_NAMES, "halvings")})
    requires: ClassVar[frozenset[Requirement]] = frozenset(
        {"symmetric", "doubly stochastic", "static", "reliable", "single messages", "fixed slots"}
    )

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Nothing is known of anyone."""
        nothing_NP = torch.zeros_like(x_NP)
        if self.gamma != "auto":
            return {"x": x_NP, "xhat": nothing_NP, "pull": nothing_NP}
        assert ctx.slots_NK is not None
        nothing_N, count_N = nothing_NP.new_zeros(len(x_NP)), nothing_NP.new_zeros(len(x_NP), dtype=torch.uint8)
        return {
            "x": x_NP,
            "xhat": nothing_NP,
            "ahead": x_NP.new_zeros((len(x_NP), ctx.slots_NK.shape[1], x_NP.shape[-1])),  # xhat_j - xhat_i, (N, K, P)
            "halvings": count_N,
            "growing": count_N,
            "disagreement": nothing_N,
            "least_residual": nothing_N + torch.finfo(x_NP.dtype).max,
        }

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:  # noqa: ARG002
        """The compressed difference to what the neighbours already know."""
        parts = self.compressor.compress(state["x"] - state["xhat"], ctx)
        return parts if self.gamma != "auto" else {**parts, "halvings": state["halvings"][:, None]}

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:  # noqa: ARG002
        """A step towards what is known of the neighbours."""
        x_NP, names = state["x"], self.compressor.parts
        stacks = {name: inbox.stack(name) for name in names}
        _, weights_NK, present_NK = stacks[names[0]]
        own_NP = self.compressor.decompress({name: inbox.own(name) for name in names}, ctx, x_NP.dtype)
        xhat_NP = state["xhat"] + own_NP

        def gained(k: int) -> Tensor:
            """q_j - q_i, (N, P); 0 where nothing came."""
            theirs_NP = self.compressor.decompress({name: stacks[name][0][:, k] for name in names}, ctx, x_NP.dtype)
            return torch.where(present_NK[:, k, None], theirs_NP - own_NP, 0)

        if self.gamma != "auto":
            pull_NP = state["pull"]
            for k in range(weights_NK.shape[1]):
                pull_NP = pull_NP + weights_NK[:, k, None] * gained(k)
            return {"x": x_NP + self.gamma * pull_NP, "xhat": xhat_NP, "pull": pull_NP}
        halvings_NK = torch.maximum(inbox.stack("halvings")[0][..., 0], inbox.own("halvings")).clamp(max=_MOST_HALVINGS)
        steps_NK = weights_NK * self._gammas(ctx, x_NP)[halvings_NK.long()] * present_NK
        ahead_NKP = state["ahead"].clone()
        disagreement_N = torch.zeros_like(state["disagreement"])
        for k in range(weights_NK.shape[1]):
            ahead_NKP[:, k] += gained(k)
            x_NP = x_NP + steps_NK[:, k, None] * ahead_NKP[:, k]
            disagreement_N = disagreement_N + _squared_norms(ahead_NKP[:, k])
        watched = _watched(state, disagreement_N, _squared_norms(state["x"] - xhat_NP))
        return {"x": x_NP, "xhat": xhat_NP, "ahead": ahead_NKP, **watched}

    def _gammas(self, ctx: Context, like: Tensor) -> Tensor:
        """By number of halvings."""
        start = min(1.0, 2 * self.compressor.omega(ctx.layout))
        return like.new_tensor([start * 0.5**number for number in range(_MOST_HALVINGS + 1)])


def _watched(state: State, disagreement_N: Tensor, residual_N: Tensor) -> State:
    """What decides on gamma, after an exchange."""
    growing_N = torch.where(disagreement_N > state["disagreement"], (state["growing"] + 1).clamp(max=_HALVE_AFTER), 0)
    runs_away_N = (growing_N == _HALVE_AFTER) & (residual_N > _GROWTH * state["least_residual"]) & (state["halvings"] < _MOST_HALVINGS)
    return {
        "halvings": state["halvings"] + runs_away_N,
        "growing": torch.where(runs_away_N, 0, growing_N),
        "disagreement": disagreement_N,
        "least_residual": torch.where(runs_away_N, residual_N, torch.minimum(state["least_residual"], residual_N)),
    }


def _squared_norms(v_NP: Tensor) -> Tensor:
    norms_N: Tensor = torch.linalg.vector_norm(v_NP, dim=-1)
    return norms_N.square()
