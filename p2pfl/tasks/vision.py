"""Small images."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from p2pfl.errors import ConfigError
from p2pfl.tasks.base import Task
from p2pfl.tasks.medical import DIRICHLET
from p2pfl.tasks.metrics import CLASSIFICATION, LOSSES
from p2pfl.tasks.partition import missing_classes
from p2pfl.tasks.tables import Preparation, Table, class_targets, partitioned_sites

_LARGEST_PIXEL = 16.0


def digits(
    hidden: int = 32, nodes: int | None = None, partition: Mapping[str, Any] | None = None, seed: int = 0, test_share: float = 0.25
) -> Task:
    """Which digit a handwriting of 8 x 8 pixels shows: 1,797 images, by a perceptron with one hidden layer.

    Args:
        hidden: units of the hidden layer; 0: none, multinomial logistic regression.
        nodes: to share the images out among; None: 10.
        partition: the rule; None: Dirichlet with alpha 0.5.
        seed: of the experiment.
        test_share: of each node's rows.

    Source: Alpaydin & Kaynak 1998, as it ships inside scikit-learn.
    """
    from sklearn.datasets import load_digits

    if hidden < 0:
        raise ConfigError(f"task.hidden = {hidden}: expected 0 or more")
    bunch = load_digits()
    columns = tuple(map(str, bunch.feature_names))
    num_pixels, num_classes = len(columns), len(bunch.target_names)
    pixels_to_unit = Preparation(columns=columns, centre=np.zeros(num_pixels), scale=np.full(num_pixels, _LARGEST_PIXEL))
    sites = partitioned_sites(
        Table(raw=bunch.data, classes=bunch.target),
        10 if nodes is None else nodes,
        DIRICHLET if partition is None else partition,
        seed,
        test_share=test_share,
        prefix="node",
        fit=lambda _: pixels_to_unit,
        targets_of=class_targets,
    )
    return Task(
        name="digits",
        model=partial(_perceptron, num_pixels, hidden, num_classes),
        loss=F.cross_entropy,
        metrics=CLASSIFICATION,
        losses=LOSSES,
        sites=sites,
        features=columns,
        probabilities=_softmax,
        notes=missing_classes(sites),
    )


def _perceptron(num_inputs: int, hidden: int, num_classes: int) -> nn.Module:
    if not hidden:
        return nn.Linear(num_inputs, num_classes)
    return nn.Sequential(nn.Linear(num_inputs, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))


def _softmax(outputs: Tensor) -> Tensor:
    return outputs.softmax(dim=-1)
