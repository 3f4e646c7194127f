"""Columns of a model that are about few patients: a number that nearly all have alike, or one beside which all others are small.

The coefficient of such a column is the outcome of these patients. Each site looks at its own rows as soon as the total spread of a column
is known, before anything about the outcome leaves.

Shapes: M complete rows of one site, P columns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.analyses.leading import FewPatientsHere
from p2pfl.analyses.rows import ModelColumns, SiteRows
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.statistics.scale import MEANS, SQUARES
from p2pfl.statistics.sums import Numbers, Result, SumRequest, relayed


def without_dominated_columns(
    spec: AnalysisSpec,
    model: ModelColumns,
    part: Callable[[SiteRows[Any]], Any],
    analysis: Generator[SumRequest[SiteRows[Any]], Numbers, Result],
) -> Generator[SumRequest[SiteRows[Any]], Numbers, Result]:
    """Let a model go on where at no site few patients make up the spread of a column.

    Args:
        spec: of the analysis.
        model: its columns.
        part: makes a site's rows with all columns.
        analysis: fits the model.

    A column that is 0 for all but m of n patients has a part of 1 - m / n of its spread from these m. Of k such patients any k - 1 have
    less than (k - 1) / k of it, so the column is refused from this part on.

    Raises:
        FewPatientsHere: at a site, when it is asked for its numbers.
    """
    found: dict[str, Numbers] = {}
    is_checked = False

    def heard(request: SumRequest[SiteRows[Any]], total: Numbers) -> None:
        if request.statistic == MEANS:
            found[MEANS] = total[1 : 1 + len(model.names)] / max(float(total[0]), 1.0)  # an outcome may stand behind the columns
        elif request.statistic == SQUARES:
            found[SQUARES] = total[: len(model.names)]

    def asked(request: SumRequest[SiteRows[Any]]) -> SumRequest[SiteRows[Any]]:
        nonlocal is_checked
        if is_checked or len(found) < 2:  # noqa: PLR2004  # means and squares
            return request
        is_checked = True  # once: rows stay the same
        return _checked(request, spec, model, part, found[MEANS], found[SQUARES])

    result = yield from relayed(analysis, asked, heard)
    if not is_checked:
        raise RuntimeError(f"{spec.formula}: fitted without a look at its columns")
    return result


def _checked(
    request: SumRequest[SiteRows[Any]],
    spec: AnalysisSpec,
    model: ModelColumns,
    part: Callable[[SiteRows[Any]], Any],
    means_P: Numbers,
    squares_P: Numbers,
) -> SumRequest[SiteRows[Any]]:
    def own(site: SiteRows[Any]) -> Numbers:
        fewest = spec.patients_per_cell
        columns_MP = part(site).columns_MP / model.units_P
        parts_P = part_of_few(columns_MP, site.patients_M, means_P, squares_P, fewest - 1)
        for name, of_few in zip(model.names, parts_P, strict=True):
            if is_few(of_few, fewest):
                raise FewPatientsHere(
                    f"policy.patients_per_cell: fewer than {fewest} patients of this site make up nearly all differences in {name}: "
                    "leave it out, take its logarithm, or declare a number with few values as integer"
                )
        return request.contribution(site)

    return replace(request, contribution=own)


def is_few(part: float, fewest: int) -> bool:
    """Whether a part of a column's squares is one that *fewest* patients alike would not leave to all but one of them."""
    return fewest > 1 and part >= 1 - 1 / fewest


def has_column_of_few(columns_MP: Numbers, patients_M: NDArray[np.int64], fewest: int) -> bool:
    """Whether fewer patients of a site than *fewest* make up nearly all differences in one of its own columns."""
    if not len(patients_M):
        return False
    means_P = columns_MP.mean(axis=0)
    squares_P = ((columns_MP - means_P) ** 2).sum(axis=0)
    return any(is_few(part, fewest) for part in part_of_few(columns_MP, patients_M, means_P, squares_P, fewest - 1))


def part_of_few(columns_MP: Numbers, patients_M: NDArray[np.int64], means_P: Numbers, squares_P: Numbers, num_patients: int) -> Numbers:
    """Part of each column's squares around its mean over all sites that a site's few most distant patients have, (P,).

    Args:
        columns_MP: of the site, in the units of the sums.
        patients_M: of the site's rows, by number.
        means_P: over all sites.
        squares_P: over all sites, around the means.
        num_patients: of the site, how many are few.
    """
    if num_patients < 1 or not len(patients_M):
        return np.zeros(len(means_P))
    squares_MP = (columns_MP - means_P) ** 2
    places_M = np.unique(patients_M, return_inverse=True)[1].reshape(-1)
    of_patients_NP = np.zeros((int(places_M.max()) + 1, len(means_P)))
    np.add.at(of_patients_NP, places_M, squares_MP)
    largest_P = np.partition(of_patients_NP, max(len(of_patients_NP) - num_patients, 0), axis=0)[-num_patients:].sum(axis=0)
    is_constant_P = squares_P <= np.finfo(np.float64).eps * means_P**2 * len(patients_M)
    return np.where(is_constant_P, 0.0, largest_P / np.where(is_constant_P, 1.0, squares_P))
