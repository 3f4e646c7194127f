"""Algorithms that send compressed differences instead of models.

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from p2pfl.algorithms.base import PLAIN_STEPS, Algorithm, Compressor, Context, LocalChange, Notice, Requirement, Sender, State
from p2pfl.algorithms.gossip import DPSGD
from p2pfl.algorithms.inbox import Channel, Inbox
from p2pfl.algorithms.quantizers import PART_NAMES, Identity
from p2pfl.algorithms.sparsifiers import gaussian_columns
from p2pfl.errors import ConfigError
from p2pfl.params import Layout

_MATRIX_AXES = 2
_NO_ROUNDING = 0.5  # what a unit vector orthogonal to the columns before it keeps of its length, and rounding does not
_HALVE_AFTER = 3  # rounds of growth
_ROUNDING = 64.0  # units in the last place of xhat: a smaller difference is none, and must not decide anything
_GROWTH = 4.0  # of ||x - xhat||**2 over its least since the last halving; noise of gradients does not reach it
_MOST_HALVINGS = 10


@dataclass(frozen=True)
class Choco(Algorithm):
    """CHOCO-SGD: q_i = C(x'_i - xhat_i); xhat_i += q_i at all that hold it; x+_i = x'_i + gamma sum_j w_ij (xhat_j - xhat_i).

    x' is what the local steps made of x, and xhat starts at 0. The mean is preserved at any gamma that both ends of an edge use, also where
    the models run away because gamma is too large.

    gamma "auto" starts at min(1, 2 omega). A row halves its own, at most ten times, where the exchange itself runs away:
    - sum_j ||xhat_j - xhat_i||**2 has grown in three exchanges running, and its own ||x' - xhat||**2 is four times its least so far,
    - local steps do not explain that: ||x' - xhat|| has grown by more than they have added to ||x - xhat|| since then,
    - and since then x+ - x' has driven the models apart. By it sum_i ||x_i - mean||**2 grows by the sum over rows of
      ||x+ - xhat||**2 - ||x' - xhat||**2 - gamma sum_j w_ij ||xhat_j - xhat_i||**2, and a row adds up its own terms.
    The first alone also holds while xhat is on its way from 0, and where gradients are noisy or grow. Where sites differ, steps drive the
    models apart and the exchange brings them together; where all drift alike and xhat lags behind, steps explain what the exchange does.
    Over an edge the smaller gamma of both ends counts, or the mean would drift: one byte beside each message says how often its sender has
    halved. Each halving is an event. A gamma that is given stays; a row counts in the same way, and tells when it has counted ten.

    Source: Koloskova, Stich & Jaggi, "Decentralized stochastic optimization and gossip algorithms with compressed communication",
    Algorithm 2 (arXiv:1902.00340); with local steps and any compressor Koloskova et al. 2020 (arXiv:1907.09356).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "arbitrary_types_allowed": True}

    gamma: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Step size of the exchange."""
    compressor: Compressor = field(default_factory=Identity)

    channels: ClassVar[Mapping[str, Channel]] = MappingProxyType(
        {
            "xhat": Channel(missing="own"),
            **{name: Channel(missing="zero", encodes="xhat") for name in PART_NAMES},
            "halvings": Channel(missing="zero"),
        }
    )
    requires: ClassVar[frozenset[Requirement]] = frozenset({"symmetric", "doubly stochastic", "static", "single messages", "synchronous"})
    local_changes: ClassVar[frozenset[LocalChange]] = PLAIN_STEPS
    has_notices: ClassVar[bool] = True

    @property
    def alone(self) -> Algorithm:
        """Local steps and nothing else: with W = 1 what it sends changes nothing."""
        return DPSGD()

    def with_compressor(self, compressor: Compressor) -> Choco:
        """The rule with another compressor."""
        return replace(self, compressor=compressor)

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Start with xhat = 0, as nothing has been sent yet."""
        nothing_NP = torch.zeros_like(x_NP)
        nothing_N, count_N = nothing_NP.new_zeros(len(x_NP)), nothing_NP.new_zeros(len(x_NP), dtype=torch.uint8)
        return {
            "x": x_NP,
            "xhat": nothing_NP,
            "halvings": count_N,
            "growing": count_N,
            "disagreement": nothing_N,
            "least_residual": nothing_N + torch.finfo(x_NP.dtype).max,
            "lag": nothing_N,
            "stepped": nothing_N,
            "driven_apart": nothing_N,
        }

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:
        """Send the compressed difference to xhat, and the xhat that it leads to."""
        parts = self.compressor.compress(state["x"] - state["xhat"], ctx)
        sent = {"xhat": self.decode("xhat", state["xhat"], parts, ctx), **parts}
        return sent if self.gamma != "auto" else {**sent, "halvings": state["halvings"][:, None]}

    def decode(self, channel: str, before: Tensor, encoded: Mapping[str, Tensor], ctx: Context) -> Tensor:
        """Add the decompressed difference to xhat."""
        return before + self.compressor.decompress(dict(encoded), ctx, before.dtype)

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """A step towards what is known of the neighbours."""
        xhat_NP = inbox.own("xhat")
        scale: Tensor | float
        if self.gamma == "auto":
            halvings_NK = torch.maximum(inbox.stack("halvings")[0][..., 0], inbox.own("halvings")).clamp(max=_MOST_HALVINGS)
            scale = self._gammas(ctx, xhat_NP)[halvings_NK.long()]
        else:
            scale = self.gamma
        x_NP = inbox.mix("xhat", scale_NK=scale).sub_(xhat_NP).add_(state["x"])  # in place: models are large
        return {"x": x_NP, "xhat": xhat_NP, **_watched(state, x_NP, inbox)}

    def notices(self, before: State, after: State) -> list[Notice]:
        """Rows that have halved gamma, and those at which that has not helped."""
        rows = (after["halvings"] > before["halvings"]).nonzero()[:, 0].tolist()
        found = ((row, int(after["halvings"][row])) for row in rows)
        return [self._notice(row, number) for row, number in found if self.gamma == "auto" or number == _MOST_HALVINGS]

    def _notice(self, row: int, number: int) -> Notice:
        """The event of one row's halving, or of a gamma that stays and would have been halved as often as there is."""
        if self.gamma != "auto":
            event = "running_away"
            detail = f"at gamma {self.gamma:g} the exchange drives the models apart, {number} times by now; lower it, or leave it to auto"
        elif number == _MOST_HALVINGS:
            event = "gamma_exhausted"
            detail = (
                f"gamma was halved {number} times, the most there are, so that this node hardly mixes; set it, or take another compressor"
            )
        else:
            event = "gamma_halved"
            detail = f"the exchange drove the models apart; gamma has been halved {'once' if number == 1 else f'{number} times'}"
        return Notice(row=row, event=event, detail=detail)

    def _gammas(self, ctx: Context, like: Tensor) -> Tensor:
        """By number of halvings."""
        start = min(1.0, 2 * self.compressor.omega(ctx.layout))
        return like.new_tensor([start * 0.5**number for number in range(_MOST_HALVINGS + 1)])


