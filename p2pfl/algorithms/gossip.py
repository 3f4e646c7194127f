"""Rules that exchange models once a round: gossip with its momentum forms, outer steps, corrections and acceleration.

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

from p2pfl.algorithms.base import PLAIN_STEPS, Algorithm, Context, LocalChange, Requirement, State
from p2pfl.algorithms.inbox import Channel, Inbox

_SAME_MATRIX_ALWAYS: frozenset[Requirement] = frozenset({"symmetric", "doubly stochastic", "static", "reliable", "synchronous"})
"""Conditions of rules that remember their last rounds: they are exact only where every message of every round arrives."""


class ModelAveraging(Algorithm, Protocol):
    """Rules with one exchange a round, of models: x_i <- sum_j W_ij x_j unless a rule has a merge of its own."""

    channels: ClassVar[Mapping[str, Channel]] = MappingProxyType({"x": Channel(missing="own", model=True)})
    local_changes: ClassVar[frozenset[LocalChange]] = PLAIN_STEPS
    plain_gossip: ClassVar[bool] = True
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


@dataclass(frozen=True)
class AllReduce(ModelAveraging):
    """Every node averages with every other in each round: what a server or an all-reduce would compute, as a reference.

    On the complete graph with Metropolis weights every W_ij is 1/n, so that one exchange gives the exact mean.
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"doubly stochastic", "complete", "synchronous"})


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
        """Take the weighted mean, and add the model's change in this round to the momentum, which a mixing-only round preserves."""
        x_NP, momentum_NP = inbox.mix("x"), state["momentum"]
        if ctx.local_steps:
            way_NP = (state["start"] - x_NP) / (ctx.lr * ctx.local_steps)
            momentum_NP = self.beta * momentum_NP + (1 - self.beta) * way_NP
        return {**state, "x": x_NP, "start": x_NP, "momentum": momentum_NP}


@dataclass(frozen=True)
class DiLoCo(ModelAveraging):
    """DiLoCo with gossip for its all-reduce: delta = x - trained;  v+ = momentum v + delta;  x+ = W (x - lr (momentum v+ + delta)).

    On the complete graph it is DiLoCo itself: the mean of the outer steps is the outer step of the mean. v is never sent.

    In rounds without local steps x <- W x and v stays.

    Source: Douillard et al., "DiLoCo: distributed low-communication training of language models", Algorithm 1 (arXiv:2311.08105), with the
    Nesterov momentum and the constants that its authors found best.
    """

    outer_lr: Annotated[float, Field(gt=0, le=10)] = 0.7
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9

    requires: ClassVar[frozenset[Requirement]] = frozenset({"fixed mean"})
    local_changes: ClassVar[frozenset[LocalChange]] = frozenset({"state"})

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Start with a momentum of zero."""
        return {"x": x_NP, "momentum": torch.zeros_like(x_NP)}

    def adapt(self, state: State, trained_NP: Tensor, ctx: Context) -> State:
        """Take one outer step."""
        delta_NP = state["x"] - trained_NP
        momentum_NP = self.outer_momentum * state["momentum"] + delta_NP
        return {"x": state["x"] - self.outer_lr * (self.outer_momentum * momentum_NP + delta_NP), "momentum": momentum_NP}


@dataclass(frozen=True)
class ExactDiffusion(ModelAveraging):
    """Exact diffusion (D^2, NIDS) with the lazy matrix: psi+ = x - eta g;  phi = psi+ + x - psi;  x+ = (I + W) / 2 phi;  psi = x at first.

    The lazy matrix has no negative eigenvalue, which makes any symmetric W do. The state holds x - psi as "correction", with
    sum_i correction_i = 0; a row that does not train counts as one with no loss.

    In rounds without local steps x <- W x and the correction stays.

    Source: Yuan, Ying, Zhao & Sayed, "Exact diffusion for distributed optimization and learning", Part I, Algorithm 1 (arXiv:1702.05122);
    Tang et al., "D^2" (arXiv:1803.07068).
    """

    requires: ClassVar[frozenset[Requirement]] = _SAME_MATRIX_ALWAYS
    reads_once: ClassVar[bool] = True

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Start with a correction of zero."""
        return {"x": x_NP, "correction": torch.zeros_like(x_NP)}

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:
        """Send the corrected model."""
        return {"x": state["x"] + state["correction"] if ctx.local_steps else state["x"]}

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """Half the own and half the weighted mean."""
        mixed_NP = inbox.mix("x")
        if not ctx.local_steps:
            return {**state, "x": mixed_NP}
        x_NP = (inbox.own("x") + mixed_NP) / 2
        return {"x": x_NP, "correction": x_NP - state["x"]}


