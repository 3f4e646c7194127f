"""Averaging in fewer rounds.

Shapes: N rows, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from p2pfl.algorithms.base import PLAIN_STEPS, Context, Inbox, LocalChange, Requirement, State
from p2pfl.algorithms.gossip import ModelAveraging


@dataclass(frozen=True)
class Chebyshev(ModelAveraging):
    """Gossip with Chebyshev's polynomials: x_{t+1} = w_{t+1} W x_t + (1 - w_{t+1}) x_{t-1}, about the square root of plain gossip's rounds.

    w_1 = 1, w_2 = 1 / (1 - rho^2 / 2), w_{t+1} = 1 / (1 - rho^2 w_t / 4). Rounds with local steps are D-PSGD's; t starts again after each.

    Source: Golub & Varga, "Chebyshev semi-iterative methods", Numer. Math. 3, 1961; for gossip Scaman et al., "Optimal algorithms for
    smooth and strongly convex distributed optimization in networks", ICML 2017 (arXiv:1702.08704).
    """

    rho: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """max(|lambda_2|, |lambda_min|) of W: 1 - spectral_gap in `p2pfl topology show`. Another value converges as well, less fast."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"symmetric", "doubly stochastic", "static", "reliable", "synchronous"})
    local_changes: ClassVar[frozenset[LocalChange]] = PLAIN_STEPS
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
