"""Algorithms that follow the network's mean gradient, so that they end at the optimum of the mean loss and not beside it.

Shapes: N rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from p2pfl.algorithms.base import Algorithm, Context, LocalChange, Requirement, Sender, State
from p2pfl.algorithms.inbox import Channel, Inbox


@dataclass(frozen=True)
class GradientTracking(Algorithm):
    """Gradient tracking, adapt-then-combine: y_k = W (y_{k-1} + g_k - g_{k-1}), then x_{k+1} = W (x_k - eta y_k), with y_{-1} = g_{-1} = 0.

    What is tracked is g_k = (x_k - trained) / eta, the sum of the K steps' gradients (of what the optimiser made of them): exact for plain
    SGD with K = 1, also on graphs that change; with more local steps take `KGT`. sum_i y_i = sum_i g_i always.

    In rounds without local steps y and x are mixed and nobody moves along y.

    Source: Aug-DGM: Xu, Zhu, Soh & Xie, "Augmented distributed gradient methods", CDC 2015; the adapt-then-combine order is stable at
    larger eta than that of Nedic, Olshevsky & Shi 2017 (DIGing).
    """

    phases: ClassVar[int] = 2
    channels: ClassVar[Mapping[str, Channel]] = MappingProxyType({"y": Channel(missing="own"), "x": Channel(missing="own", model=True)})
    requires: ClassVar[frozenset[Requirement]] = frozenset({"doubly stochastic", "synchronous"})
    local_changes: ClassVar[frozenset[LocalChange]] = frozenset({"state"})
    reads_once: ClassVar[bool] = True

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Start with y = 0 and no gradient."""
        return {"x": x_NP, "y": torch.zeros_like(x_NP), "gradient": torch.zeros_like(x_NP)}

    def adapt(self, state: State, trained_NP: Tensor, ctx: Context) -> State:
        """The steps count as a gradient; x itself waits for y."""
        gradient_NP = (state["x"] - trained_NP) / ctx.lr
        return {**state, "y": state["y"] + (gradient_NP - state["gradient"]), "gradient": gradient_NP}

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:
        """First y, then the model moved along the mixed y."""
        if phase == 0:
            return {"y": state["y"]}
        return {"x": state["x"] - ctx.lr * state["y"] if ctx.local_steps else state["x"]}

    def as_models(self, state: State, phase: int, message: Mapping[str, Tensor], sender: Sender | None, ctx: Context) -> list[Tensor]:
        """The model, or how far y moves one."""
        return [ctx.lr * message["y"]] if phase == 0 else [message["x"]]

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """The weighted mean of what was sent."""
        channel = "y" if phase == 0 else "x"
        return {**state, channel: inbox.mix(channel)}


@dataclass(frozen=True)
class KGT(Algorithm):
    """Gradient tracking with K local steps: each step takes g + c, where c is what the network's mean gradient differs from the own.

    K times y <- y - eta_c (g(y) + c);  z = (x - y) / (K eta_c);  c+ = c - z + W z;  x+ = W (x - eta_s (x - y)), with c = 0 at first.
    eta_c is the optimiser's lr. Exact for plain SGD with any K; sum_i c_i = 0 always.

    In rounds without local steps x is mixed and c stays.

    Source: Liu, Lin, Koloskova & Stich, "Decentralized gradient tracking with local steps", Algorithm 1 (arXiv:2301.01313).
    """

    outer_lr: Annotated[float, Field(gt=0, le=10)] = 1.0
    """How much of the way of the K steps the model goes.  # eta_s"""

    channels: ClassVar[Mapping[str, Channel]] = MappingProxyType({"x": Channel(missing="own", model=True), "z": Channel(missing="own")})
    requires: ClassVar[frozenset[Requirement]] = frozenset({"doubly stochastic", "synchronous"})
    local_changes: ClassVar[frozenset[LocalChange]] = frozenset({"gradient", "state"})
    reads_once: ClassVar[bool] = True

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """No correction; z of a row that does not train is c, as if its gradients were 0."""
        return {"x": x_NP, "z": torch.zeros_like(x_NP), "correction": torch.zeros_like(x_NP)}

    def correct(self, state: State, gradient_NP: Tensor, ctx: Context) -> Tensor:
        """The gradient and the correction."""
        return gradient_NP + state["correction"]

    def adapt(self, state: State, trained_NP: Tensor, ctx: Context) -> State:
        """The mean of the steps."""
        return {**state, "z": (state["x"] - trained_NP) / (ctx.local_steps * ctx.lr)}

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:
        """The model moved by the steps, and their mean."""
        z_NP = state["z"] if ctx.local_steps else torch.zeros_like(state["z"])
        return {"x": state["x"] - self.outer_lr * ctx.local_steps * ctx.lr * z_NP, "z": z_NP}

    def as_models(self, state: State, phase: int, message: Mapping[str, Tensor], sender: Sender | None, ctx: Context) -> list[Tensor]:
        """The model, and how far K steps along z move one."""
        return [message["x"], max(ctx.local_steps, 1) * ctx.lr * message["z"]]

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """The weighted mean, and how the neighbourhood's steps differ from the own."""
        correction_NP = state["correction"] + (inbox.mix("z") - inbox.own("z"))
        return {"x": inbox.mix("x"), "z": correction_NP, "correction": correction_NP}
