"""Tasks on small images: digits and MNIST.

Shapes: M rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2pfl.data.sources import SOURCES, read
from p2pfl.errors import ConfigError, DataError
from p2pfl.tasks.base import Task
from p2pfl.tasks.medical import DIRICHLET
from p2pfl.tasks.partition import dealt, drawn, node_names, split_rows
from p2pfl.tasks.sites import Rows, Site
from p2pfl.tasks.tables import Preparation, class_targets, classification, partitioned_sites

_LARGEST_PIXEL = 16.0  # of digits

_SIDE = 28  # of MNIST's images, whose pixels go from 0 to 255
_NUM_CLASSES = 10
_NUM_TRAIN = 60_000
_PIXELS = tuple(f"pixel_{row}_{column}" for row in range(_SIDE) for column in range(_SIDE))
# of the 60,000 training images' pixels over 255, as published models take them
_MEAN, _DEVIATION = 0.1307, 0.3081
_IMAGES_HEADER, _LABELS_HEADER = 16, 8  # bytes of an idx file with three axes, with one


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
        bunch.data,
        bunch.target,
        10 if nodes is None else nodes,
        DIRICHLET if partition is None else partition,
        seed,
        test_share=test_share,
        prefix="node",
        fit=lambda _: pixels_to_unit,
        targets_of=class_targets,
    )
    return classification("digits", sites, columns, partial(_perceptron, num_pixels, hidden, num_classes), F.cross_entropy, _softmax)


def mnist(
    data: str | None = None,
    model: str = "cnn",
    hidden: int | None = None,
    samples: int | None = None,
    nodes: int | None = None,
    partition: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Task:
    """Which digit a handwriting of 28 x 28 pixels shows: 60,000 images to train on, 10,000 to test on.

    The training images are shared out by the rule of `partition`, and none of them is ever tested on. The 10,000 official test images are
    dealt out evenly, the same mix of digits for every node whatever it trains on: a node's figures estimate those of its own model on the
    whole test set, and the mean model is tested on each official test image once.

    Args:
        data: folder with the four original files, compressed or not; None: P2PFL_DATA, else what `p2pfl data fetch mnist` downloaded.
        model: "cnn", two convolutions and a linear layer with 7,946 parameters; "perceptron", one hidden layer.
        hidden: units of the perceptron's hidden layer; 0: none, multinomial logistic regression; None: 32.
        samples: training images in all nodes together, drawn from the 60,000; None: all.
        nodes: to share the images out among; None: 10.
        partition: the rule; None: Dirichlet with alpha 0.5.
        seed: of the experiment.

    Source: LeCun, Bottou, Bengio & Haffner 1998.
    """
    findings = [] if model in ("cnn", "perceptron") else [f"task.model = {model!r}: one of cnn, perceptron"]
    if hidden is not None and model == "cnn":
        findings.append(f"task.hidden = {hidden}: is for model: perceptron; here it is cnn")
    elif hidden is not None and hidden < 0:
        findings.append(f"task.hidden = {hidden}: expected 0 or more")
    if samples is not None and not 1 < samples <= _NUM_TRAIN:
        findings.append(f"task.samples = {samples}: expected 2 to {_NUM_TRAIN}")
    if findings:
        raise ConfigError(findings)
    num_nodes = 10 if nodes is None else nodes
    files = read(SOURCES["mnist"], SOURCES["mnist"].md5, data)
    images_M, classes_M = _idx(files, "train")
    if samples is not None:
        rows = drawn(len(classes_M), samples, seed)
        images_M, classes_M = images_M[rows], classes_M[rows]
    parts = split_rows(classes_M, num_nodes, DIRICHLET if partition is None else partition, seed, test_share=0)
    trains = _by_node(images_M, classes_M, [train for train, _ in parts])
    images_M, classes_M = _idx(files, "t10k")
    tests = _by_node(images_M, classes_M, dealt(classes_M, num_nodes, seed))
    sites = [
        Site(name=name, train=train, test=test if len(test[1]) else None, prepare=_images)
        for name, train, test in zip(node_names("node", num_nodes), trains, tests, strict=True)
    ]
    network = _cnn if model == "cnn" else partial(_pixel_perceptron, 32 if hidden is None else hidden)
    return classification("mnist", sites, _PIXELS, network, F.cross_entropy, _softmax)


def _idx(files: Mapping[str, bytes], part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (M, 1, 28, 28) uint8 and classes (M,) int64 of the files of "train" or "t10k", whose bytes are known."""
    images = np.frombuffer(files[f"{part}-images-idx3-ubyte"], dtype=np.uint8, offset=_IMAGES_HEADER)
    labels = np.frombuffer(files[f"{part}-labels-idx1-ubyte"], dtype=np.uint8, offset=_LABELS_HEADER)
    return images.reshape(-1, 1, _SIDE, _SIDE), labels.astype(np.int64)


def _by_node(images_M: np.ndarray, classes_M: np.ndarray, rows_by_node: list[np.ndarray]) -> list[Rows]:
    """Each node's rows: parts of one table, in which every image is once."""
    order = np.concatenate(rows_by_node)
    sizes = [len(rows) for rows in rows_by_node]
    images, classes = torch.from_numpy(images_M[order]), torch.from_numpy(classes_M[order])
    return list(zip(torch.split(images, sizes), torch.split(classes, sizes), strict=True))


def _images(raw_MF: np.ndarray) -> Tensor:
    """Rows of 784 pixels, 0 to 255, as images (M, 1, 28, 28) uint8."""
    raw_MF = np.asarray(raw_MF, dtype=np.float64)
    if raw_MF.ndim != 2 or raw_MF.shape[1] != len(_PIXELS):  # noqa: PLR2004
        raise DataError(f"features of shape {list(raw_MF.shape)}: expected rows of {len(_PIXELS)} pixels")
    strange = np.argwhere(~((raw_MF >= 0) & (raw_MF <= np.iinfo(np.uint8).max) & (raw_MF == raw_MF.round())))
    if len(strange):
        row, column = strange[0]
        raise DataError(f"row {row}, {_PIXELS[column]} = {raw_MF[row, column]:g}: expected a whole number from 0 to 255")
    return torch.from_numpy(raw_MF.astype(np.uint8)).reshape(-1, 1, _SIDE, _SIDE)


class _OnPixels(nn.Sequential):
    """Layers behind pixels from 0 to 255, which are standardised here: as uint8 they take a quarter of the memory."""

    def forward(self, pixels: Tensor) -> Tensor:
        outputs = (pixels.to(next(self.parameters()).dtype) / 255 - _MEAN) / _DEVIATION
        for layer in self:
            outputs = layer(outputs)
        return outputs


def _cnn() -> nn.Module:
    return _OnPixels(
        nn.Conv2d(1, 16, kernel_size=5, stride=3),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 3 * 3, _NUM_CLASSES),
    )


def _pixel_perceptron(hidden: int) -> nn.Module:
    return _OnPixels(nn.Flatten(), _perceptron(len(_PIXELS), hidden, _NUM_CLASSES))


def _perceptron(num_inputs: int, hidden: int, num_classes: int) -> nn.Module:
    if not hidden:
        return nn.Linear(num_inputs, num_classes)
    return nn.Sequential(nn.Linear(num_inputs, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))


def _softmax(outputs: Tensor) -> Tensor:
    return outputs.softmax(dim=-1)
