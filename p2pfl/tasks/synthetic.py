"""Problems whose answer is known, and rows made to order.

Shapes: N nodes, C of them, D dimensions, M rows, R random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2pfl.errors import ConfigError
from p2pfl.tasks.base import Task
from p2pfl.tasks.metrics import CLASSIFICATION, LOSSES
from p2pfl.tasks.partition import missing_classes, node_names
from p2pfl.tasks.sites import Site, SiteTable, Split
from p2pfl.tasks.streams import generator_of, generators_of
from p2pfl.tasks.tables import Preparation

_START, _SHARED, _ROWS = 1, 2, 3
_DRAWN_AT_ONCE = 2**20  # numbers


class Point(nn.Module):
    """Model whose only parameters are a vector x (D,), zero at the start; its outputs are scale * x."""

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
    optimum = float(curvature_N @ minimum_N / curvature_N.sum())
    root_N1 = torch.from_numpy(np.sqrt(curvature_N)).unsqueeze(1)
    fits_ND = (root_N1 * torch.from_numpy(minimum_N).unsqueeze(1)).expand(num_nodes, dimension)
    sites = _table_of(
        node_names("node", num_nodes),
        torch.cat([root_N1, torch.ones_like(root_N1)]),
        torch.cat([fits_ND, torch.full((num_nodes, dimension), optimum, dtype=torch.float64)]),
        num_train=1,
    )
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
    """Pure averaging: every node starts from its own vector of D normal values, and the network finds their mean.

    Args:
        dimension: D.
        nodes: None: 8.
        seed: of the experiment; a node's vector depends on it, on the node's number and on D alone.
    """
    num_nodes = _count("nodes", 8 if nodes is None else nodes)
    _count("task.dimension", dimension)
    sites = [
        Site(name=name, train=None, test=None, start=torch.from_numpy(rng.standard_normal(dimension)))
        for name, rng in zip(node_names("node", num_nodes), generators_of(seed, _START, numbers=range(num_nodes)), strict=True)
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
    shared_D = generator_of(seed, _SHARED).standard_normal(features)  # w
    num_test = max(samples // 4, 4)
    num_rows = samples + num_test
    inputs = torch.empty(num_nodes * num_rows, features)
    targets = torch.empty(num_nodes * num_rows, 1)
    parts = [(slice(0, samples), slice(0, num_nodes * samples)), (slice(samples, None), slice(num_nodes * samples, None))]
    places = [(of, inputs[rows].view(num_nodes, -1, features), targets[rows].view(num_nodes, -1)) for of, rows in parts]
    at_once = max(1, _DRAWN_AT_ONCE // (num_rows * features))

    def fill(first: int) -> None:
        block = slice(first, min(first + at_once, num_nodes))
        raw_CMD, classes_CM = _logistic_rows(seed, block, shared_D, num_rows, heterogeneity)
        for of, inputs_NMD, targets_NM in places:
            inputs_NMD[block] = torch.from_numpy(raw_CMD[:, of])
            targets_NM[block] = torch.from_numpy(classes_CM[:, of])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # drawing releases the interpreter's lock
        list(pool.map(fill, range(0, num_nodes, at_once)))
    sites = _table_of(node_names("node", num_nodes), inputs, targets, num_train=samples, prepare=as_it_is)
    return Task(
        name="synthetic-logistic",
        model=partial(nn.Linear, features, 1),
        loss=F.binary_cross_entropy_with_logits,
        metrics=CLASSIFICATION,
        losses=LOSSES,
        sites=sites,
        features=columns,
        probabilities=torch.sigmoid,
        notes=missing_classes(sites),
    )


def _distance(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs - targets).norm(dim=-1).mean())


def _logistic_rows(seed: int, block: slice, shared_D: np.ndarray, num_rows: int, heterogeneity: float) -> tuple[np.ndarray, np.ndarray]:
    """Features (C, M, D) float64 and classes (C, M) bool of the nodes whose numbers are in a block."""
    num_nodes, features = block.stop - block.start, len(shared_D)
    normal_CR, uniform_CM = np.empty((num_nodes, (2 + num_rows) * features)), np.empty((num_nodes, num_rows))
    for place, rng in enumerate(generators_of(seed, _ROWS, numbers=range(block.start, block.stop))):
        rng.standard_normal(out=normal_CR[place])
        rng.random(out=uniform_CM[place])
    normal_CRD = normal_CR.reshape(num_nodes, 2 + num_rows, features)
    weights_CD = shared_D + heterogeneity * normal_CRD[:, 0]
    raw_CMD = heterogeneity * normal_CRD[:, 1:2] + normal_CRD[:, 2:]
    with np.errstate(over="ignore"):  # a probability of 0
        probability_CM = 1 / (1 + np.exp(-(raw_CMD @ weights_CD[:, :, None])[:, :, 0]))
    return raw_CMD, uniform_CM < probability_CM


def _table_of(
    names: Sequence[str], inputs: Tensor, targets: Tensor, *, num_train: int, prepare: Callable[[np.ndarray], Tensor] | None = None
) -> SiteTable:
    """Sites of one size: first all their training rows, then all their test rows."""
    places = torch.arange(len(names) + 1)
    num_test = len(inputs) // len(names) - num_train
    return SiteTable(
        names=names,
        inputs=inputs,
        targets=targets,
        train=Split(starts=places * num_train),
        test=Split(starts=len(names) * num_train + places * num_test),
        prepare=prepare,
    )


def _count(key: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key} = {value!r}: expected a whole number of at least 1")
    return value
