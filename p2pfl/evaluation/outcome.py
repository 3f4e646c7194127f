"""The end of a run as its runtime hands it over to be concluded.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from p2pfl.runs.departures import Departure
from p2pfl.runs.text import Row
from p2pfl.training import Population

Metrics = Mapping[str, float]

Scope = Literal["network", "gathered", "node"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalModels:
    """Models at the end of a run, and what evaluates them."""

    names: Sequence[str]
    """Nodes of the rows."""
    x_NP: Tensor
    buffers: Mapping[str, Tensor]
    """Each row's own, (N, ...)."""
    population: Population
    """Rows of these nodes where models have buffers, else any rows of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Everything that only a runtime knows of the end of its run."""

    scope: Scope
    """network: all nodes were computed here. gathered: nodes have written and measured their own models. node: it is one node's own run."""
    engine: str
    rounds: int
    stop_reason: str
    bytes_sent: int
    """By all nodes of the scope."""
    metrics: Mapping[str, Metrics]
    """By node, where it was measured."""
    models: FinalModels | None
    """None: the run has no result."""
    book: Callable[[str], Mapping[str, float]]
    """Books the seconds since the last call under a part of the run, and gives those of all parts."""
    row_by_row: str | None
    peak_rss_bytes: int = 0
    """Most memory that another process of the run held."""
    has_agreed: bool = False
    """Whether the network has agreed to stop."""
    lost: Sequence[str] = ()
    """Nodes without a result."""
    departures: Sequence[Departure] = ()
    """Departures that no event tells of."""
    started_without: Sequence[str] = ()
    cross_site: Mapping[str, Any] | None = None
    """Figures of a node and of the models that its neighbours have sent it; those of a network are computed here."""
    local: Mapping[str, Metrics] | None = None
    """Metrics of each node trained alone; None: computed here."""
    gains: Sequence[Row] | None = None
    """Gains over local training; None: computed here."""
    simulated_s: float | None = None
    """Seconds on the network's virtual clock, where it has one."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further parts of the summary that the runtime alone knows."""
