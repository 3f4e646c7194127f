"""A site's table held against the contract: typed columns, and a report that shows no patient.

Every rule of the contract is applied here, and counted. A report has columns, rules and counts; only `example_rows` shows values, for the
site's own terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from p2pfl.data.contract import INDICATOR, Contract
from p2pfl.data.raw_table import RawTable
from p2pfl.data.remedies import remedy_of
from p2pfl.data.table_format import SiteTable, TableFormat
from p2pfl.data.values import NumberReader, read_date
from p2pfl.data.variables import Conversion, Variable, code_number
from p2pfl.errors import UNSAFE_OR_BREAK, DataError
from p2pfl.statistics.sums import Numbers

Effect = Literal["refused", "taken for missing", "taken for a category"]
Value = float | str
Columns = dict[str, Numbers | tuple[str, ...]]

_MOSTLY = 0.5  # of the values that are there: so many out of range are hardly patients' own
_FEWEST_MOSTLY = 10  # rows; of fewer, most may be out of range by chance
_AGREED = Conversion(factor=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """Number of rows in which one column breaks one rule."""

    column: str
    rule: str
    """A sentence without a value of the table."""
    count: int
    effect: Effect
    remedy: str = ""
    """Advice where the table is refused and the rule itself gives none."""

    def __str__(self) -> str:
        return f"{self.column}: {self.rule}: {self.count} {'row' if self.count == 1 else 'rows'}, {self.effect}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """Findings on a site's table, without a value of a patient."""

    num_rows: int
    num_patients: int
    num_missing: dict[str, int]
    """Rows without a value, by column, the ones that a rule has taken for missing among them."""
    converted: dict[str, str]
    """Column to the unit that it was converted from."""
    absent: tuple[str, ...]
    violations: tuple[Violation, ...]

    @property
    def is_accepted(self) -> bool:
        """Whether no rule refuses the table."""
        return not self.refusals

    @property
    def refusals(self) -> tuple[Violation, ...]:
        """Violations for which the contract refuses the table."""
        return tuple(each for each in self.violations if each.effect == "refused")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "absent": list(self.absent), "violations": [asdict(each) for each in self.violations]}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedTable:
    """A site's rows as the contract has them."""

    columns: Columns
    """Numbers (M,) in the agreed units, dates in days since 1970-01-01, NaN where one is missing; labels and ids, empty where one is."""
    levels: dict[str, tuple[str, ...]]
    """Labels of each column with categories, the reference first."""
    patients: tuple[str, ...]
    """Ids of the rows' patients."""
    lines: tuple[int, ...]

    def rows(self, positions: Sequence[int]) -> CheckedTable:
        """Choose rows by their positions, in that order."""
        chosen = np.asarray(positions, dtype=np.intp)
        columns: Columns = {
            name: values[chosen] if isinstance(values, np.ndarray) else tuple([values[each] for each in positions])
            for name, values in self.columns.items()
        }
        patients, lines = (tuple([values[each] for each in positions]) for values in (self.patients, self.lines))
        return CheckedTable(columns=columns, levels=self.levels, patients=tuple(map(str, patients)), lines=tuple(map(int, lines)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleRow:
    """A value that breaks a rule, with its line: a patient's, and for the site's own eyes alone."""

    line: int
    column: str
    text: str
    rule: str


@dataclass(frozen=True, slots=True)
class _Reading:
    """One text of a column: its value, and the rule that it breaks."""

    value: Value
    rule: str = ""
    effect: Effect = "refused"
    is_missing: bool = False


def check_table(
    raw: RawTable, contract: Contract, site: SiteTable, *, needs_values: bool = True
) -> tuple[CheckReport, CheckedTable | None]:
    """Hold a table against the contract; without a checked table where some rule refuses it.

    Unless it *needs_values*, a column in which no row has a value is as good as another one, as in a file of one new patient.
    """
    columns: Columns = {}
    num_missing: dict[str, int] = {}
    violations: list[Violation] = []
    num_rows = len(raw.lines)
    for name, variable in contract.variables.items():
        if name in site.absent:
            columns[name] = _agreed(variable, num_rows)
            continue
        readings = _readings(name, variable, raw, contract, site)
        texts = Counter(raw.columns[name])
        columns[name] = _column(variable, [readings[text].value for text in raw.columns[name]])
        num_missing[name] = sum(count for text, count in texts.items() if readings[text].is_missing)
        violations += _violations(name, variable, readings, texts, site)
        if needs_values and num_missing[name] == num_rows and variable.type != "id":
            violations.append(_all_missing(name, variable, num_rows))
    for name, variable in contract.variables.items():
        if variable.absent == "indicator":
            columns[f"{name}.{INDICATOR}"] = np.full(num_rows, float(name in site.absent))
    patients = tuple(map(str, columns[contract.patient]))
    found = {patient for patient in patients if patient}
    if contract.rows == "one-per-patient" and (again := sum(map(bool, patients)) - len(found)):
        rule = "more than one row of a patient, where the contract has rows: one-per-patient"
        remedy = remedy_of(contract.variables[contract.patient], rule)
        violations.append(Violation(column=contract.patient, rule=rule, count=again, effect="refused", remedy=remedy))
    report = CheckReport(
        num_rows=num_rows,
        num_patients=len(found),
        num_missing=num_missing,
        converted={name: site.units[name] for name, each in contract.variables.items() if site.units.get(name) in each.convert},
        absent=tuple(name for name in contract.variables if name in site.absent),
        violations=tuple(violations),
    )
    if not report.is_accepted:
        return report, None
    return report, CheckedTable(columns=columns, levels=contract.levels, patients=patients, lines=raw.lines)


def accepted_table(raw: RawTable, contract: Contract, site: SiteTable) -> CheckedTable:
    """Rows of a table that follows the contract.

    Raises:
        DataError: a rule refuses it; every refusal, with its column and count, without a value.
    """
    report, table = check_table(raw, contract, site)
    if table is None:
        raise DataError([str(each) for each in report.refusals], raw.place)
    return table


def example_rows(raw: RawTable, contract: Contract, site: SiteTable, most: int = 3) -> Iterator[ExampleRow]:
    """Show the first rows that break each rule. They are patients' values: for the site's own terminal, never for a file or a message."""
    for name, variable in contract.variables.items():
        if name in site.absent:
            continue
        readings = _readings(name, variable, raw, contract, site)
        shown = Counter[str]()
        for line, text in zip(raw.lines, raw.columns[name], strict=True):
            rule = readings[text].rule
            shown[rule] += 1
            if rule and shown[rule] <= most:
                yield ExampleRow(line=line, column=name, text=text, rule=rule)
    if contract.rows == "one-per-patient":
        seen, again = set[str](), list[tuple[int, str]]()
        for line, text in zip(raw.lines, raw.columns[contract.patient], strict=True):
            if text in seen:
                again.append((line, text))
            if text not in ("", *contract.missing):
                seen.add(text)
        for line, text in again[:most]:
            yield ExampleRow(line=line, column=contract.patient, text=text, rule="more than one row of a patient")


def _readings(name: str, variable: Variable, raw: RawTable, contract: Contract, site: SiteTable) -> Mapping[str, _Reading]:
    """Read each different text of a column once."""
    missing = frozenset(("", *contract.missing, *variable.missing))
    read = _reader(variable, raw.form_of(name), site.units.get(name))
    nothing = _Reading("" if variable.type in ("category", "id") else float("nan"), is_missing=True)
    if name == contract.patient:
        nothing = _Reading("", rule="no patient id, which every row needs", is_missing=True)
    codes = frozenset(number for code in missing if variable.is_numeric and (number := code_number(code)) is not None)
    is_code = _code_of_a_number(codes, raw.form_of(name)) if codes else None
    return {
        text: nothing if text in missing or (is_code is not None and is_code(text)) else read(text)
        for text in dict.fromkeys(raw.columns[name])
    }


def _code_of_a_number(codes: frozenset[float], form: TableFormat) -> Callable[[str], bool]:
    """Recognise a code for missing that is a number in another spelling, such as -9.0 for -9."""
    number = NumberReader(form)

    def is_code(text: str) -> bool:
        try:
            return number(text) in codes
        except ValueError:
            return False

    return is_code


def _reader(variable: Variable, form: TableFormat, unit: str | None) -> Callable[[str], _Reading]:
    """Make the function that reads a text of a variable which is not missing."""
    match variable.type:
        case "id":
            return _read_id
        case "category":
            labels = {code: each.label for each in variable.categories for code in each.codes}
            return lambda text: _Reading(labels[text]) if text in labels else _unseen(variable)
        case "date":
            return lambda text: _ranged(variable, text, lambda text: read_date(text, form), _AGREED)
        case _:
            number, conversion = NumberReader(form), variable.convert.get(unit or "", _AGREED)
            is_whole = variable.type == "integer"
            return lambda text: _ranged(variable, text, lambda text: _whole(number(text), is_needed=is_whole), conversion)


def _read_id(text: str) -> _Reading:
    if UNSAFE_OR_BREAK.search(text):
        return _Reading("", rule="an id with a line end or a character that cannot be seen")
    return _Reading(text)


def _whole(value: float, *, is_needed: bool) -> float:
    if is_needed and not value.is_integer():
        raise ValueError("no whole number")
    return value


def _ranged(variable: Variable, text: str, read: Callable[[str], float], conversion: Conversion) -> _Reading:
    """Read a number or a date, convert it to the agreed unit and hold it against the range."""
    try:
        value = read(text)
    except ValueError as error:
        return _Reading(float("nan"), rule=str(error))
    value = value * conversion.factor + conversion.offset + 0.0  # no -0.0
    if variable.range is None or variable.range[0] <= value <= variable.range[1]:
        return _Reading(value)
    least, largest = (
        f"{int(each)}" if isinstance(each, float) and each.is_integer() else str(each) for each in variable.as_dict()["range"]
    )
    rule = f"outside of {least} to {largest}{'' if variable.unit in (None, '1') else f' {variable.unit}'}"
    if variable.out_of_range == "missing":
        return _Reading(float("nan"), rule=rule, effect="taken for missing", is_missing=True)
    return _Reading(float("nan"), rule=rule)


def _unseen(variable: Variable) -> _Reading:
    rule = "a text that is no category's code"
    if variable.unseen == "missing":
        return _Reading("", rule=rule, effect="taken for missing", is_missing=True)
    if variable.unseen == "category" and variable.unseen_category is not None:
        return _Reading(variable.unseen_category, rule=rule, effect="taken for a category")
    return _Reading("", rule=rule)


def _violations(
    name: str, variable: Variable, readings: Mapping[str, _Reading], texts: Mapping[str, int], site: SiteTable
) -> Iterator[Violation]:
    counts = Counter[tuple[str, Effect]]()
    for text, count in texts.items():
        if readings[text].rule:
            counts[readings[text].rule, readings[text].effect] += count
    num_given = sum(count for text, count in texts.items() if readings[text].rule or not readings[text].is_missing)
    for (rule, effect), count in counts.items():
        asked, is_most = "", count > _MOSTLY * num_given
        if is_most and variable.is_numeric and rule.startswith("outside of "):
            asked = f"; is it in {site.units.get(name) or variable.unit} at this site?"
        if is_most and effect == "taken for missing" and count >= _FEWEST_MOSTLY:
            # the rule is for single values: a column that is nearly lost has another unit, or other codes
            away = "" if variable.absent == "refuse" else f", or take the column away and say table.absent: [{name}]"
            remedy = f"most values would be missing: {remedy_of(variable, rule)}{away}"
            yield Violation(column=name, rule=rule + asked, count=count, effect="refused", remedy=remedy)
            continue
        remedy = remedy_of(variable, rule) if effect == "refused" else ""
        yield Violation(column=name, rule=rule + asked, count=count, effect=effect, remedy=remedy)


def _all_missing(name: str, variable: Variable, num_rows: int) -> Violation:
    remedy = (
        "the contract refuses a site without it" if variable.absent == "refuse" else f"take the column away and say table.absent: [{name}]"
    )
    return Violation(column=name, rule=f"no row has a value: {remedy}", count=num_rows, effect="refused")


def _agreed(variable: Variable, num_rows: int) -> Numbers | tuple[str, ...]:
    """Agreed value of a variable that the site does not have, for all its rows."""
    value = variable.absent_value
    assert value is not None
    return (value,) * num_rows if isinstance(value, str) else np.full(num_rows, value)


def _column(variable: Variable, values: Sequence[Value]) -> Numbers | tuple[str, ...]:
    if variable.type in ("category", "id"):
        return tuple([str(value) for value in values])
    return np.asarray(values, dtype=np.float64)
