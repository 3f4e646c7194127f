"""Fields of summary.json that several rooms write or read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from p2pfl.runs.text import Row, plain

MAX_PER_NODE = 1000
"""Above this many nodes a summary holds quantiles instead of one figure a node."""

NOT_FOR_CHOOSING = "not used for choosing"
"""The mark of figures on test rows while choices are made on validation rows."""

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def statistics(values_by_node: Mapping[str, float | None]) -> Row:
    """Summarise a value over the nodes: {"mean", "min", "max", "n_defined", "per_node"}.

    Undefined figures (None, NaN, infinite) are null in per_node, left out of mean, min and max and of n_defined. Above MAX_PER_NODE nodes
    "quantiles" {"0.05": ..., ...} stand in the place of "per_node". Keys run in sorted node order.
    """
    per_node = {node: plain(values_by_node[node]) for node in sorted(values_by_node)}
    defined = sorted(value for value in per_node.values() if value is not None)
    short: Row = {
        "mean": math.fsum(defined) / len(defined) if defined else None,
        "min": defined[0] if defined else None,
        "max": defined[-1] if defined else None,
        "n_defined": len(defined),
    }
    if len(per_node) <= MAX_PER_NODE:
        return {**short, "per_node": per_node}
    return {**short, "quantiles": {str(fraction): _quantile(defined, fraction) for fraction in _QUANTILES}}


def validation_fraction(experiment: Mapping[str, Any]) -> float:
    """Fraction of each site's training rows that a run took out for validation; 0: metrics are measured on test rows."""
    fraction = experiment.get("validation")
    return float(fraction) if isinstance(fraction, int | float) else 0.0


def rows_word(document: Mapping[str, Any] | None) -> str:
    """Name the rows that metrics are measured on, by an experiment or a summary: "validation rows" or "test rows"."""
    document = document or {}
    return str(document.get("measured_on") or ("validation rows" if validation_fraction(document) else "test rows"))


def primary_metric(metrics: Iterable[str]) -> str | None:
    """Choose the metric that decides: AUROC where there is one, else accuracy, else the first."""
    names = list(metrics)
    return next((name for name in ("auroc", "accuracy") if name in names), names[0] if names else None)


def lower_is_better(metric: str) -> bool:
    """Whether a metric measures what is wrong; its name has to say so, as no record does."""
    return any(word in metric.lower() for word in ("loss", "error", "distance", "brier"))


def metric_heading(metric: str) -> str:
    """A metric's name with the direction that is better, where that is down."""
    return f"{metric} (lower is better)" if lower_is_better(metric) else metric


def _quantile(ordered: list[float], fraction: float) -> float | None:
    """Interpolate a quantile linearly between the two nearest values."""
    if not ordered:
        return None
    place = fraction * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
