"""Rules over all that a site has released: its log is asked before an analysis, and written before the first sum leaves.

Refused are: an analysis that, with earlier ones, tells apart fewer patients of the site than a cell must have; one more analysis of a
variable than the policy allows; numbers about the same patients beyond the policy's part for each patient and column.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from p2pfl.analyses.leading import FewPatientsHere
from p2pfl.analyses.policy import Policy
from p2pfl.analyses.release_log import ReleasedAnalysis, ReleaseLog
from p2pfl.analyses.released_cells import CountedCells, cells_told_apart
from p2pfl.analyses.released_rows import CountedPatients, beside_each_other, codings_of, is_coded_otherwise, nearly_same, tells_few_apart
from p2pfl.analyses.rows import CrossTable, ModelColumns
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.sum_plan import question_of
from p2pfl.analyses.variables import cell_labels, is_survival
from p2pfl.data.check import CheckedTable
from p2pfl.data.cohort import Freeze
from p2pfl.data.contract import Contract
from p2pfl.data.plain_files import is_there
from p2pfl.errors import some
from p2pfl.governance.encoding import canonical
from p2pfl.statistics.sums import Numbers, Result, Rows, SumRequest

Site = TypeVar("Site")

_COUNTS = ("patients", "cross table", "events", "counts")
"""Beginnings of the names of sums of patients, which the floors of a cell hold."""
_COUNTED = "number, mean and cells"
_PATIENTS = "patients and rows"
_REMEDY = "as other rows are complete here; rows: common in all analyses of a study takes the same ones"


class Release:
    """Numbers that one site gives to one analysis: its log is asked first, and written before each sum leaves.

    Args:
        log: of the site, open.
        spec: of the analysis, which has passed its check.
        contract: of all sites.
        table: of the site.
        rows: as the analysis takes them.
        study: its digest; empty for simulated sites.
        cohort: commitment of the site's frozen rows; None: they are not frozen.
    """

    def __init__(
        self,
        log: ReleaseLog,
        spec: AnalysisSpec,
        contract: Contract,
        table: CheckedTable,
        rows: Any,
        *,
        study: str = "",
        cohort: str | None = None,
    ) -> None:
        self._log, self._spec, self._contract, self._table = log, spec, contract, table
        self._counted = CountedPatients.of(spec, contract, table, rows)
        self._is_limited = is_limited(spec, contract)
        self._place: int | None = None
        self._asked = ReleasedAnalysis(
            study=study,
            name=name_of(spec),
            question=_question(spec, contract),
            rows=log.rows_of(self._counted),
            cohort=cohort,
            variables=spec.names_used(contract),
            columns=_columns(spec, contract),
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            sets=log.known(self._counted),
            cells=CountedCells.of(spec, contract),
            codings=codings_of(spec.names_used(contract), contract),
        )
        for place, each in enumerate(log.analyses):
            if each.study == study and each.statistic == self._asked.statistic:
                self._place = place

    def refusals(self, policy: Policy) -> Iterator[str]:
        """Find the lines of the site's policy that the analysis breaks together with what was released before, for the site's own log."""
        fewest = max(policy.patients_per_cell, self._spec.patients_per_cell)
        if (name := self._small_atom(fewest)) is not None:
            yield f"policy.patients_per_cell = {policy.patients_per_cell}: {name}"
        released = [name for each in self._log.analyses for name in each.variables if name not in self._asked.variables]
        if pair := nearly_same(self._contract, self._table, self._asked.variables, tuple(dict.fromkeys(released)), fewest):
            yield (
                f"policy.patients_per_cell = {policy.patients_per_cell}: {pair[0]} differs from {pair[1]}, of which totals have been "
                f"released, in fewer than {fewest} patients of this site alone"
            )
        for name, coding in self._asked.codings.items():
            if any(is_coded_otherwise(coding, each.codings[name]) for each in self._log.analyses if name in each.codings):
                yield (
                    f"policy.patients_per_cell = {policy.patients_per_cell}: {name} was released with other codes in a category before, "
                    "and totals would differ by the patients of a code: ask with the categories of the earlier contract"
                )
        cells_before = (cells for each in self._log.analyses for cells in each.cells)
        if (cells := cells_told_apart(self._asked.cells, cells_before, self._table, fewest)) is not None:
            yield f"policy.patients_per_cell = {policy.patients_per_cell}: {cells.refusal(fewest)}"
        if policy.most_analyses is not None:
            for name in self._asked.variables:
                others = {each.statistic for each in self._log.analyses if name in each.variables} - {self._asked.statistic}
                if len(others) >= policy.most_analyses:
                    yield f"policy.most_analyses = {policy.most_analyses}: {name} has been in {len(others)} analyses before"

    def _small_atom(self, fewest: int) -> str | None:
        """Say between which analyses few patients make the difference; None: between none."""
        earlier, new = self._log.analyses, self._asked
        num = len(new.sets[0].rows_N)
        if tells_few_apart(beside_each_other([each for each in new.sets if each.is_analysis], num), fewest):
            return f"fewer than {fewest} patients of this site count in the analysis"
        sets = [each for one in (*earlier, new) for each in one.sets]
        if tells_few_apart(beside_each_other([each for each in sets if each.is_analysis], num), fewest):
            return f"with what was released before, fewer than {fewest} patients would be told apart, {_REMEDY}"
        for name in new.variables:
            of_name = beside_each_other([each for each in sets if name in each.variables], num)
            if of_name.shape[1] > 1 and tells_few_apart(of_name, fewest):
                return f"with what was released before, {name} of fewer than {fewest} patients would be told apart, {_REMEDY}"
        return None

    def note(self, numbers: int, most_numbers: float) -> None:
        """Write down, before a sum leaves, that the analysis has released so many numbers with it.

        Args:
            numbers: of this analysis, this sum included, that are no counts of patients.
            most_numbers: for each column about which numbers are released.

        Raises:
            FewPatientsHere: with what was released before these are too many about the same patients.
            StoreError: the disk failed, and nothing may leave.
        """
        if self._is_limited:
            self._check_numbers(numbers, most_numbers)
        if self._place is None:
            self._log.append(self._asked, self._counted)
            self._place = len(self._log.analyses) - 1
        if numbers > self._log.analyses[self._place].numbers:
            self._log.append_numbers(self._place, numbers)

    def _check_numbers(self, numbers: int, most_numbers: float) -> None:
        before = {each.statistic: each for each in self._log.analyses if each.statistic != self._asked.statistic}
        columns = {*self._asked.columns, *(name for each in before.values() for name in each.columns)}
        total, most = numbers + sum(each.numbers for each in before.values()), most_numbers * len(columns)
        if before and total > most:
            raise FewPatientsHere(
                f"policy.parameters_per_patient: with {len(before)} earlier analyses {total} numbers would be released, "
                f"and {int(most)} are the most about {len(columns)} columns of these patients"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedRows(Generic[Rows]):
    """One site's rows of an analysis with its release; None: nobody keeps a log."""

    rows: Rows
    release: Release | None

    def refusals(self, policy: Policy) -> Iterator[str]:
        """Find the lines of the site's policy that the analysis breaks together with what was released before."""
        if self.release is not None:
            yield from self.release.refusals(policy)


