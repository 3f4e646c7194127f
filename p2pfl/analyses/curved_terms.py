"""Polynomials and splines of an analysis: what all sites agree on before they make a model's columns, and the floor of a spline's knots."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from p2pfl.analyses.floors import is_small
from p2pfl.analyses.leading import FewPatientsHere
from p2pfl.analyses.rows import ModelColumns, SiteRows, part_of
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.statistics.cox import CoxRows
from p2pfl.statistics.formula import POLY, SPLINE, Variable
from p2pfl.statistics.glm import DesignRows
from p2pfl.statistics.polynomials import agree_on_polynomials
from p2pfl.statistics.sums import Numbers, SumRequest, once_a_site

Part = TypeVar("Part", DesignRows, CoxRows)


def agree_on_curves(
    spec: AnalysisSpec, contract: Contract, model: ModelColumns
) -> Generator[SumRequest[Any], Numbers, Callable[[SiteRows[Part]], Part]]:
    """Hold the floor between a spline's knots, and agree on polynomials; gives the function that makes a site's rows with all columns.

    Raises:
        ConfigError: few patients lie between two knots, or a number has too few different values.
    """
    for place, variable in enumerate(model.curves):
        if variable.function == SPLINE:
            yield from _check_knots(spec, variable, place)
    places = [place for place, each in enumerate(model.curves) if each.function == POLY]
    if not places:
        return part_of
    variables = [model.curves[place] for place in places]
    ranges = [contract.variables[each.column].range or (-1.0, 1.0) for each in variables]
    found = yield from agree_on_polynomials(variables, ranges, lambda site: _inputs(site)[:, places])
    by_place = dict(zip(places, found, strict=True))

    def part(site: SiteRows[Part]) -> Part:
        columns_MP = site.part.columns_MP.copy()
        values = {place: each.columns(site.inputs_MK[:, place]) for place, each in by_place.items()}
        for column, powers in enumerate(model.powers):
            for place, degree in powers:
                columns_MP[:, column] *= values[place][:, degree - 1]
        return replace(site.part, columns_MP=columns_MP)

    return once_a_site(part)


def sums_of_curves(curves: tuple[Variable, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name the sums that curves ask for, in their order, with their shapes."""
    yield from ((_between(each), (len(each.numbers) + 1,)) for each in curves if each.function == SPLINE)
    degrees = [int(each.numbers[0]) for each in curves if each.function == POLY]
    if not degrees:
        return
    yield "polynomials: rows and means", (1 + len(degrees),)
    yield "polynomials: squares around the means", (len(degrees),)
    for degree in range(1, max(degrees) + 1):
        num = sum(each >= degree for each in degrees)
        yield from ((f"polynomials: {what} of degree {degree}", (num,)) for what in ("shift", "squares"))


def numbers_of_curves(model: ModelColumns) -> int:
    """Count the numbers that agreeing on curves releases about the same rows."""
    return sum(shape[0] for _, shape in sums_of_curves(model.curves))


def _inputs(site: SiteRows[Any]) -> Numbers:
    return site.inputs_MK


def _between(variable: Variable) -> str:
    return f"counts between knots of {variable}"


def _check_knots(spec: AnalysisSpec, variable: Variable, place: int) -> Generator[SumRequest[Any], Numbers, None]:
    """Refuse knots that take few patients apart from the others: a spline can follow those alone."""
    fewest, num_cells = spec.patients_per_cell, len(variable.numbers) + 1

    def own(site: SiteRows[Any]) -> Numbers:
        cells_M = np.searchsorted(variable.numbers, site.inputs_MK[:, place])
        counts = replace(site, cells_M=cells_M).patients_by_cell(num_cells)
        if spec.cells == "site" and is_small(counts, fewest):
            raise FewPatientsHere(
                f"policy.patients_per_cell: fewer than {fewest} patients of this site lie between two knots of {variable}"
            )
        return counts

    counts = yield SumRequest(statistic=_between(variable), shape=(num_cells,), contribution=own)
    if is_small(counts, fewest):
        raise ConfigError(
            f"{variable}: fewer than {fewest} patients lie between two knots or beyond them, and patients_per_cell is {fewest}: "
            "write other knots"
        )