def _watched(state: State, x_NP: Tensor, inbox: Inbox) -> State:
    """State that decides on gamma, after the exchange that made x+."""
    xhat_NP = inbox.own("xhat")
    disagreement_N = inbox.squared_distances("xhat").to(xhat_NP.dtype)  # sum_j ||xhat_j - xhat_i||**2
    pulled_N = inbox.weighted_squared_distances("xhat").to(xhat_NP.dtype)  # gamma sum_j w_ij ||xhat_j - xhat_i||**2
    ahead_N = torch.linalg.vector_norm(state["x"] - state["xhat"], dim=-1)  # ||x' - xhat|| before xhat takes in what is sent
    residual_N = _squared_norms(state["x"] - xhat_NP)  # ||x' - xhat||**2 after that
    rounding_N = (_ROUNDING * torch.finfo(xhat_NP.dtype).eps) ** 2 * _squared_norms(xhat_NP)  # the most that it makes of residual_N
    lag_N = torch.linalg.vector_norm(x_NP - xhat_NP, dim=-1)
    growing_N = torch.where(disagreement_N > state["disagreement"], (state["growing"] + 1).clamp(max=_HALVE_AFTER), 0)
    driven_apart_N = state["driven_apart"] + (lag_N.square() - residual_N - pulled_N)
    stepped_N = state["stepped"] + (ahead_N - state["lag"]).clamp(min=0)
    has_grown_N = (residual_N > _GROWTH * state["least_residual"]) & (residual_N > rounding_N)
    is_unexplained_N = residual_N.sqrt() > state["least_residual"].sqrt() + stepped_N
    runs_away_N = (growing_N == _HALVE_AFTER) & has_grown_N & is_unexplained_N & (driven_apart_N > 0)
    runs_away_N = runs_away_N & (state["halvings"] < _MOST_HALVINGS)
    is_least_N = runs_away_N | (residual_N <= state["least_residual"])
    return {
        "halvings": state["halvings"] + runs_away_N,
        "growing": torch.where(runs_away_N, 0, growing_N),
        "disagreement": disagreement_N,
        "least_residual": torch.where(is_least_N, residual_N, state["least_residual"]),
        "lag": lag_N,
        "stepped": torch.where(is_least_N, 0, stepped_N),
        "driven_apart": torch.where(is_least_N, 0, driven_apart_N),
    }