@dataclass(frozen=True)
class EXTRA(ModelAveraging):
    """EXTRA: x_{k+2} = (I + W) x_{k+1} - (I + W) / 2 x_k - eta (g_{k+1} - g_k), after x_1 = W x_0 - eta g_0.

    Summed over k, which is how it is kept: x_{k+1} = W x_k - eta g_k + c_k and c_{k+1} = c_k + (W x_k - x_k) / 2, with c_0 = 0. The models
    are mixed as they were before the local steps (combine, then adapt).

    In rounds without local steps x <- W x and c stays.

    Source: Shi, Ling, Wu & Yin, "EXTRA", SIAM J. Optim. 25, 2015 (arXiv:1404.6264).
    """

    requires: ClassVar[frozenset[Requirement]] = _SAME_MATRIX_ALWAYS
    reads_once: ClassVar[bool] = True

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """No correction; "start" is where the model was at the start of a round."""
        return {"x": x_NP, "start": x_NP, "correction": torch.zeros_like(x_NP)}

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:
        """The model before this round's steps."""
        return {"x": state["start"]}

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """The weighted mean, then the round's steps and the correction."""
        mixed_NP, start_NP = inbox.mix("x"), inbox.own("x")
        if not ctx.local_steps:
            return {**state, "x": mixed_NP, "start": mixed_NP}
        x_NP = mixed_NP + (state["x"] - start_NP) + state["correction"]
        return {"x": x_NP, "start": x_NP, "correction": state["correction"] + (mixed_NP - start_NP) / 2}


@dataclass(frozen=True)
class Chebyshev(ModelAveraging):
    """Gossip with Chebyshev's polynomials: x_{t+1} = w_{t+1} W x_t + (1 - w_{t+1}) x_{t-1}, about the square root of plain gossip's rounds.

    w_1 = 1, w_2 = 1 / (1 - rho^2 / 2), w_{t+1} = 1 / (1 - rho^2 w_t / 4). Rounds with local steps are D-PSGD's; t starts again after each.

    Source: Golub & Varga, "Chebyshev semi-iterative methods", Numer. Math. 3, 1961; for gossip Scaman et al., "Optimal algorithms for
    smooth and strongly convex distributed optimization in networks", ICML 2017 (arXiv:1702.08704).
    """

    rho: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """max(|lambda_2|, |lambda_min|) of W: 1 - spectral_gap in `p2pfl topology show`. Another value converges as well, less fast."""

    requires: ClassVar[frozenset[Requirement]] = _SAME_MATRIX_ALWAYS
    reads_once: ClassVar[bool] = True

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Not begun: "factor" is the last w_t, 0 before the first."""
        return {"x": x_NP, "previous": x_NP, "factor": torch.zeros_like(x_NP[:, :1])}

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """The weighted mean, and beyond it away from where the model was before."""
        mixed_NP, last_N1 = inbox.mix("x"), state["factor"]
        if ctx.local_steps:
            return {"x": mixed_NP, "previous": mixed_NP, "factor": torch.zeros_like(last_N1)}
        squared = self.rho**2
        later_N1 = 1 / (1 - squared * torch.where(last_N1 == 1, 2.0, last_N1) / 4)
        factor_N1 = torch.where(last_N1 == 0, 1.0, later_N1)
        x_NP = factor_N1 * mixed_NP + (1 - factor_N1) * state["previous"]
        return {"x": x_NP, "previous": inbox.own("x"), "factor": factor_N1}
