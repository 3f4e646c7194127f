"""Sites, which have the rows: each on its own, or very many whose rows lie in one table and take the memory of their numbers.

Shapes: S sites, M rows, R row numbers, F features, P parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from p2pfl.errors import DataError
from p2pfl.governance.names import NAME, RULE
from p2pfl.statistics.moments import Moments

Rows = tuple[Tensor, Tensor]
"""Inputs (M, ...) and targets (M, ...)."""

_CHECKED_AT_ONCE = 2**16  # rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One institution's rows: a node of the network.

    Raises:
        DataError: the name is no member's, lengths differ, a table is empty, a number is not finite; the message names the site and the
            place.
    """

    name: str
    """As in the roster; nodes are ordered by it."""
    train: Rows | None
    """None where there is nothing to train on, as in pure averaging."""
    test: Rows | None
    """None where there is nothing to measure on."""
    groups: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Attributes of the test rows, one value a row, for reports on subgroups."""
    set_aside: Rows | None = None
    """The test rows while validation rows stand in their place: measured once, at the end, and never used for choosing."""
    train_patients: Sequence[str] | None = None
    """Patient of each training row; they never leave the site. None: each row is a patient of its own."""
    test_patients: Sequence[str] | None = None
    """Patient of each test row, by whom small groups are counted; likewise."""
    start: Tensor | None = None
    """(P,) where this node starts instead of at the model's own parameters."""
    prepare: Callable[[np.ndarray], Tensor] | None = None
    """Raw features (M, F), columns as in ``Task.features``, to model inputs, with this site's own statistics."""
    moments: Moments | None = None
    """Moments of the training inputs before they are standardised, for sites that agree on one scale (option ``standardise: pooled``)."""

    def __post_init__(self) -> None:
        findings = [fault for part in ("train", "test", "set_aside") for fault in _faults_of_rows(part, getattr(self, part))]
        findings += _faults_of_groups(self.groups, self.test)
        findings += [
            f"{part}_patients has {len(patients)} ids: expected one for each of the {num_rows} rows of {part}"
            for part, patients, rows in (("train", self.train_patients, self.train), ("test", self.test_patients, self.test))
            if patients is not None and len(patients) != (num_rows := _num_rows(rows))
        ]
        start: object = self.start
        if start is not None and (not isinstance(start, Tensor) or start.dim() != 1 or not start.is_floating_point()):
            given = describe(start) if isinstance(start, Tensor) else type(start).__name__
            findings.append(f"start is {given}: expected one floating vector (P,)")
        elif isinstance(start, Tensor) and not bool(start.isfinite().all()):
            findings.append("start has values that are not finite")
        prepare: object = self.prepare
        if prepare is not None and not callable(prepare):
            findings.append(f"prepare is {type(prepare).__name__}: expected a function, or None")
        name: object = self.name
        if not isinstance(name, str) or not NAME.fullmatch(name):
            findings.append(f"name = {name!r}: expected the member's name in the roster, {RULE}")
        if findings:
            raise DataError(findings, place=f"site {self.name!r}")

    @cached_property
    def num_test_patients(self) -> int:
        """Number of patients whom the test rows are of; each row is one where nobody says more."""
        return len(set(self.test_patients)) if self.test_patients is not None else _num_rows(self.test)


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Which rows of a table are whose."""

    starts: Tensor
    """(S + 1,) int64, rising from 0: site i has the places starts[i] to starts[i + 1]."""
    rows: Tensor | None = None
    """(R,) whole numbers, the table's row at each place; None: place p is row p. A row may be at several places."""

    def of(self, site: int) -> Tensor | slice:
        """The rows of one site."""
        start, stop = int(self.starts[site]), int(self.starts[site + 1])
        return slice(start, stop) if self.rows is None else self.rows[start:stop].long()

    def take(self, sites: Tensor) -> Split:
        """Take the rows of some sites, one after the other."""
        sizes = self.starts.diff()[sites]
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        places = (self.starts[sites] - starts[:-1]).repeat_interleave(sizes) + torch.arange(int(starts[-1]))
        return Split(starts=starts, rows=places if self.rows is None else self.rows[places])


