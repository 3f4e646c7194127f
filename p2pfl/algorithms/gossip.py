"""Algorithms that average models with their neighbours, and their momentum forms.

Shapes: N rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from p2pfl.algorithms.base import PLAIN_STEPS, Algorithm, Channel, Context, Inbox, LocalChange, Requirement, State

MODEL: Mapping[str, Channel] = MappingProxyType({"x": Channel(missing="own", model=True)})
"""The one channel of algorithms that send their model and nothing else."""


class ModelAveraging(Algorithm, Protocol):
    """Rules with one exchange a round, of models: x_i <- sum_j W_ij x_j unless a rule has a merge of its own."""

    phases: ClassVar[int] = 1
    channels: ClassVar[Mapping[str, Channel]] = MODEL
    reads_once: ClassVar[bool] = True

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Start with the model and nothing beside it."""
        return {"x": x_NP}

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:
        """Send each row's model."""
        return {"x": state["x"]}

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """Take the weighted mean of the neighbourhood."""
        return {**state, "x": inbox.mix("x")}


@dataclass(frozen=True)
class DPSGD(ModelAveraging):
    """Decentralised parallel SGD, adapt-then-combine: K local steps, then x_i <- sum_j W_ij x_j.

    Source: Lian et al., "Can decentralized algorithms outperform centralized algorithms?", NeurIPS 2017 (arXiv:1705.09056), in the
    adapt-then-combine order of Chen & Sayed 2012, with local steps as in Koloskova et al. 2020 (arXiv:2003.10422).
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"fixed mean"})
    local_changes: ClassVar[frozenset[LocalChange]] = PLAIN_STEPS
    plain_gossip: ClassVar[bool] = True


@dataclass(frozen=True)
class AllReduce(ModelAveraging):
    """Every node averages with every other in each round: what a server or an all-reduce would compute, as a reference.

    On the complete graph with Metropolis weights every W_ij is 1/n, so that one exchange gives the exact mean.
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"doubly stochastic", "complete", "synchronous"})
    local_changes: ClassVar[frozenset[LocalChange]] = PLAIN_STEPS
    plain_gossip: ClassVar[bool] = True


@dataclass(frozen=True)
class ADPSGD(ModelAveraging):
    """Asynchronous decentralised parallel SGD: after its local steps a node averages with one neighbour of its choice, both or neither.

    x_i, x_j <- (x_i + x_j) / 2, atomically, while i and everybody else go on training: what the local steps made of the x that they began
    with, x' - x, is added to what x has become meanwhile (`apply_stale_update`). Every such average keeps the mean, so the network's moves
    with gradients only. The pace, and who averages with whom, is the runtime's.

    Source: Lian, Zhang, Zhang & Liu, "Asynchronous decentralized parallel stochastic gradient descent", Algorithm 1 (arXiv:1710.06952).
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"symmetric", "static", "pairwise"})
    uses_weights: ClassVar[bool] = False
    local_changes: ClassVar[frozenset[LocalChange]] = PLAIN_STEPS
    plain_gossip: ClassVar[bool] = True


@dataclass(frozen=True)
class DFedAvgM(ModelAveraging):
    """Decentralised FedAvg with momentum: K heavy-ball steps, then the models are mixed and the momenta are not.

    The heavy ball is the optimiser's (`optimizer: {name: sgd, momentum: 0.9}`): v <- momentum v + g, x <- x - lr v. Each round starts with
    v = 0, as in the paper.

    Source: Sun, Li & Wang, "Decentralized federated averaging", Algorithm 1 (arXiv:2104.11375).
    """

    keep_momentum: bool = False
    """Go on with the last round's v, which points where the model came from before it was mixed."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"fixed mean"})
    local_changes: ClassVar[frozenset[LocalChange]] = PLAIN_STEPS
    plain_gossip: ClassVar[bool] = True

    @property
    def resets_optimizer(self) -> bool:
        """Whether the optimiser's state is all zeros at the start of each round."""
        return not self.keep_momentum


@dataclass(frozen=True)
class QGDSGDm(ModelAveraging):
    """Quasi-global momentum: the momentum follows what training and mixing together made of the model, not the own gradients.

    y = x - eta (beta m + g), K times;  x+ = W y;  m+ = beta m + (1 - beta) (x - x+) / (eta K).

    Source: Lin, Karimireddy, Stich & Jaggi, "Quasi-global momentum", ICML 2021 (arXiv:2102.04761), which has one step between exchanges;
    the division by K keeps m of one gradient's size where there are more.
    """

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """How much of the momentum stays from round to round, and how much of it a step takes."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"fixed mean"})
    local_changes: ClassVar[frozenset[LocalChange]] = frozenset({"gradient"})
    reads_once: ClassVar[bool] = True

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Start without momentum; "start" is where the model was at the start of a round."""
        return {"x": x_NP, "start": x_NP, "momentum": torch.zeros_like(x_NP)}

    def correct(self, state: State, gradient_NP: Tensor, ctx: Context) -> Tensor:
        """Add the momentum, which is the same for the whole round, to the gradient."""
        return gradient_NP + self.beta * state["momentum"]

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """Take the weighted mean, and into the momentum this round's way; without local steps the momentum stays as it is."""
        x_NP, momentum_NP = inbox.mix("x"), state["momentum"]
        if ctx.local_steps:
            way_NP = (state["start"] - x_NP) / (ctx.lr * ctx.local_steps)
            momentum_NP = self.beta * momentum_NP + (1 - self.beta) * way_NP
        return {**state, "x": x_NP, "start": x_NP, "momentum": momentum_NP}
