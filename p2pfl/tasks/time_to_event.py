"""Time to an event as the outcome of a table task: Cox's model, its loss over all rows of a site, and Harrell's concordance.

Shapes: M rows, D model inputs; targets are (M, 2), the time and whether the event was seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from p2pfl.data.contract import Contract
from p2pfl.data.variables import Variable
from p2pfl.errors import ConfigError, DataError
from p2pfl.tasks.base import MetricFunction
from p2pfl.tasks.metrics import Metric
from p2pfl.yaml_files import nearest, shown

COX = "cox"
"""Name of the model of a time to an event."""

_TWO = 2
_AT_ONCE = 64  # rows of which all pairs are looked at in one table


@dataclass(frozen=True, kw_only=True)
class TimeToEvent:
    """The outcome of a Cox model: a time, and whether it ended with the event."""

    time: str
    event: str
    labels: tuple[str, ...] = ()
    """Labels of an event with two categories, of which the second is the event; empty where it is 0 or 1."""

    @property
    def name(self) -> str:
        """Names of both variables, for messages."""
        return f"{self.time} or {self.event}"

    def values(self, columns: Mapping[str, Any]) -> np.ndarray:
        """Times and events, (M, 2) float64; NaN where one is missing.

        Raises:
            DataError: a time is 0 or less.
        """
        times_M = np.asarray(columns[self.time], dtype=np.float64)
        if (times_M <= 0).any():
            raise DataError(f"{self.time} is 0 or less in some rows: whoever is not followed cannot be counted; say missing")
        events: Any = columns[self.event]
        if self.labels:
            places = {label: float(place) for place, label in enumerate(self.labels)}
            events = [places.get(label, math.nan) for label in events]
        return np.stack([times_M, np.asarray(events, dtype=np.float64)], axis=-1)

    def strata(self, values_M2: np.ndarray) -> np.ndarray:
        """Classes by which test rows are drawn, (M,): rows with the event and without."""
        return np.asarray(values_M2[:, 1])

    def targets(self, values_M2: np.ndarray) -> Tensor:
        """Targets of complete rows, (M, 2) float64, so that no two times become one by rounding."""
        return torch.from_numpy(np.ascontiguousarray(values_M2))

    def model(self, num_inputs: int, hidden: Sequence[int]) -> Callable[[], nn.Module]:
        """Make the function that makes the model: linear, without an intercept, which the baseline hazard holds."""
        assert not hidden
        return partial(nn.Linear, num_inputs, 1, bias=False)

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Loss of the model."""
        return negative_log_partial_likelihood

    @property
    def metrics(self) -> Mapping[str, MetricFunction]:
        """Metrics of a risk score."""
        return SURVIVAL

    @property
    def probabilities(self) -> None:
        """None: a risk score is no probability, and is predicted as it is."""
        return None


def time_to_event(named: Any, contract: Contract) -> TimeToEvent:
    """Find time and event of a Cox model.

    Args:
        named: the two variables; None: the contract's outcome.
        contract: of the table.

    Raises:
        ConfigError: they are not two variables of the contract, a number and one with two values, none of them an input.
    """
    pair = contract.outcome if named is None else named
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != _TWO or not all(isinstance(name, str) for name in pair):
        source = "task.outcome: required, as the contract's outcome is" if named is None else "task.outcome ="
        said = " and ".join(contract.outcome) or "none" if named is None else shown(named)
        raise ConfigError(f"{source} {said}: cox takes a time and an event, such as outcome: [days, died]")
    known = list(contract.variables)
    findings = [
        f"task.outcome has {shown(name)}: no variable of the contract; {nearest(name, known)}expected one of {', '.join(known)}"
        for name in pair
        if name not in contract.variables
    ]
    findings += [
        f"task.outcome has {shown(name)}: it is one of the contract's inputs as well; expected another variable"
        for name in pair
        if name in contract.inputs
    ]
    if findings:
        raise ConfigError(findings)
    time, event = (contract.variables[name] for name in pair)
    if not time.is_numeric:
        findings.append(f"task.outcome has the time {shown(pair[0])}: expected a number, and the variable is of type {time.type}")
    if not _has_two_values(event):
        findings.append(
            f"task.outcome has the event {shown(pair[1])}: expected whole numbers with range [0, 1], or two categories of which the second "
            f"is the event; the variable is of type {event.type}"
        )
    if findings:
        raise ConfigError(findings)
    return TimeToEvent(time=pair[0], event=pair[1], labels=event.labels if event.type == "category" else ())


