"""A network of rows in float64 without a runtime: what an algorithm's rounds give on any graph, messages present or missing.

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from p2pfl.algorithms import Algorithm, Context, Inbox, State
from p2pfl.params import Layout
from p2pfl.topology import Topology

P = 6
LAYOUT = Layout.of(nn.Linear(P - 1, 1).double())

Gradient = Callable[[Tensor, int, int], Tensor]
"""(models (N, P), round, step) -> gradients (N, P)."""


def context(graph: Topology, round: int = 3, *, local_steps: int = 2, lr: float = 0.1, row: int | None = None) -> Context:
    """Of all rows, or of one."""
    index_NK, _, linked_NK, _ = tables(graph)
    rows = slice(None) if row is None else slice(row, row + 1)
    slots_NK = torch.where(linked_NK, index_NK, -1)[rows]
    nodes_N = torch.arange(graph.num_nodes)[rows]
    return Context(round=round, local_steps=local_steps, lr=lr, seed=5, nodes_N=nodes_N, layout=LAYOUT, slots_NK=slots_NK)


def inbox_of(
    algorithm: Algorithm, graph: Topology, sent: Mapping[str, Tensor], *, row: int | None = None, present_NK: Tensor | None = None
) -> Inbox:
    """The messages of all rows, as all of them find them, or one."""
    index_NK, weights_NK, linked_NK, back_NK = tables(graph)
    rows = slice(None) if row is None else slice(row, row + 1)
    index, back = index_NK[rows], back_NK[rows]
    present_NK = linked_NK if present_NK is None else present_NK & linked_NK

    def slot(channel: str, k: int, inner: Tensor | None) -> Tensor:
        chosen = slice(None) if inner is None else inner
        if algorithm.channels[channel].per_edge:
            return sent[channel][index[chosen, k], back[chosen, k]]
        return sent[channel][index[chosen, k]]

    kept_N = None
    if "column stochastic" in algorithm.requires:
        given_N = np.bincount(graph.senders, weights=graph.weights, minlength=graph.num_nodes)
        kept_N = torch.from_numpy(1 - given_N)[rows]
    return Inbox(
        channels=algorithm.channels,
        sent={name: message[rows] for name, message in sent.items()},
        weights_NK=weights_NK[rows],
        present_NK=present_NK[rows],
        slot=slot,
        self_weights_N=kept_N,
    )


@lru_cache(maxsize=16)
def tables(graph: Topology) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Neighbours, weights, presence, and in which of its slots the neighbour has the row, each (N, K)."""
    index_NK, weights_NK, linked_NK = graph.padded()
    back_NK = (index_NK[index_NK] == np.arange(graph.num_nodes)[:, None, None]).argmax(axis=-1)
    return torch.from_numpy(index_NK), torch.from_numpy(weights_NK), torch.from_numpy(linked_NK), torch.from_numpy(back_NK)


def one_round(
    algorithm: Algorithm,
    graph: Topology,
    state: State,
    ctx: Context,
    gradient: Gradient | None = None,
    present_NK: Tensor | None = None,
) -> State:
    """What a runtime does in a round, with plain SGD; without a gradient only the exchange."""
    if gradient is not None:
        x_NP = state["x"]
        for k in range(ctx.local_steps):
            moving = {**state, "x": x_NP}
            gradient_NP = gradient(algorithm.estimate(moving), ctx.round, k)
            x_NP = x_NP - ctx.lr * algorithm.correct(moving, gradient_NP, ctx)
        state = algorithm.adapt(state, x_NP, ctx)
    for phase in range(algorithm.phases):
        sent = algorithm.outgoing(state, phase, ctx)
        state = algorithm.merge(state, phase, inbox_of(algorithm, graph, sent, present_NK=present_NK), ctx)
    return state


def mixed(algorithm: Algorithm, graph: Topology, x_NP: Tensor, rounds: int) -> Tensor:
    """What is estimated after some rounds without local steps."""
    state = algorithm.init(x_NP, context(graph, 0, local_steps=0))
    for number in range(rounds):
        state = one_round(algorithm, graph, state, context(graph, number, local_steps=0))
    return algorithm.estimate(state)


def trained(
    algorithm: Algorithm, graph: Topology, x_NP: Tensor, gradient: Gradient, rounds: int, *, lr: float, local_steps: int = 1
) -> Tensor:
    """What is estimated after some rounds of training."""
    state = algorithm.init(x_NP, context(graph, 0, local_steps=local_steps, lr=lr))
    for number in range(rounds):
        state = one_round(algorithm, graph, state, context(graph, number, local_steps=local_steps, lr=lr), gradient)
    return algorithm.estimate(state)


def rounds_until(
    close: Callable[[Tensor], bool],
    algorithm: Algorithm,
    graph: Topology,
    x_NP: Tensor,
    gradient: Gradient,
    *,
    lr: float,
    local_steps: int = 1,
    at_most: int = 1000,
) -> int:
    """Rounds of training until the estimate is close; at_most + 1 if it never is."""
    state = algorithm.init(x_NP, context(graph, 0, local_steps=local_steps, lr=lr))
    for number in range(at_most):
        state = one_round(algorithm, graph, state, context(graph, number, local_steps=local_steps, lr=lr), gradient)
        if close(algorithm.estimate(state)):
            return number + 1
    return at_most + 1


PARTS = {
    "Float16": ("values",),
    "BFloat16": ("codes",),
    "Int8": ("codes", "scales"),
    "QSGD": ("codes", "norm"),
    "Sign": ("signs", "scales"),
    "TopK": ("places", "values"),
    "RandomK": ("values",),
    "LowRank": ("factors",),
    "Identity": ("values",),
}
"""Names of the arrays that each compressor sends."""


def size_bytes(parts: Mapping[str, Tensor], num_leading: int = 1) -> int:
    """Bytes of one vector's arrays on the wire, without headers; they have that many leading axes."""
    return sum(math.prod(part.shape[num_leading:]) * part.dtype.itemsize for part in parts.values())
