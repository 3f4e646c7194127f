"""Tables of patients that anybody may use.

Shapes: M rows, F raw columns, D model inputs a row.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from p2pfl.data.sources import SOURCES, read
from p2pfl.errors import ConfigError, DataError
from p2pfl.statistics.moments import Moments
from p2pfl.tasks.base import Task
from p2pfl.tasks.tables import Preparation, column_targets, logistic_regression, partitioned_sites, site_of
from p2pfl.yaml_files import check

DIRICHLET: Mapping[str, Any] = MappingProxyType({"name": "dirichlet", "alpha": 0.5})
"""Partition of a table unless the experiment says otherwise."""

# the file's name, the site's name; the order is the network's ring
_HOSPITALS = MappingProxyType({"cleveland": "cleveland", "hungary": "hungarian", "switzerland": "switzerland", "va": "va"})
_HEART_COLUMNS = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak")
_HEART_LABEL = 13
_HEART_LEVELS = MappingProxyType({"cp": (1, 2, 3, 4), "restecg": (0, 1, 2)})
_HEART_WIDTH = 13


def breast_cancer(
    nodes: int | None = None,
    partition: Mapping[str, Any] | None = None,
    seed: int = 0,
    test_share: float = 0.3,
    standardise: str = "reference",
) -> Task:
    """Malignant (0) or benign (1), by logistic regression, from 30 figures of a biopsy's image: 569 patients of Wisconsin.

    Args:
        nodes: hospitals to share the patients out among; None: 5.
        partition: the rule; None: Dirichlet with alpha 0.5.
        seed: of the experiment.
        test_share: of each hospital's rows.
        standardise: "reference", by the means and deviations of the published 569 patients, the same at every hospital, as a laboratory's
            reference ranges are (features only, never a label); "site", by each hospital's own training rows, which pulls hospitals apart
            that see different shares of malignant tumours.

    Source: Street, Wolberg & Mangasarian 1993, as it ships inside scikit-learn.
    """
    from sklearn.datasets import load_breast_cancer

    if standardise not in ("reference", "site"):
        raise ConfigError(f"task.standardise = {standardise!r}: one of reference, site")
    bunch = load_breast_cancer()
    columns = tuple(map(str, bunch.feature_names))
    reference = Preparation.fitted(bunch.data, columns=columns)
    sites = partitioned_sites(
        bunch.data,
        bunch.target,
        5 if nodes is None else nodes,
        DIRICHLET if partition is None else partition,
        seed,
        test_share=test_share,
        prefix="hospital",
        fit=partial(Preparation.fitted, columns=columns) if standardise == "site" else lambda _: reference,
        targets_of=column_targets,
    )
    return logistic_regression("breast-cancer", sites, columns, num_inputs=len(columns))


def heart_disease(
    data: str | None = None,
    standardise: str = "site",
    scale: Mapping[str, Any] | None = None,
    hospitals: Sequence[str] | None = None,
    nodes: int | None = None,
    partition: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Task:
    """Heart disease or not, by logistic regression, from ten figures of a patient: 740 patients of four hospitals.

    The protocol is FLamby's Fed-Heart-Disease, so that figures stand beside the published ones. The split into training and test rows is
    part of it and does not follow the seed.

    Args:
        data: folder with the four original files; None: P2PFL_DATA, else what `p2pfl data fetch heart-disease` downloaded.
        standardise: "site", by each hospital's own training rows, as the protocol has it; "pooled", by those of all hospitals together.
        scale: means and deviations for "pooled"; None: they are computed here, from the four files. A study takes them from the members'
            cards, so that no hospital needs another's rows.
        hospitals: those whose files are on this machine; None: all four.
        nodes: None: the hospitals themselves; a number: all patients pooled and shared out among so many.
        partition: the rule for `nodes`; None: Dirichlet with alpha 0.5.
        seed: of the experiment, for `nodes`.

    Source: Ogier du Terrail et al., NeurIPS 2022 (arXiv:2210.04620); data of Janosi, Steinbrunn, Pfisterer & Detrano 1989.
    """
    if hospitals is not None and (isinstance(hospitals, str) or not isinstance(hospitals, Sequence)):
        raise ConfigError(f"task.hospitals = {hospitals!r}: expected a list of some of {', '.join(_HOSPITALS)}")
    chosen = list(_HOSPITALS) if hospitals is None else list(hospitals)
    findings = [f"task.hospitals has {name!r}: expected some of {', '.join(_HOSPITALS)}" for name in chosen if name not in _HOSPITALS]
    if standardise not in ("site", "pooled"):
        findings.append(f"task.standardise = {standardise!r}: one of site, pooled")
    elif standardise == "pooled" and (nodes is not None or (scale is None and set(chosen) != set(_HOSPITALS))):
        findings.append("task.standardise = 'pooled': needs all four hospitals as they are, or task.scale; else site")
    elif standardise == "site" and scale is not None:
        findings.append("task.scale: is for standardise: pooled; here it is site")
    if findings or not chosen:
        raise ConfigError(findings or "task.hospitals is empty: expected at least one")
    files = {name: f"processed.{_HOSPITALS[name]}.data" for name in chosen}
    contents = read(SOURCES["heart-disease"], files.values(), data)
    tables = {name: _heart_table(contents[file]) for name, file in files.items()}
    prepared = partial(Preparation.by, columns=_HEART_COLUMNS, encode=_heart_inputs)
    if nodes is None:
        parts = {name: _flamby_split(classes_M) for name, (_, classes_M) in tables.items()}
        moments = {name: Moments.of(_heart_inputs(raw_MF[parts[name][0]])) for name, (raw_MF, _) in tables.items()}
        agreed = None
        if standardise == "pooled":
            agreed = check(Moments, scale, "task.scale") if scale is not None else Moments.merged(moments.values())
            if len(agreed.means) != _HEART_WIDTH:
                raise ConfigError(f"task.scale has {len(agreed.means)} means: expected {_HEART_WIDTH}")
        sites = [
            site_of(name, *tables[name], *parts[name], prepared(agreed or moments[name]), column_targets, _heart_groups, moments[name])
            for name in tables
        ]
    else:
        raw_MF, classes_M = (np.concatenate(column) for column in zip(*tables.values(), strict=True))
        sites = partitioned_sites(
            raw_MF,
            classes_M,
            nodes,
            DIRICHLET if partition is None else partition,
            seed,
            test_share=0.34,
            prefix="hospital",
            fit=partial(Preparation.fitted, columns=_HEART_COLUMNS, encode=_heart_inputs),
            targets_of=column_targets,
            groups_of=_heart_groups,
        )
    return logistic_regression("heart-disease", sites, _HEART_COLUMNS, num_inputs=_HEART_WIDTH)


def _heart_table(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Rows without a missing value and their classes, in the file's order; cholesterol 0 means missing, too, but the protocol keeps it."""
    kept = [*range(len(_HEART_COLUMNS)), _HEART_LABEL]
    lines = [[line[column] for column in kept] for line in csv.reader(io.StringIO(content.decode("ascii"))) if line]
    values = np.array([line for line in lines if "?" not in line], dtype=np.float64)
    return values[:, :-1], (values[:, -1] > 0).astype(np.int64)


