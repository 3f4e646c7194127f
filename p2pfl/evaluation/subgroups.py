"""Metrics of models for groups of a site's patients, by attributes of its test rows; small groups are withheld.

What is computed here are aggregates at the site that holds the rows; they alone enter records. Who knows how many rows there are in all,
and in all groups but one, knows it of that one too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2pfl.evaluation.mean_model import MeanModel, mean_model_of
from p2pfl.experiment.plan import Plan
from p2pfl.runs.text import Row
from p2pfl.tasks import Site, SitesByName
from p2pfl.tasks.intervals import interval_of
from p2pfl.tasks.metrics import auroc, logits_and_classes
from p2pfl.training import Population

FEWEST = 10
"""Patients of test rows: a smaller group's number and figures are withheld. Where nobody knows the patients, each row is one."""

SPECIFICITY = 0.9
_FIGURES = ("rows", "auroc", "auroc_low", "auroc_high", "sensitivity", "calibration_error")
_BINS = 10


def subgroups(plan: Plan, population: Population, x_NP: Tensor, names: Sequence[str], mean: MeanModel | str | None = None) -> list[Row]:
    """Measure each site's model on each group of its test rows, and the mean model on the groups of all sites together.

    *population* holds the rows of these sites where they have buffers, else any. Without a mean model given it is made here; where there is
    none, nothing is said of all sites.

    Returns:
        {"site": name or null for all, "attribute", "group", "rows", "auroc", "auroc_low", "auroc_high": 95 %, "sensitivity": at
        specificity 0.9 in the group, "calibration_error": mean distance of probability from frequency over ten bins, weighted by their
        rows}; null where undefined, and all of it below 10 patients. Empty for tasks of other than two classes and sites without groups.
    """
    if isinstance(plan.sites, SitesByName):
        return []
    if mean is None and len(names) == len(plan.names):
        mean = mean_model_of(plan, x_NP, population.buffers)
    found, logits_of, classes_of, groups_of = [], list[np.ndarray](), list[np.ndarray](), list[Mapping[str, Sequence[Any]]]()
    patients_of: list[np.ndarray] = []
    for place, name in enumerate(names):
        site, row = plan.sites[name], place if population.buffers else 0
        own = _logits(population, x_NP[place], site, row) if site.groups else None
        if own is None:
            continue
        patients = _patients(site)
        found += _of_groups(name, *own, site.groups, patients)
        by_mean = _logits(population, mean.x_P, site, buffers=mean.buffers) if isinstance(mean, MeanModel) else None
        if by_mean is not None:
            logits_of.append(by_mean[0])
            classes_of.append(by_mean[1])
            groups_of.append(site.groups)
            patients_of.append(patients)
    if len(groups_of) > 1 and len(names) == len(plan.names):
        shared = [attribute for attribute in groups_of[0] if all(attribute in groups for groups in groups_of)]
        together = {attribute: [value for groups in groups_of for value in groups[attribute]] for attribute in shared}
        # an id means somebody else at another site
        patients = np.concatenate([sum(len(ids) for ids in patients_of[:place]) + each for place, each in enumerate(patients_of)])
        found += _of_groups(None, np.concatenate(logits_of), np.concatenate(classes_of), together, patients)
    return found


def _patients(site: Site) -> np.ndarray:
    """Number of each test row's patient at its site, (M,)."""
    if site.test_patients is None:
        return np.arange(0 if site.test is None else len(site.test[0]))
    return np.unique(np.asarray(site.test_patients, dtype=str), return_inverse=True)[1].reshape(-1)


def _logits(
    population: Population, x_P: Tensor, site: Site, row: int = 0, *, buffers: Mapping[str, Tensor] | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Compute logits (M,) and classes (M,); None without test rows, or with other than two classes."""
    if site.test is None:
        return None
    outputs = population.outputs(x_P, site.test[0], row, site=site.name, buffers=buffers)
    targets, num_rows = site.test[1], len(site.test[0])
    if outputs.numel() != num_rows or targets.numel() != num_rows or not bool(((targets == 0) | (targets == 1)).all()):
        return None
    rows = logits_and_classes(outputs.reshape(-1), targets)
    return None if rows is None else (rows[0][:, 0], rows[1])


def _of_groups(
    site: str | None, logits: np.ndarray, classes: np.ndarray, groups: Mapping[str, Sequence[Any]], patients: np.ndarray
) -> list[Row]:
    found = []
    for attribute, values in groups.items():
        texts = np.array([str(value) for value in values])
        for group in sorted(set(texts.tolist())):
            here = texts == group
            is_shown = len(np.unique(patients[here])) >= FEWEST
            figures = _figures(logits[here], classes[here]) if is_shown else dict.fromkeys(_FIGURES)
            found.append({"site": site, "attribute": attribute, "group": group, **figures})
    return found


def _figures(logits: np.ndarray, classes: np.ndarray) -> Row:
    figures: Row = dict.fromkeys(_FIGURES)
    figures |= {"rows": len(classes), "calibration_error": _calibration_error(logits, classes)}
    if len(np.unique(classes)) > 1:
        from sklearn.metrics import roc_curve

        outputs, targets = torch.from_numpy(logits), torch.from_numpy(classes)
        interval = interval_of(auroc, outputs, targets)
        false_alarms, found, _ = roc_curve(classes, logits, drop_intermediate=False)  # the point asked for may lie on a line
        sensitivity = float(found[false_alarms <= 1 - SPECIFICITY + 1e-12].max())
        figures |= {"auroc": auroc(outputs, targets), "sensitivity": sensitivity}
        figures |= {"auroc_low": interval and interval.low, "auroc_high": interval and interval.high}
    return figures


def _calibration_error(logits: np.ndarray, classes: np.ndarray) -> float:
    """Expected calibration error of the second class's probability (Guo et al. 2017)."""
    from scipy.special import expit

    probabilities = expit(logits)
    place = np.minimum((probabilities * _BINS).astype(np.int64), _BINS - 1)
    apart = np.abs(np.bincount(place, weights=probabilities - classes, minlength=_BINS))
    return float(apart.sum() / len(classes))
