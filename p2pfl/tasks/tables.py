"""Tables of patients: raw columns, and each site's own way from them to model inputs.

Shapes: M rows, F raw columns, D model inputs a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2pfl.errors import ConfigError, DataError
from p2pfl.statistics.moments import Moments
from p2pfl.tasks.base import Task
from p2pfl.tasks.metrics import CLASSIFICATION, LOSSES
from p2pfl.tasks.partition import missing_classes, node_names, split_rows
from p2pfl.tasks.sites import Site


@dataclass(frozen=True, kw_only=True, eq=False)
class Preparation:
    """Raw columns to model inputs: encoded, then (value - centre) / scale."""

    columns: Sequence[str]
    """The raw columns' names, for messages."""
    centre: np.ndarray
    """(D,)."""
    scale: np.ndarray
    """(D,), above 0."""
    encode: Callable[[np.ndarray], np.ndarray] = np.asarray
    """(M, F) to (M, D); raises DataError where a value cannot be."""

    @classmethod
    def fitted(cls, raw_MF: np.ndarray, columns: Sequence[str], encode: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Preparation:
        """Standardise by the mean and standard deviation (ddof 1) of these rows; a column that is constant in them is only centred."""
        encoded_MD = encode(raw_MF)
        if len(encoded_MD) < 2:  # noqa: PLR2004  # no deviation
            return cls(columns=columns, centre=encoded_MD.mean(axis=0), scale=np.ones(encoded_MD.shape[1]), encode=encode)
        return cls.by(Moments.of(encoded_MD), columns, encode)

    @classmethod
    def by(cls, moments: Moments, columns: Sequence[str], encode: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Preparation:
        """Standardise by means and deviations of encoded rows; a column without deviation is only centred."""
        deviation_D = np.array(moments.deviations)
        return cls(columns=columns, centre=np.array(moments.means), scale=np.where(deviation_D > 0, deviation_D, 1.0), encode=encode)

    def __call__(self, raw_MF: np.ndarray) -> Tensor:
        """Model inputs, (M, D) float32.

        Raises:
            DataError: another number of columns, or a value that is not a finite number; the findings name row and column.
        """
        raw_MF = np.asarray(raw_MF, dtype=np.float64)
        if raw_MF.ndim != 2 or raw_MF.shape[1] != len(self.columns):  # noqa: PLR2004
            raise DataError(f"features of shape {list(raw_MF.shape)}: expected rows of {len(self.columns)}, {', '.join(self.columns)}")
        bad = np.argwhere(~np.isfinite(raw_MF))
        if len(bad):
            raise DataError([f"row {row}, {self.columns[column]} = {raw_MF[row, column]}: expected a finite number" for row, column in bad])
        return _floating((self.encode(raw_MF) - self.centre) / self.scale)


def _no_groups(_: np.ndarray) -> dict[str, np.ndarray]:
    return {}


def site_of(
    name: str,
    raw_MF: np.ndarray,
    classes_M: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    prepare: Preparation,
    targets_of: Callable[[np.ndarray], Tensor],
    groups_of: Callable[[np.ndarray], Mapping[str, np.ndarray]] = _no_groups,
    moments: Moments | None = None,
) -> Site:
    """A site from row numbers of a table; its groups follow from raw rows, and `moments` are as in Site."""
    return Site(
        name=name,
        train=(prepare(raw_MF[train]), targets_of(classes_M[train])),
        test=(prepare(raw_MF[test]), targets_of(classes_M[test])),
        groups={key: values.tolist() for key, values in groups_of(raw_MF[test]).items()},
        prepare=prepare,
        moments=moments,
    )


def partitioned_sites(
    raw_MF: np.ndarray,
    classes_M: np.ndarray,
    num_nodes: int,
    rule: Mapping[str, Any],
    seed: int,
    *,
    test_share: float,
    prefix: str,
    fit: Callable[[np.ndarray], Preparation],
    targets_of: Callable[[np.ndarray], Tensor],
    groups_of: Callable[[np.ndarray], Mapping[str, np.ndarray]] = _no_groups,
) -> list[Site]:
    """A table shared out among nodes, each with the preparation that *fit* makes of its raw training rows."""
    if not 0 < test_share < 1:
        raise ConfigError(f"task.test_share = {test_share}: expected a number above 0 and below 1")
    parts = split_rows(classes_M, num_nodes, rule, seed, test_share=test_share)
    return [
        site_of(name, raw_MF, classes_M, train, test, fit(raw_MF[train]), targets_of, groups_of)
        for name, (train, test) in zip(node_names(prefix, num_nodes), parts, strict=True)
    ]


def column_targets(classes_M: np.ndarray) -> Tensor:
    """Two classes as (M, 1) float32, to stand beside one logit a row."""
    return _floating(classes_M[:, None])


def class_targets(classes_M: np.ndarray) -> Tensor:
    """Classes as (M,) int64."""
    return torch.from_numpy(np.ascontiguousarray(classes_M, dtype=np.int64))


def _floating(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def classification(
    name: str,
    sites: Sequence[Site],
    columns: tuple[str, ...],
    model: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    probabilities: Callable[[Tensor], Tensor],
) -> Task:
    """A task whose targets are classes; it says which sites' test rows lack one."""
    return Task(
        name=name,
        model=model,
        loss=loss,
        metrics=CLASSIFICATION,
        losses=LOSSES,
        sites=sites,
        features=columns,
        probabilities=probabilities,
        notes=missing_classes(sites),
    )


def logistic_regression(name: str, sites: Sequence[Site], columns: tuple[str, ...], num_inputs: int) -> Task:
    """A task of two classes with a linear model, one logit a row."""
    return classification(name, sites, columns, partial(nn.Linear, num_inputs, 1), F.binary_cross_entropy_with_logits, torch.sigmoid)