class SiteTable(Sequence[Site]):
    """Sites that are made when somebody looks at one; the data are there once.

    Names are sorted, inputs (M, ...) floating, targets (M, ...). The splits say whose rows are whose: every site has some to train on;
    without a split no site has rows to test on, or any that are set aside; see `Site.set_aside`. All sites prepare raw features alike.

    Raises:
        DataError: names, rows and tables do not fit together, a number is not finite, or the first name is no member's.
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        inputs: Tensor,
        targets: Tensor,
        train: Split,
        test: Split | None = None,
        set_aside: Split | None = None,
        prepare: Callable[[np.ndarray], Tensor] | None = None,
    ) -> None:
        self.names, self.inputs, self.targets, self.prepare = tuple(names), inputs, targets, prepare
        self.train, self.test, self.set_aside = train, test, set_aside
        findings = []
        if len(inputs) != len(targets):
            findings.append(f"{len(inputs)} rows of inputs and {len(targets)} of targets: expected as many")
        if any(first >= second for first, second in zip(self.names, self.names[1:], strict=False)):
            findings.append("names are not sorted, or one is there twice")
        for kind, split in (("train", train), ("test", test), ("set aside", set_aside)):
            if split is not None:
                findings += [f"{kind}: {fault}" for fault in _faults_of_split(split, len(self.names), len(inputs))]
        if not findings and not bool((train.starts.diff() > 0).all()):
            findings.append(f"site {self.names[int((train.starts.diff() <= 0).nonzero()[0])]!r} has no rows to train on")
        for kind, values in (("inputs", inputs), ("targets", targets)):
            if values.is_floating_point() and (row := _first_not_finite(values)) is not None:
                findings.append(f"{kind}: row {row} has a value that is not finite")
        if findings:
            raise DataError(findings, place="sites")
        if self.names:
            _ = self[0]  # made, so that a name that is none shows before anything runs

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> list[Site]: ...
    def __getitem__(self, index: int | slice) -> Site | list[Site]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        site = range(len(self))[index]
        own = self.train.of(site)
        return Site(
            name=self.names[site],
            train=(self.inputs[own], self.targets[own]),
            test=self.test_of(site),
            set_aside=self._of(self.set_aside, site),
            prepare=self.prepare,
        )

    def test_of(self, site: int) -> Rows | None:
        """One site's test rows; None where it has none."""
        return self._of(self.test, site)

    def _of(self, split: Split | None, site: int) -> Rows | None:
        rows = split.of(site) if split is not None else None
        found = (self.inputs[rows], self.targets[rows]) if rows is not None else None
        return found if found is not None and len(found[0]) else None

    def with_validation(self, train: Split, validation: Split) -> SiteTable:
        """Make a table of the same sites and data in which validation rows stand in the place of the test rows, which are set aside."""
        return SiteTable(
            names=self.names,
            inputs=self.inputs,
            targets=self.targets,
            train=train,
            test=validation,
            set_aside=self.test,
            prepare=self.prepare,
        )

    def take(self, sites: Sequence[int]) -> SiteTable:
        """Some of the sites in the order given; of a table whose rows are each one site's, only their rows are kept."""
        taken = copy.copy(self)  # checked already, and its names need not be sorted
        taken.names = tuple(self.names[site] for site in sites)
        chosen = torch.tensor(list(sites), dtype=torch.int64)
        taken.train = self.train.take(chosen)
        taken.test = self.test.take(chosen) if self.test is not None else None
        taken.set_aside = self.set_aside.take(chosen) if self.set_aside is not None else None
        if self.test is self.set_aside is None and self.train.rows is None and taken.train.rows is not None:
            taken.inputs, taken.targets = self.inputs[taken.train.rows], self.targets[taken.train.rows]
            taken.train = Split(starts=taken.train.starts)
        return taken

    def tests(self) -> Rows | None:
        """All sites' test rows pooled; None where there are none."""
        if self.test is None:
            return None
        places = slice(int(self.test.starts[0]), int(self.test.starts[-1]))
        rows = places if self.test.rows is None else self.test.rows[places].long()
        return self.inputs[rows], self.targets[rows]

    def by_name(self) -> SitesByName:
        """The sites by name, made when somebody looks at one."""
        return SitesByName(self)


