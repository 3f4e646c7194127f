"""Problems whose answer is known, and rows made to order.

Shapes: N nodes, D dimensions, M rows.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from p2pfl.errors import ConfigError
from p2pfl.tasks.base import Site, Task
from p2pfl.tasks.medical import logistic_regression
from p2pfl.tasks.partition import node_names
from p2pfl.tasks.tables import Preparation, column_targets

_START, _SHARED, _ROWS = 1, 2, 3


class Point(nn.Module):
    """Parameters x (D,) and nothing else; outputs are scale * x, zero at the start."""

    def __init__(self, dimension: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(dimension, dtype=dtype))

    def forward(self, scale: Tensor) -> Tensor:
        """(M, 1) to (M, D)."""
        return scale * self.x


def quadratic(nodes: int | None = None, dimension: int = 1, homogeneous: bool = False) -> Task:
    """f_i(x) = a_i (x - b_i)**2 / 2 at node i of N, with a_i = 2 i / N and b_i = i - 1 for i = 1 … N; the same in every dimension.

    One row a node, written as a least-squares fit, sqrt(a_i) x against sqrt(a_i) b_i: whatever its size, a batch's gradient is that of f_i.
    The test row holds x itself against the optimum of the mean of all f_i, sum a_i b_i / sum a_i; "distance" is how far x is off.

    Args:
        nodes: N; None: 8.
        dimension: D.
        homogeneous: a_i = 1 and b_i = cos(2 pi (i - 1) / N) instead, the slowest mode of a ring.
    """
    num_nodes = _count("nodes", 8 if nodes is None else nodes)
    _count("task.dimension", dimension)
    numbers_N = np.arange(1, num_nodes + 1)
    curvature_N = np.ones(num_nodes) if homogeneous else 2 * numbers_N / num_nodes  # a
    minimum_N = np.cos(2 * math.pi * (numbers_N - 1) / num_nodes) if homogeneous else numbers_N - 1.0  # b
    optimum = torch.full((1, dimension), float(curvature_N @ minimum_N / curvature_N.sum()), dtype=torch.float64)
    sites = []
    for name, curvature, minimum in zip(node_names("node", num_nodes), curvature_N, minimum_N, strict=True):
        root = torch.tensor([[math.sqrt(curvature)]], dtype=torch.float64)
        sites.append(Site(name=name, train=(root, (root * minimum).expand(1, dimension)), test=(torch.ones_like(root), optimum)))
    return Task(
        name="quadratic",
        model=partial(Point, dimension),
        loss=half_squared_error,
        metrics={"distance": _distance},
        losses=frozenset({"distance"}),
        sites=sites,
        dtype="float64",
    )


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error, summed over columns, the mean over rows."""
    return (outputs - targets).square().sum(dim=-1).mean() / 2


def averaging(dimension: int = 10, nodes: int | None = None, seed: int = 0) -> Task:
    """Nothing to learn: every node starts from its own vector of D normal values, and the network finds their mean.

    Args:
        dimension: D.
        nodes: None: 8.
        seed: of the experiment; a node's vector depends on it, on the node's number and on D alone.
    """
    num_nodes = _count("nodes", 8 if nodes is None else nodes)
    _count("task.dimension", dimension)
    sites = [
        Site(name=name, train=None, test=None, start=torch.from_numpy(_generator(seed, _START, node).standard_normal(dimension)))
        for node, name in enumerate(node_names("node", num_nodes))
    ]
    return Task(name="averaging", model=partial(Point, dimension), loss=None, metrics={}, sites=sites, dtype="float64")


def synthetic_logistic(features: int = 10, samples: int = 100, heterogeneity: float = 0.0, nodes: int | None = None, seed: int = 0) -> Task:
    """Two classes drawn from a logistic model of one's own: P(1 | x) = sigmoid(w_i x), x ~ N(m_i, 1), at node i.

    Args:
        features: columns of x.
        samples: training rows a node; a quarter as many again, at least 4, are its test rows.
        heterogeneity: h in w_i = w + h u_i and m_i = h v_i with normal u_i, v_i; 0: all nodes draw from one model.
        nodes: None: 8.
        seed: of the experiment; a node's rows depend on it, on the node's number and on the options, not on N.
    """
    num_nodes = _count("nodes", 8 if nodes is None else nodes)
    _count("task.features", features)
    _count("task.samples", samples)
    if not 0 <= heterogeneity < math.inf:
        raise ConfigError(f"task.heterogeneity = {heterogeneity}: expected a number of at least 0")
    columns = tuple(node_names("x", features))
    as_it_is = Preparation(columns=columns, centre=np.zeros(features), scale=np.ones(features))
    shared_D = _generator(seed, _SHARED).standard_normal(features)  # w
    num_rows = samples + max(samples // 4, 4)
    sites = []
    for node, name in enumerate(node_names("node", num_nodes)):
        rng = _generator(seed, _ROWS, node)
        weights_D = shared_D + heterogeneity * rng.standard_normal(features)
        raw_MD = heterogeneity * rng.standard_normal(features) + rng.standard_normal((num_rows, features))
        classes_M = (rng.random(num_rows) < 1 / (1 + np.exp(-raw_MD @ weights_D))).astype(np.int64)
        inputs, targets = as_it_is(raw_MD), column_targets(classes_M)
        sites.append(
            Site(name=name, train=(inputs[:samples], targets[:samples]), test=(inputs[samples:], targets[samples:]), prepare=as_it_is)
        )
    return logistic_regression("synthetic-logistic", sites, columns, num_inputs=features)


def _distance(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs - targets).norm(dim=-1).mean())


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, *key])


def _count(key: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key} = {value!r}: expected a whole number of at least 1")
    return value
