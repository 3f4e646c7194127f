"""Algorithms that end at the optimum of the mean loss with one message a round, by what a node remembers of its last two rounds.

They are exact only where every message of every round arrives and the mixing matrix stays as it is.

Shapes: N rows, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from p2pfl.algorithms.base import PLAIN_STEPS, Context, Inbox, LocalChange, Requirement, State
from p2pfl.algorithms.gossip import ModelAveraging

_SAME_MATRIX_ALWAYS: frozenset[Requirement] = frozenset({"symmetric", "doubly stochastic", "static", "reliable", "synchronous"})


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
    local_changes: ClassVar[frozenset[LocalChange]] = PLAIN_STEPS
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
    local_changes: ClassVar[frozenset[LocalChange]] = PLAIN_STEPS
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
