"""Which values of which keys go with each other: the cells of a sweep, checked before the first of them runs."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from p2pfl.errors import ConfigError, ConflictError, TopologyError, ValidationRowsError, summed_up
from p2pfl.experiment.loading import overridden, raw_experiment, recorded_experiment, with_files_found
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.experiment.spec import Experiment
from p2pfl.runs.summary_fields import validation_fraction
from p2pfl.tasks import check_may_run
from p2pfl.yaml_files import parse_yaml, shown

VALIDATION = 0.2
"""The fraction of each site's training rows that a sweep takes out for validation where the experiment says nothing of it."""

_MOST_RUNS = 100_000
_MOST_SLUG = 60  # characters

Vary = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of values; it runs once for each seed."""

    number: int
    name: str
    """Name of its folder."""
    values: dict[str, Any]
    """Values by dotted key."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A whole sweep, as sweep.yaml holds it."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    experiment: dict[str, Any]
    """The experiment that all cells have in common, as its file says it."""
    vary: dict[str, list[Any]]
    seeds: Annotated[list[int], Field(min_length=1)]
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a cell cannot be, by the cell's name."""
    validation: float | None = None
    """The `validation` of every cell where neither the experiment nor `vary` says one; None: nothing is added."""
    no_validation: str | None = None
    """Why no validation rows could be taken out."""

    @cached_property
    def cells(self) -> list[Cell]:
        """All combinations, the values of the last key changing fastest."""
        combinations = list(itertools.product(*self.vary.values()))
        digits = len(str(len(combinations) - 1))
        return [
            Cell(number=number, name=f"{number:0{digits}d}-{_slug(values)}", values=dict(zip(self.vary, values, strict=True)))
            for number, values in enumerate(combinations)
        ]

    @property
    def runs(self) -> list[tuple[Cell, int]]:
        """Every cell that can be with every seed; all cells have run once before any runs with the next seed."""
        return [(cell, seed) for seed in self.seeds for cell in self.cells if cell.name not in self.left_out]

    def experiment_of(self, cell: Cell, seed: int) -> Experiment:
        """The experiment that runs in a cell.

        Raises:
            ConflictError: the cell's values do not go together.
            ConfigError: one of them is wrong.
        """
        added = {"validation": self.validation} if self.validation is not None else {}
        return recorded_experiment(self.experiment, "experiment", {**added, **cell.values, "seed": seed})

    def validation_of(self, cell: Cell) -> float:
        """The fraction of training rows that a cell takes out for validation."""
        return validation_fraction({**self.experiment, **({"validation": self.validation} if self.validation else {}), **cell.values})