def _squared_norms(v_NP: Tensor) -> Tensor:
    norms_N: Tensor = torch.linalg.vector_norm(v_NP, dim=-1)
    return norms_N.square()


@dataclass(frozen=True)
class PowerGossip(Algorithm):
    """PowerGossip: x+_i = x'_i + sum_j w_ij C(X_j - X_i), C the rank-r part that one step of power iteration finds, for each edge.

    A matrix X (m, n) is a tensor of the layout of at least two axes with all but the first as one. Per matrix and edge both ends hold the
    same V (n, r). They exchange X V and hold U = orth((X_i - X_j) V); they exchange X^T U and hold (X_i - X_j)^T U, which makes C and, its
    columns scaled to 1, the next round's V. C projects, so there is no step size to find, and what one end adds the other takes away.
    Tensors of one axis are mixed whole.

    Where a message is lost: with X^T U each end says whether it got the other's X V, one byte an edge, and where one did not nothing
    crosses the edge in this round. Where X^T U is lost one way the ends' V differ in the next round; U is made of the same two messages at
    both, so that what crosses is matched all the same, if along worse columns, and then both hold one V again.

    Source: Vogels, Karimireddy & Jaggi, "Practical low-rank communication compression in decentralized deep learning", Algorithm 1
    (arXiv:2008.01425), with several columns as in PowerSGD (arXiv:1905.13727).
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 1
    """r"""

    phases: ClassVar[int] = 2
    channels: ClassVar[Mapping[str, Channel]] = MappingProxyType(
        {
            "left": Channel(missing="zero", per_edge=True),
            "right": Channel(missing="own", per_edge=True),
            "held": Channel(missing="zero", per_edge=True),
            "vectors": Channel(missing="own"),
        }
    )
    requires: ClassVar[frozenset[Requirement]] = frozenset(
        {"symmetric", "doubly stochastic", "static", "single messages", "fixed slots", "synchronous"}
    )
    local_changes: ClassVar[frozenset[LocalChange]] = PLAIN_STEPS

    @property
    def alone(self) -> Algorithm:
        """Local steps and nothing else: with W = 1 what it sends changes nothing."""
        return DPSGD()

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Gaussian columns, the same for all edges.

        Raises:
            ConfigError: the model has no matrix.
        """
        matrices = _matrices(ctx.layout)
        if not matrices:
            raise ConfigError("algorithm.name = 'powergossip': the model has no tensor of two axes to send less of; use choco")
        assert ctx.slots_NK is not None
        columns = [gaussian_columns(n * self.rank, number, ctx) for number, (_, _, n) in enumerate(matrices)]
        right_M = torch.cat(columns).to(x_NP)
        num_left = self.rank * sum(m for _, m, _ in matrices)
        num_rows, num_slots = len(x_NP), ctx.slots_NK.shape[1]
        return {
            "x": x_NP,
            "left": x_NP.new_zeros((num_rows, num_slots, num_left)),
            "right": right_M.repeat(num_rows, num_slots, 1),
            "held": torch.zeros((num_rows, num_slots, 1), dtype=torch.uint8, device=x_NP.device),
        }

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:
        """Products of the own matrices with each edge's V or U, and in the first phase the vectors."""
        if phase == 1:
            return {"right": self._products(state["x"], state["left"], ctx.layout, transposed=True), "held": state["held"]}
        sent = {"left": self._products(state["x"], state["right"], ctx.layout, transposed=False)}
        places = _vector_places(ctx.layout)
        return {**sent, "vectors": torch.cat([state["x"][:, place] for place in places], dim=-1)} if places else sent

    def as_models(self, state: State, phase: int, message: Mapping[str, Tensor], sender: Sender | None, ctx: Context) -> list[Tensor]:
        """Products, which are no longer than the matrices times V, and the vectors; U has columns of length 1."""
        if sender is None:
            return [message["vectors"]] if "vectors" in message else []
        if phase == 1:
            return [message["right"]]
        columns_N = torch.linalg.vector_norm(state["right"][:, sender.slot], dim=-1, keepdim=True).clamp(min=1)
        return [message["left"] / columns_N, *([message["vectors"]] if "vectors" in message else [])]

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """Each edge's U after the first phase, the models after the second."""
        assert ctx.slots_NK is not None
        channel = ("left", "right")[phase]
        theirs_NKM, weights_NK, present_NK = inbox.stack(channel)
        if phase == 1:
            present_NK = present_NK & ((inbox.own("held") & inbox.stack("held")[0])[..., 0] > 0)
        # from the lower number to the higher, so that both ends compute the same bits
        side_NK = torch.where(ctx.nodes_N[:, None] < ctx.slots_NK, 1, -1).to(state["x"].dtype)
        ahead_NKM = torch.where(present_NK[..., None], side_NK[..., None] * (inbox.own(channel) - theirs_NKM), 0)
        matrices = _matrices(ctx.layout)
        if phase == 0:
            made = [_orthonormal(columns) for columns in self._split(ahead_NKM, [m for _, m, _ in matrices])]
            left_NKM, held_NK1 = torch.cat([columns.flatten(-2) for columns in made], dim=-1), present_NK[..., None].to(torch.uint8)
            return {**state, "x": _with_vectors_mixed(state["x"], inbox, ctx.layout), "left": left_NKM, "held": held_NK1}
        lefts = self._split(state["left"], [m for _, m, _ in matrices])
        gaps = self._split(ahead_NKM, [n for _, _, n in matrices])
        steps_NK = -weights_NK * side_NK

        def flow(k: int) -> Tensor:
            """w_ij C(X_j - X_i), (N, P)."""
            flow_NP = torch.zeros_like(state["x"])
            for (place, _, _), left, gap in zip(matrices, lefts, gaps, strict=True):
                for column in range(self.rank):
                    change = left[:, k, column, :, None] * gap[:, k, column, None, :]
                    flow_NP[:, place] += steps_NK[:, k, None] * change.flatten(1)
            return flow_NP

        x_NP = inbox.take_in("right", state["x"], (flow(k) for k in range(weights_NK.shape[1])))
        kept = self._split(state["right"], [n for _, _, n in matrices])
        right = [_scaled(gap, otherwise).flatten(-2) for gap, otherwise in zip(gaps, kept, strict=True)]
        return {**state, "x": x_NP, "right": torch.cat(right, dim=-1)}

    def _split(self, packed_NKM: Tensor, lengths: list[int]) -> list[Tensor]:
        """(N, K, M) as (N, K, r, length) for each matrix."""
        parts, start = [], 0
        for length in lengths:
            part = packed_NKM[..., start : start + self.rank * length]
            parts.append(part.reshape(*part.shape[:-1], self.rank, length).contiguous())
            start += self.rank * length
        return parts

    def _products(self, x_NP: Tensor, packed_NKM: Tensor, layout: Layout, *, transposed: bool) -> Tensor:
        """X V, or X^T U, of each row's matrices and each edge's columns, packed in the same way."""
        matrices = _matrices(layout)
        columns = self._split(packed_NKM, [m if transposed else n for _, m, n in matrices])
        products = []
        for (place, m, n), each in zip(matrices, columns, strict=True):
            of_rows = zip(each.unbind(), x_NP[:, place].reshape(-1, m, n).unbind(), strict=True)
            # one by one: the same bits for any number of rows and edges
            products.append([[(edge @ (one if transposed else one.T)).flatten() for edge in row.unbind()] for row, one in of_rows])
        return torch.cat([torch.stack([torch.stack(row) for row in rows]) for rows in products], dim=-1)


