"""Algorithms that average models with their neighbours.

Shapes: N rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from p2pfl.algorithms.base import Channel, Context, Inbox, Requirement, State

_MODEL: Mapping[str, Channel] = MappingProxyType({"x": Channel(missing="own", model=True)})


@dataclass(frozen=True)
class DPSGD:
    """Decentralised parallel SGD, adapt-then-combine: K local steps, then x_i <- sum_j W_ij x_j.

    Source: Lian et al., "Can decentralized algorithms outperform centralized algorithms?", NeurIPS 2017 (arXiv:1705.09056), in the
    adapt-then-combine order of Chen & Sayed 2012, with local steps as in Koloskova et al. 2020 (arXiv:2003.10422).
    """

    phases: ClassVar[int] = 1
    channels: ClassVar[Mapping[str, Channel]] = _MODEL
    requires: ClassVar[frozenset[Requirement]] = frozenset({"doubly stochastic"})

    def init(self, x_NP: Tensor, ctx: Context) -> State:  # noqa: ARG002
        """The start itself."""
        return {"x": x_NP}

    def correct(self, state: State, gradient_NP: Tensor, ctx: Context) -> Tensor:  # noqa: ARG002
        """The gradient as it is."""
        return gradient_NP

    def adapt(self, state: State, trained_NP: Tensor, ctx: Context) -> State:  # noqa: ARG002
        """The trained parameters."""
        return {**state, "x": trained_NP}

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:  # noqa: ARG002
        """The model."""
        return {"x": state["x"]}

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:  # noqa: ARG002
        """The weighted mean of the neighbourhood."""
        return {**state, "x": inbox.mix("x")}

    def estimate(self, state: State) -> Tensor:
        """The model."""
        return state["x"]


@dataclass(frozen=True)
class AllReduce(DPSGD):
    """Every node averages with every other in each round: what a server or an all-reduce would compute, as a reference.

    On the complete graph with Metropolis weights every W_ij is 1/n, so that one exchange gives the exact mean.
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"doubly stochastic", "complete"})
