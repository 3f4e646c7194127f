"""What a simulated round costs, beside what a user writes by hand, what the hardware allows, and the bare matrix products.

W1: n nodes on a seeded random 4-regular graph, 128 samples of 784 features each (MNIST from P2PFL_DATA, drawn with replacement; synthetic of
the same shape otherwise), a perceptron 784-64-10 with ReLU, batches of 32, 4 steps of SGD a round at 0.05, 20 rounds.
W2: logistic regression on 13 features, 32 samples a node, batches of 4, 10 steps a round.

    python benchmarks/simulator.py                       # W1 at n = 256, W2 at n = 10,000: five interleaved runs, ratios as JSON
    python benchmarks/simulator.py --nodes 16 64 256 1024 4096
    python benchmarks/simulator.py --million             # W2 at n = 1,000,000, with its memory

Ways: `engine` is p2pfl.simulate; `hand` a Python loop over nn.Modules with torch.optim, then averaging; `limit` forward and backward passes
written out for chunks of 8 nodes that stay in the cache, mixing fused into the same loop, a Python thread a core; `floor` the same matrix
products alone, on one core. All give the same weights. Rates are node-rounds a second, medians; ratios are of runs side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import p2pfl
from p2pfl.draws import batch_positions
from p2pfl.tasks import SiteTable, Split, Task, accuracy
from p2pfl.tasks.partition import node_names
from p2pfl.topology import make, weighted

CORES = len(os.sched_getaffinity(0))
LR = 0.05


@dataclass(frozen=True)
class Workload:
    """One of the two."""

    name: str
    sizes: tuple[int, ...]
    """Of the layers."""
    samples: int
    batch: int
    steps: int
    rounds: int

    def model(self) -> nn.Module:
        """A perceptron, or none hidden."""
        if len(self.sizes) == 2:  # noqa: PLR2004
            return nn.Linear(*self.sizes)
        first, hidden, last = self.sizes
        return nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, last))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of a batch."""
        return (F.cross_entropy if self.sizes[-1] > 1 else F.binary_cross_entropy_with_logits)(outputs, targets)


W1 = Workload("W1", (784, 64, 10), samples=128, batch=32, steps=4, rounds=20)
W2 = Workload("W2", (13, 1), samples=32, batch=4, steps=10, rounds=20)
WORKLOADS = {"W1": W1, "W2": W2}


def images(num_nodes: int) -> Task:
    """W1: every node's own draw of one table."""
    names = node_names("node", num_nodes)
    folder = os.environ.get("P2PFL_DATA")
    if folder:
        from p2pfl.tasks.vision import mnist_table

        inputs, targets = mnist_table()
    else:
        draw = torch.Generator().manual_seed(0)
        inputs, targets = torch.rand(60_000, 784, generator=draw), torch.randint(0, 10, (60_000,), generator=draw)
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, len(inputs), num_nodes * W1.samples, dtype=np.int32))
    starts = torch.arange(num_nodes + 1) * W1.samples
    sites = SiteTable(
        names=names, inputs=inputs, targets=targets, train=Split(starts=starts, rows=rows), test=Split(starts=starts // 4, rows=rows)
    )
    return Task(name="images", model=W1.model, loss=F.cross_entropy, metrics={"accuracy": accuracy}, sites=sites)


def patients(num_nodes: int) -> Task:
    """W2: every node's own rows."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_nodes * W2.samples, 13, generator=draw)
    targets = (inputs[:, :1] + inputs[:, 1:2] > 0).float()
    starts = torch.arange(num_nodes + 1) * W2.samples
    sites = SiteTable(names=node_names("node", num_nodes), inputs=inputs, targets=targets, train=Split(starts=starts))
    return Task(name="patients", model=W2.model, loss=F.binary_cross_entropy_with_logits, metrics={}, sites=sites)