class SitesByName(Mapping[str, Site]):
    """A table's sites by their names, which are sorted."""

    def __init__(self, table: SiteTable) -> None:
        self.table = table
        self._rows = {name: row for row, name in enumerate(table.names)}

    def __getitem__(self, name: str) -> Site:
        return self.table[self._rows[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.names)

    def __len__(self) -> int:
        return len(self.table)


def _faults_of_groups(groups: object, test: Rows | None) -> list[str]:
    if not isinstance(groups, Mapping):
        return [f"groups is {type(groups).__name__}: expected a mapping of attributes to values of the test rows"]
    unsized = [name for name, values in groups.items() if not hasattr(values, "__len__")]
    if unsized:
        return [f"groups[{name!r}] is {type(groups[name]).__name__}: expected a list, one value for each test row" for name in unsized]
    num_test = _num_rows(test)
    return [
        f"groups[{name!r}] has {len(values)} values: expected one for each of the {num_test} test rows"
        for name, values in groups.items()
        if len(values) != num_test
    ]


def _num_rows(rows: Rows | None) -> int:
    """Count rows that are there; 0 where they are no table, which is a finding of its own."""
    is_table = isinstance(rows, tuple) and bool(rows) and isinstance(rows[0], Tensor) and rows[0].dim() > 0
    return len(rows[0]) if is_table and rows is not None else 0


def _faults_of_rows(part: str, rows: Rows | None) -> list[str]:
    if rows is None:
        return []
    if not isinstance(rows, tuple) or len(rows) != 2 or not all(isinstance(tensor, Tensor) for tensor in rows):  # noqa: PLR2004
        return [f"{part} is {type(rows).__name__}: expected a pair of tensors (inputs, targets)"]
    for name, tensor in zip(("inputs", "targets"), rows, strict=True):
        if tensor.dim() == 0:
            return [f"{part} {name} are one number: expected rows along the first axis"]
    inputs, targets = rows
    if len(inputs) != len(targets):
        return [f"{part} has {len(inputs)} rows of inputs and {len(targets)} of targets: expected as many"]
    if not len(inputs):
        return [f"{part} has no rows: expected at least one, or None"]
    return [
        f"{part} {name}: row {int(bad[0, 0])} has a value that is not finite"
        for name, tensor in (("inputs", inputs), ("targets", targets))
        if len(bad := (~tensor.isfinite()).nonzero())
    ]


def _first_not_finite(values: Tensor) -> int | None:
    """The first row with a value that is not finite; some rows at a time, so that no copy of a large table is made."""
    for first in range(0, len(values), _CHECKED_AT_ONCE):
        part = values[first : first + _CHECKED_AT_ONCE]
        if not bool(part.isfinite().all()):
            return first + int((~part.isfinite()).reshape(len(part), -1).any(dim=1).nonzero()[0])
    return None


def _faults_of_split(split: Split, num_sites: int, num_rows: int) -> list[str]:
    starts, rows = split.starts, split.rows
    if starts.shape != (num_sites + 1,) or starts.dtype != torch.int64:
        return [f"starts are {str(starts.dtype).removeprefix('torch.')}{list(starts.shape)}: expected int64[{num_sites + 1}]"]
    num_places = num_rows if rows is None else len(rows)
    found = []
    if int(starts[0]) < 0 or bool((starts.diff() < 0).any()) or int(starts[-1]) > num_places:
        found.append(f"starts run from {int(starts[0])} to {int(starts[-1])}: expected rising numbers up to {num_places}")
    if rows is not None and len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= num_rows):
        found.append(f"rows run from {int(rows.min())} to {int(rows.max())}: expected 0 to {num_rows - 1}")
    return found


def describe(tensor: Tensor) -> str:
    """Describe a tensor by dtype and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