def _heart_groups(raw_MF: np.ndarray) -> dict[str, np.ndarray]:
    bands = np.array(["under 45", "45 to 54", "55 to 64", "65 and over"])
    return {"sex": np.where(raw_MF[:, 1] == 1, "male", "female"), "age": bands[np.digitize(raw_MF[:, 0], [45, 55, 65])]}


def _heart_inputs(raw_MF: np.ndarray) -> np.ndarray:
    """The columns that are numbers, then one column for each level but the first of those that are not: (M, 10) to (M, 13)."""
    parts = [raw_MF[:, [i for i, column in enumerate(_HEART_COLUMNS) if column not in _HEART_LEVELS]]]
    findings: list[tuple[int, str]] = []
    for column, levels in _HEART_LEVELS.items():
        values = raw_MF[:, _HEART_COLUMNS.index(column)]
        findings += [
            (row, f"row {row}, {column} = {values[row]:g}: one of {', '.join(map(str, levels))}")
            for row in np.flatnonzero(~np.isin(values, levels)).tolist()
        ]
        parts.append((values[:, None] == np.array(levels[1:])).astype(np.float64))
    if findings:
        raise DataError([finding for _, finding in sorted(findings, key=lambda found: found[0])])
    return np.concatenate(parts, axis=1)


def _flamby_split(classes_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The protocol's training and test rows, each in the file's order."""
    from sklearn.model_selection import train_test_split

    counts = np.unique(classes_M, return_counts=True)[1]
    train, test = train_test_split(
        np.arange(len(classes_M)),
        test_size=1 - 0.66,
        train_size=0.66,
        random_state=43,
        shuffle=True,
        stratify=classes_M if len(counts) > 1 and counts.min() > 2 else None,  # noqa: PLR2004
    )
    return np.sort(train), np.sort(test)