def _has_two_values(variable: Variable) -> bool:
    if variable.type == "category":
        return len(variable.labels) == _TWO
    return variable.type == "integer" and variable.range == (0.0, 1.0)


def negative_log_partial_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    """Negative log partial likelihood of all rows of a site, divided by their number; 0 where no row has the event.

    Divided by the number of rows, and not of events, it sums over sites by `weighting: samples` to the likelihood stratified by site.
    Source: Cox 1972; ties: Efron 1977.

    Args:
        outputs: risk scores x beta, (M, 1).
        targets: times and events, (M, 2).
    """
    order = targets[:, 0].argsort(descending=True, stable=True)
    times, events, scores = targets[:, 0][order], targets[:, 1][order], outputs.reshape(-1)[order]
    num_rows = len(times)
    places, changes = torch.arange(num_rows, device=times.device), times.diff() != 0
    edge = torch.ones_like(places[:1], dtype=torch.bool)
    begins, ends = torch.cat([edge, changes]), torch.cat([changes, edge])
    # of rows with one time: the first and the last place, and their number among the times
    first = torch.where(begins, places, 0).cummax(0).values
    last = torch.where(ends, places, num_rows - 1).flip(0).cummin(0).values.flip(0)
    numbers = begins.long().cumsum(0) - 1
    log_at_risk = scores.logcumsumexp(0)[last]
    zeros = torch.zeros_like(scores)
    # the weight of the tied events as a fraction of all at risk, and the part of these events that has left
    tied = zeros.scatter_add(0, numbers, events * (scores - log_at_risk).exp())[numbers]
    num_tied = zeros.scatter_add(0, numbers, events)[numbers].clamp(min=1)
    before = events.cumsum(0) - events
    left = events * (before - before[first]) / num_tied
    return (events * (log_at_risk + torch.log1p(-left * tied) - scores)).sum() / num_rows


def concordance(outputs: Tensor, targets: Tensor) -> float:
    """Harrell's concordance: the fraction of comparable pairs in which the higher risk has the earlier event; equal risks count half.

    A pair is comparable where the earlier time is an event, or where of two equal times one is. It is counted exactly. NaN without such a
    pair, and where an output is not finite. Source: Harrell, Lee and Mark 1996.
    """
    risks, times, events = outputs.double().numpy().reshape(-1), targets[:, 0].double().numpy(), targets[:, 1].numpy() > 0
    if not np.isfinite(risks).all():
        return math.nan
    # events come before what ends at the same time without one; among tied events no risk is above a later one
    order = np.lexsort((risks, ~events, times))
    risks, times, events = risks[order], times[order], events[order]
    number = int((len(risks) - 1 - np.flatnonzero(events)).sum())
    twice = _twice_in_order(risks, events)
    _, tied = np.unique(times[events], return_counts=True)
    _, alike = np.unique(np.stack([times[events], risks[events]]), axis=1, return_counts=True)
    number -= int((tied * (tied - 1) // 2).sum())
    twice -= int((alike * (alike - 1) // 2).sum())
    return twice / 2 / number if number else math.nan


def _twice_in_order(risks: np.ndarray, events: np.ndarray) -> int:
    """Count pairs of an event and a later row with a lower risk twice, and those with an equal risk once."""
    if len(risks) <= _AT_ONCE:
        later = np.triu(np.ones((len(risks), len(risks)), dtype=bool), 1) & events[:, None]
        signs = np.sign(risks[:, None] - risks[None, :])
        return int((signs + 1)[later].sum())
    middle = len(risks) // 2
    early, late = risks[:middle][events[:middle]], np.sort(risks[middle:])
    across = late.searchsorted(early, "left").sum() + late.searchsorted(early, "right").sum()
    return int(across) + _twice_in_order(risks[:middle], events[:middle]) + _twice_in_order(risks[middle:], events[middle:])


SURVIVAL: Mapping[str, MetricFunction] = MappingProxyType({"concordance": Metric(concordance, kind="concordance")})
"""Metrics of a task whose outcome is a time to an event."""
