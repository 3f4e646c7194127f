"""Patients of a site over whom an analysis gives totals, and the rule that totals of several analyses tell apart no few of them.

Totals over several sets of patients, added and subtracted, give at most sums over atoms: the patients who are in exactly the same sets. So
each atom must hold nobody or enough patients of the site. Pairs of sets are not enough: three of them may differ by many and meet in one.
A patient of whom one analysis takes some rows and another one more of them is in both sets, and in an atom of its own kind.

Shapes: N patients of a site, S sets, M rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.analyses.common_rows import counted_rows, is_given
from p2pfl.analyses.rows import SiteRows
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.variables import cell_labels, coded
from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.statistics.survival import Integers

Counts = NDArray[np.uint16]
_MOST_ROWS = np.iinfo(np.uint16).max


@dataclass(frozen=True, kw_only=True)
class CountedSet:
    """One set of patients over whom totals of some variables are given."""

    variables: tuple[str, ...]
    """Variables whose values are in the totals."""
    is_analysis: bool
    """Whether these are all patients who count in the analysis; else those who count for these variables."""
    rows_N: Counts
    """Rows of each patient of the site that count; 0: the patient is not in the set."""


@dataclass(frozen=True, kw_only=True)
class CountedPatients:
    """Patients of a site with the sets of an analysis in which they count."""

    patients: tuple[str, ...]
    """Ids of all patients of the site, each once, N."""
    sets: tuple[CountedSet, ...]

    @classmethod
    def of(cls, spec: AnalysisSpec, contract: Contract, table: CheckedTable, rows: Any) -> CountedPatients:
        """Patients who count in an analysis.

        Args:
            spec: of the analysis.
            contract: of all sites.
            table: of this site, all its rows.
            rows: as the function of `conversation` makes them from the table.
        """
        patients, used = np.unique(np.array(table.patients, dtype=str)), counted_rows(spec, table)
        found, places_M = np.unique(np.array(used.patients, dtype=str), return_inverse=True)
        patient_M = np.searchsorted(patients, found)[places_M.reshape(-1)]  # of each row that the analysis looks at

        if isinstance(rows, SiteRows):
            of_row = patient_M if contract.rows == "one-per-patient" else np.searchsorted(patients, found)
            counted = _counted(of_row[rows.patients_M], len(patients))
            sets = [CountedSet(variables=spec.names_used(contract), is_analysis=True, rows_N=counted)]
        else:
            sets = _of_description(spec, contract, used, patient_M, len(patients))
        return cls(patients=tuple(map(str, patients)), sets=tuple(sets))


def fewest_in_atom(rows_NS: Counts) -> int:
    """Count the patients of the smallest atom of some sets that holds anybody; those in no set are no atom. 0: nobody is in a set."""
    inside_NS = rows_NS[rows_NS.any(axis=1)]
    if not len(inside_NS):
        return 0
    has_most_NS = inside_NS == inside_NS.max(axis=1, keepdims=True)
    patterns = np.packbits(np.concatenate([inside_NS > 0, has_most_NS], axis=1), axis=1)
    return int(np.unique(patterns, axis=0, return_counts=True)[1].min())


def tells_few_apart(rows_NS: Counts, fewest: int) -> bool:
    """Whether an atom holds somebody and fewer than *fewest* patients; of a site with fewer in all, not all of them."""
    return 0 < fewest_in_atom(rows_NS) < min(fewest, len(rows_NS))


def beside_each_other(sets: Sequence[CountedSet], num_patients: int) -> Counts:
    """Put sets beside each other, each once, (N, S); a set of a time when there were fewer patients has none of the later ones."""
    columns = {np.pad(each.rows_N, (0, num_patients - len(each.rows_N))).tobytes() for each in sets}
    found = [np.frombuffer(each, dtype=np.uint16) for each in sorted(columns)]
    return np.stack(found, axis=1) if found else np.zeros((num_patients, 0), dtype=np.uint16)


def _counted(patient_M: NDArray[np.intp], num_patients: int) -> Counts:
    return np.minimum(np.bincount(patient_M, minlength=num_patients), _MOST_ROWS).astype(np.uint16)


def _of_description(
    spec: AnalysisSpec, contract: Contract, table: CheckedTable, patient_M: NDArray[np.intp], num_patients: int
) -> list[CountedSet]:
    has_group_M = np.ones(len(patient_M), dtype=np.bool_) if spec.by is None else is_given(table.columns[spec.by])
    sets = []
    for name in spec.described(contract):
        rows_N = _counted(patient_M[is_given(table.columns[name]) & has_group_M], num_patients)
        sets.append(CountedSet(variables=(name, *((spec.by,) if spec.by else ())), is_analysis=False, rows_N=rows_N))
    counted_N = np.maximum.reduce([each.rows_N for each in sets])
    return [CountedSet(variables=spec.names_used(contract), is_analysis=True, rows_N=counted_N), *sets]


def nearly_same(
    contract: Contract, table: CheckedTable, names: Sequence[str], others: Sequence[str], fewest: int
) -> tuple[str, str] | None:
    """Find a variable of categories that differs from another one in few patients of the site alone; None where none does.

    Totals by one of them minus totals by the other one are those of these few. Few are more than none and fewer than *fewest*.
    """
    places_of: dict[str, tuple[Integers, int]] = {}
    for name in dict.fromkeys([*names, *others]):
        labels = cell_labels(name, contract) if name in table.columns else None
        if labels is not None:
            places_of[name] = coded(name, table.columns, contract, labels) + 1, len(labels) + 1
    patients_M = np.unique(np.array(table.patients, dtype=str), return_inverse=True)[1].reshape(-1)
    most_rows = int(np.bincount(patients_M).max(initial=0))
    for name, other in ((name, other) for name in names for other in others if name != other and {name, other} <= places_of.keys()):
        (ours_M, num_ours), (theirs_M, num_theirs) = places_of[name], places_of[other]
        both = np.bincount(ours_M * num_theirs + theirs_M, minlength=num_ours * num_theirs).reshape(num_ours, num_theirs)
        differing = both.sum(axis=1, keepdims=True) + both.sum(axis=0, keepdims=True) - 2 * both
        for our, their in np.argwhere((both >= fewest) & (differing > 0) & (differing < fewest * most_rows)):
            if not our or not their:  # 0: a value is missing
                continue
            is_ours_M, is_theirs_M = ours_M == our, theirs_M == their
            num_both, num_differing = (len(np.unique(patients_M[rows])) for rows in (is_ours_M & is_theirs_M, is_ours_M ^ is_theirs_M))
            if num_both >= fewest > num_differing:
                return name, other
    return None


ANY_OTHER = ""
"""Stands for every text that is no code of the variable; an empty text is none, as it is missing."""


def codings_of(names: Sequence[str], contract: Contract) -> dict[str, dict[str, str]]:
    """Label of each code of the variables that have categories, as the contract says it."""
    found = {}
    for name in names:
        variable = contract.variables.get(name)
        if variable is not None and variable.type == "category":
            found[name] = {code: each.label for each in variable.categories for code in each.codes}
            if variable.unseen == "category" and variable.unseen_category is not None:
                found[name][ANY_OTHER] = variable.unseen_category
    return found


def is_coded_otherwise(new: Mapping[str, str], released: Mapping[str, str]) -> bool:
    """Whether two codes are in one category here and in two there: totals of both would differ by the patients of a code.

    A code that one contract does not have, and takes for no category, was refused there or is missing: its rows tell the difference.
    """
    pairs = set()
    for code in {*new, *released}:
        ours, theirs = (each.get(code, each.get(ANY_OTHER)) for each in (new, released))
        if ours is not None and theirs is not None:
            pairs.add((ours, theirs))
    return any(len({pair[side] for pair in pairs}) < len(pairs) for side in (0, 1))