def parse_variations(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Read texts such as "topology.name=ring,torus", whose values are a list in YAML; values by key, in the order given.

    Raises:
        ConfigError: a text has no "=", its values are not YAML, or a key comes twice.
    """
    pairs: list[tuple[str, list[Any]]] = []
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{text!r}: expected KEY=VALUE,VALUE, such as topology.name=ring,torus", "--vary")
        pairs.append((key.strip(), parse_yaml(f"[{values}]", f"--vary {text}")))
    keys = [key for key, _ in pairs]
    if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        raise ConfigError([f"{key} is given twice: write all its values behind one --vary {key}=" for key in twice], "--vary")
    return dict(pairs)


def make_grid(
    experiment: Experiment | Mapping[str, Any] | Path | str, vary: Vary, seeds: int, overrides: Mapping[str, Any] | None = None
) -> Grid:
    """The grid around an experiment, for so many seeds from its own on; arguments as of `p2pfl.sweep`.

    Raises:
        ConfigError: there is nothing to vary, a key has no values, one twice, or is varied and fixed.
    """
    raw, folder = _raw(experiment)
    overrides = overrides or {}
    _refuse(_faults_of_vary(vary, seeds, overrides))
    raw = with_files_found(overridden(raw, overrides), folder)
    raw.setdefault("name", "experiment")
    first = raw.get("seed", 0)
    if not isinstance(first, int) or isinstance(first, bool):
        raise ConfigError(f"seed = {shown(first)}: expected a whole number")
    found = {key: [_with_file_found(key, value, folder) for value in values] for key, values in vary.items()}
    # an Experiment has every default written out and does not say what somebody asked for
    is_said = bool(raw.get("validation")) if isinstance(experiment, Experiment) and "validation" not in overrides else "validation" in raw
    by_default = not is_said and "validation" not in vary and math.prod(len(values) for values in vary.values()) > 1
    seed_list = list(range(first, first + seeds))
    return Grid(experiment=raw, vary=found, seeds=seed_list, validation=VALIDATION if by_default else None)


def checked(grid: Grid, allow_tasks: Collection[str] = ()) -> Grid:
    """The grid with those cells left out whose values do not go together, and without validation rows by default where a cell has none.

    Every cell is made ready with the first seed, so that what is wrong is known before anything runs.

    Raises:
        ConfigError: all values that are wrong by themselves, and those that no cell can have.
    """
    try:
        return _checked(grid, allow_tasks)
    except ValidationRowsError as error:  # of rows that nobody has asked for
        return _checked(replace(grid, validation=None, no_validation=str(error)), allow_tasks)


def _checked(grid: Grid, allow_tasks: Collection[str]) -> Grid:
    cannot: dict[str, str] = {}
    _refuse(_faults_of_files(grid, cannot) or _faults_of_plans(grid, cannot, allow_tasks) or _faults_of_values(grid, cannot))
    return replace(grid, left_out={cell.name: cannot[cell.name] for cell in grid.cells if cell.name in cannot})


def check_tasks(grid: Grid, allow_tasks: Collection[str]) -> None:
    """Refuse a grid of a folder that asks for a task which may not run here; a new grid's tasks are loaded before it is one.

    Raises:
        TaskNotAllowed: a cell asks for such a task.
    """
    for name in {experiment["task"]["name"]: None for experiment in (overridden(grid.experiment, cell.values) for cell in grid.cells)}:
        check_may_run(name, allow_tasks)


def as_text(value: object) -> str:
    """A value as a table holds it: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _raw(experiment: Experiment | Mapping[str, Any] | Path | str) -> tuple[dict[str, Any], Path]:
    """An experiment's content as it is written, and the folder where its files lie."""
    if isinstance(experiment, Experiment):
        return {"schema": 1, **experiment.as_dict()}, Path()
    if isinstance(experiment, Mapping):
        return {"schema": Experiment.schema, **experiment}, Path()
    return {"schema": Experiment.schema, **raw_experiment(experiment)}, Path(experiment).parent


def _with_file_found(key: str, value: Any, folder: Path) -> Any:
    """A value with the full path of a graph's file in it."""
    found: Any = with_files_found(overridden({}, {key: value}), folder)
    for part in key.split("."):
        found = found[part]
    return found


def _faults_of_vary(vary: Vary, seeds: int, fixed: Mapping[str, Any]) -> list[str]:
    if seeds < 1:
        return [f"seeds = {seeds}: must be >= 1"]
    if not vary and seeds == 1:
        return ["there is nothing to vary: give --vary KEY=VALUE,VALUE, or --seeds above 1"]
    found = []
    for key, values in vary.items():
        if key == "seed":
            found.append("seed: --seeds counts the seeds, from the experiment's own; give --seeds and --set seed=FIRST")
        if isinstance(values, str) or not values:
            found.append(f"{key}: no values; write them behind the =, such as {key}=VALUE,VALUE")
        texts = [repr(value) for value in values]
        found += [f"{key} = {text} is given twice" for text in dict.fromkeys(texts) if texts.count(text) > 1]
        found += [f"{key} is fixed and varied; keep one of both" for other in fixed if other == key]
        found += [f"{key} is varied, and {other}, which is a part of it; keep one of both" for other in vary if other.startswith(f"{key}.")]
    runs = seeds
    for values in vary.values():
        runs *= max(1, len(values))
    if runs > _MOST_RUNS:
        found.append(f"the grid has {runs:,} runs: expected at most {_MOST_RUNS:,}")
    return found


def _faults_of_files(grid: Grid, cannot: dict[str, str]) -> list[str]:
    """Faults of the cells as they are written; cells that contradict themselves are added to *cannot*."""
    found: list[str] = []
    for cell in grid.cells:
        try:
            grid.experiment_of(cell, grid.seeds[-1])
        except ConflictError as error:
            cannot[cell.name] = "; ".join(summed_up(error.findings))
        except ConfigError as error:
            found += error.findings
    return list(dict.fromkeys(found))


def _faults_of_plans(grid: Grid, cannot: dict[str, str], allow_tasks: Collection[str]) -> list[str]:
    """Faults that show once graphs and rows are there; ValidationRowsError where a cell lacks validation rows that nobody asked for."""
    experiments = [(cell, grid.experiment_of(cell, grid.seeds[0])) for cell in grid.cells if cell.name not in cannot]
    # cells with the same rows follow each other: those are loaded once, and only those of one cell are held
    experiments.sort(key=lambda pair: (_rows_of(pair[1]), pair[0].number))
    found: list[str] = []
    for _, same_rows in itertools.groupby(experiments, key=lambda pair: _rows_of(pair[1])):
        pairs = list(same_rows)
        try:
            task = load_sites(pairs[0][1], allow_tasks=allow_tasks)
            if grid.validation is not None and not task.metrics:
                raise ValidationRowsError(f"task {task.name} has no metric")
            if grid.validation is not None and not any(site.test for site in task.sites):
                raise ValidationRowsError(f"no site of task {task.name} has training rows to take them from")
        except ConfigError as error:
            if isinstance(error, ValidationRowsError) and grid.validation is not None:
                raise
            found += error.findings
            continue
        for cell, experiment in pairs:
            try:
                make_plan(experiment, task)
            except (ConflictError, TopologyError) as error:
                if isinstance(error, TopologyError) and error.place is not None:  # of a graph's file
                    found += [f"{error.place}: {finding}" for finding in error.findings]
                else:
                    cannot[cell.name] = "; ".join(summed_up(error.findings))
            except ConfigError as error:
                found += error.findings
    return list(dict.fromkeys(found))


def _faults_of_values(grid: Grid, cannot: Mapping[str, str]) -> list[str]:
    """Values that no cell can have: leaving their cells out would leave them out."""
    if len(cannot) == len(grid.cells):
        return list(dict.fromkeys(cannot.values()))
    found = []
    for key, values in grid.vary.items():
        for value in values:
            reasons = [cannot.get(cell.name) for cell in grid.cells if cell.values[key] is value]
            if None not in reasons:
                found.append(f"{key} = {shown(value)}: no cell can have it: {reasons[0]}")
    return found


def _rows_of(experiment: Experiment) -> str:
    """Values of an experiment that decide about the rows."""
    return repr((experiment.task, experiment.nodes, experiment.partition, experiment.validation, experiment.seed))


def _refuse(findings: Sequence[str]) -> None:
    if findings:
        raise ConfigError(findings)


def _slug(values: Sequence[Any]) -> str:
    texts = [as_text(value) for value in values]
    short = [text.rsplit("/", 1)[-1] for text in texts]
    slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", "-".join(short))[:_MOST_SLUG].strip("-.")
    return slug or ("value" if values else "as-written")