def _matrices(layout: Layout) -> list[tuple[slice, int, int]]:
    """Where each tensor of two or more axes lies, and as what (m, n)."""
    return [
        (place, spec.shape[0], spec.size // spec.shape[0])
        for spec, place in layout.slices()
        if len(spec.shape) >= _MATRIX_AXES and spec.size
    ]


def _vector_places(layout: Layout) -> list[slice]:
    """Where the others lie."""
    return [place for spec, place in layout.slices() if len(spec.shape) < _MATRIX_AXES and spec.size]


def _with_vectors_mixed(x_NP: Tensor, inbox: Inbox, layout: Layout) -> Tensor:
    """The models after the exchange of what is sent whole."""
    places = _vector_places(layout)
    if not places:
        return x_NP
    parts_NP, mixed_NM, start = x_NP.clone(), inbox.mix("vectors"), 0
    for place in places:
        size = place.stop - place.start
        parts_NP[:, place] = mixed_NM[:, start : start + size]
        start += size
    return parts_NP


def _orthonormal(columns: Tensor) -> Tensor:
    """Columns (..., r, m) by Gram-Schmidt, twice; what depends on earlier ones becomes 0."""
    made: list[Tensor] = []
    for column in columns.unbind(dim=-2):
        rest = column
        for _ in range(2):
            for other in made:
                rest = rest - (rest * other).sum(dim=-1, keepdim=True) * other
            size = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
            rest = torch.where(size > 0, rest / size, 0)
        made.append(torch.where(size > _NO_ROUNDING, rest, 0))
    return torch.stack(made, dim=-2)


def _scaled(columns: Tensor, otherwise: Tensor) -> Tensor:
    """Columns (..., r, n) of length 1; where one is 0, the one from before."""
    size = torch.linalg.vector_norm(columns, dim=-1, keepdim=True)
    return torch.where(size > 0, columns / size, otherwise)
