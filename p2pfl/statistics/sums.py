"""Analyses as conversations: which sum over the institutions is needed next, and what follows from the totals.

An analysis is a generator. It yields requests, each with a pure function of one site's rows, and is sent the total over all sites. It never
sees a row of more than one site, so that it runs unchanged over simulated sites, and over daemons that add by secure sums.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Rows = TypeVar("Rows")
"""A site's own part of the data."""

Part = TypeVar("Part")
"""A form of the rows that one analysis takes."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class SumRequest(Generic[Rows]):
    """One sum over all sites that an analysis needs."""

    statistic: str
    """Its name, for the record of what a site has released, and for errors."""
    shape: tuple[int, ...]
    """Shape of each site's numbers, and of the total."""
    contribution: Callable[[Rows], Numbers]
    """A site's numbers, from its own rows."""


def relayed(
    analysis: Generator[SumRequest[Part], Numbers, Result],
    asked: Callable[[SumRequest[Part]], SumRequest[Rows]],
    heard: Callable[[SumRequest[Part], Numbers], None] = lambda request, total: None,  # noqa: ARG005
) -> Generator[SumRequest[Rows], Numbers, Result]:
    """Ask each sum of an analysis in another way.

    Args:
        analysis: whose requests are asked.
        asked: makes the request that is asked in the place of one.
        heard: called with each of the analysis's requests and its total, before the analysis goes on.
    """
    try:
        request = next(analysis)
        while True:
            total = yield asked(request)
            heard(request, total)
            request = analysis.send(total)
    except StopIteration as end:
        result: Result = end.value
        return result


def once_a_site(make: Callable[[Rows], Part]) -> Callable[[Rows], Part]:
    """Make something of each site's rows once, however often it is asked for; the rows must not change."""
    made: dict[int, tuple[Rows, Part]] = {}  # with the rows, so that no other ones get their number

    def found(rows: Rows) -> Part:
        if id(rows) not in made:
            made[id(rows)] = (rows, make(rows))
        return made[id(rows)][1]

    return found


def analyse(analysis: Generator[SumRequest[Rows], Numbers, Result], sites: Sequence[Rows]) -> Result:
    """Lead an analysis to its result over sites whose rows are all here, adding plain floating-point numbers in the sites' order.

    Raises:
        ValueError: a site's numbers have another shape than the request.
    """
    try:
        request = next(analysis)
        while True:
            terms = [request.contribution(rows) for rows in sites]
            wrong = [term.shape for term in terms if term.shape != request.shape]
            if wrong:
                raise ValueError(f"{request.statistic}: numbers of shape {wrong[0]} where {request.shape} is agreed")
            request = analysis.send(np.sum(terms, axis=0))
    except StopIteration as end:
        result: Result = end.value
        return result