def with_release(
    log: ReleaseLog, spec: AnalysisSpec, contract: Contract, table: CheckedTable, rows: Rows, *, study: str = "", cohort: Path | None = None
) -> RecordedRows[Rows]:
    """Rows of a site with its release.

    Args:
        log: of the site, open.
        spec: of the analysis.
        contract: of all sites.
        table: of the site.
        rows: as the analysis takes them.
        study: its digest; empty for simulated sites.
        cohort: file of the site's frozen rows, which may not be there.
    """
    frozen = Freeze.load(cohort).commitment.hmac if cohort is not None and is_there(cohort) else None
    return RecordedRows(rows=rows, release=Release(log, spec, contract, table, rows, study=study, cohort=frozen))


def recorded(
    spec: AnalysisSpec, analysis: Generator[SumRequest[Rows], Numbers, Result]
) -> Generator[SumRequest[RecordedRows[Rows]], Numbers, Result]:
    """Ask an analysis of sites that write each sum into their logs before they give their numbers to it."""
    numbers, num_patients = 0, math.inf
    try:
        request = next(analysis)
        while True:
            numbers += released_numbers(request.statistic, request.shape)
            total = yield _noted(request, numbers, spec.parameters_per_patient * num_patients)
            if request.statistic == _PATIENTS:
                num_patients = float(total[0])
            request = analysis.send(total)
    except StopIteration as end:
        result: Result = end.value
        return result


def _noted(request: SumRequest[Rows], numbers: int, most_numbers: float) -> SumRequest[RecordedRows[Rows]]:
    def own(site: RecordedRows[Rows]) -> Numbers:
        found = request.contribution(site.rows)  # a site that keeps its cells back releases nothing
        if site.release is not None:
            site.release.note(numbers, most_numbers)
        return found

    return SumRequest(statistic=request.statistic, shape=request.shape, contribution=own)


def released_numbers(statistic: str, shape: tuple[int, ...]) -> int:
    """Count the numbers of a sum that are no counts of patients."""
    name = statistic.rpartition(": ")[2]
    if name == _COUNTED:
        return 1  # the mean; number and cells are counts
    return 0 if name.startswith(_COUNTS) else math.prod(shape)


def is_limited(spec: AnalysisSpec, contract: Contract) -> bool:
    """Whether numbers are counted against the patients: for models with a number among their variables, which no cell holds."""
    if spec.kind == "describe" or (spec.kind == "cox" and not spec.is_by_site) or spec.kind == "km":
        return False
    return not CrossTable.of(spec, contract).holds_all(spec)


def name_of(spec: AnalysisSpec) -> str:
    """Kind and question of an analysis, for people."""
    if spec.kind == "describe":
        names = some(list(spec.variables)) if spec.variables else "all variables"
        return f"describe {names}" + (f" by {spec.by}" if spec.by else "")
    return f"{spec.kind} {spec.formula}" + (f", {spec.family}" if spec.family else "")


def _question(spec: AnalysisSpec, contract: Contract) -> str:
    asked = question_of(spec) if spec.kind != "describe" else ["describe", *spec.described(contract), "by", str(spec.by)]
    return hashlib.sha256(canonical(["p2pfl asked 1", asked, spec.coefficient])).hexdigest()


def _columns(spec: AnalysisSpec, contract: Contract) -> tuple[str, ...]:
    """Names of the columns about which an analysis releases numbers."""
    if spec.kind == "describe":
        return tuple(name for name in spec.described(contract) if cell_labels(name, contract) is None)
    return ModelColumns.of(spec, contract).names if not is_survival(spec.parsed) or spec.kind == "cox" else spec.parsed.columns
