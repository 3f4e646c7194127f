"""Results of a run as Python objects: summary, records, models and their predictions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from p2pfl.data.columns import read_columns
from p2pfl.errors import ConfigError, DataError, StoreError, TaskError, TaskNotAllowed, some
from p2pfl.experiment.loading import recorded_experiment
from p2pfl.experiment.plan import load_sites
from p2pfl.experiment.spec import Experiment
from p2pfl.params import Layout, load_parameters
from p2pfl.runs.checkpoint import write_tensors
from p2pfl.runs.records import RunRecords, read_run
from p2pfl.tasks import TABLE, Task
from p2pfl.tasks.calling import described, probabilities_of, users_code
from p2pfl.training import build_model

STACKED_ABOVE = 1000
"""With more nodes than this, their models lie in one file and their records are sampled."""

_STACKED = "models.safetensors"
_BUFFER = "buffers/"
_FROZEN = "frozen/"


@dataclass(frozen=True)
class Run:
    """Results in the folder of a run."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # a text is welcome

    @cached_property
    def _read(self) -> RunRecords:
        return read_run(self.path)

    @property
    def summary(self) -> dict[str, Any]:
        """Content of the run's summary.json.

        Raises:
            ConfigError: the run has not ended.
        """
        if self._read.summary is None:
            raise ConfigError(
                "the run has no summary.json: it is still running or was interrupted; continue it with --resume", str(self.path)
            )
        return self._read.summary

    @property
    def records(self) -> list[dict[str, Any]]:
        """Rows of the network, a dict a round; `pandas.DataFrame(run.records)` takes them."""
        return self._read.rounds

    @property
    def node_records(self) -> list[dict[str, Any]]:
        """Rows of nodes, a dict for each node and round."""
        return self._read.nodes

    @property
    def events(self) -> list[dict[str, Any]]:
        """Events that happened beside the numbers."""
        return self._read.events

    @cached_property
    def experiment(self) -> Experiment:
        """Experiment as it was resolved when the run began."""
        return recorded_experiment(self._read.experiment, str(self.path / "experiment.yaml"))

    @property
    def models(self) -> Mapping[str, Tensor]:
        """Final parameters of each node as a flat vector (P,)."""
        return read_models(self.path)

    def models_after(self, round: int) -> Mapping[str, Tensor]:
        """Parameters of each node after a round, where `save_models_every` kept them."""
        return read_models(self.path, round)


def load(run: Run | Path | str, node: str, *, allow_tasks: Collection[str] = ()) -> nn.Module:
    """Load a node's final model, ready to use.

    Tasks that may run here beside the built-in ones are allowed as distribution:entry or module:function.

    Raises:
        TaskNotAllowed: the run's task is not among them; nothing of it has been imported.
        ConfigError: there is no such run or node; the message lists the nodes.
    """
    run = run if isinstance(run, Run) else Run(Path(run))
    models = run.models
    if node not in models:
        raise ConfigError(f"node {node!r}: one of {some(list(models))}", str(run.path))
    return build_loaded(load_run_sites(run, allow_tasks, with_tables=False), run.experiment, models[node], read_buffers(run.path, node))


def load_run_sites(run: Run, allow_tasks: Collection[str] = (), *, with_tables: bool = True) -> Task:
    """Load the task of a run with its sites; a table task without them, unless it is *with_tables*.

    Raises:
        TaskNotAllowed: it is neither built in nor allowed; the message names the run's file.
        ConfigError: as in `load_sites`.
    """
    try:
        none = {"sites": None} if run.experiment.task.name == TABLE and not with_tables else None
        return load_sites(run.experiment, none, allow_tasks=allow_tasks)
    except TaskNotAllowed as error:
        raise TaskNotAllowed(error.findings, str(run.path / "experiment.yaml")) from error


def build_loaded(task: Task, experiment: Experiment, flat_P: Tensor, buffers: Mapping[str, Tensor]) -> nn.Module:
    """Build the task's model with given parameters and buffers (none: the model's own), in evaluation mode.

    Raises:
        ConfigError: the task's model is no longer the one that was trained.
    """
    model = build_model(task, flat_P.dtype, experiment.seed)
    try:
        load_parameters(model, flat_P)
        model.load_state_dict(dict(buffers), strict=False)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"task {task.name}: its model has changed since it was trained: {error}; take the one of that time") from error
    return model.eval()


def predict_file(run_folder: Path, node: str, file: Path, allow_tasks: Collection[str] = ()) -> list[list[float]]:
    """Compute a node's predicted probabilities, or its outputs, one list for each row of a CSV file.

    The file has a header with the columns that the task names, in any order; others are left out of account. Features are standardised as
    at the node's site. Of a table task the file is a table as the contract says, texts included, or a site's file that says where one is.
    Tasks that may run here beside the built-in ones are allowed as distribution:entry or module:function.

    Raises:
        TaskNotAllowed: the run's task is not among them; nothing of it has been imported.
        ConfigError: there is no such node, the task does not say how rows become inputs, a column is missing, a value is no number.
        TaskError: the task's own functions fail.
    """
    run = Run(run_folder)
    models = run.models
    if node not in models:
        raise ConfigError(f"--node {node!r}: one of {some(list(models))}", str(run_folder))
    task = load_run_sites(run, allow_tasks, with_tables=False)
    if task.read is not None:
        with users_code(task.name, "read", file, site=node):
            read = task.read(file)
        return _predicted(task, run, node, models[node], read)
    site = next((site for site in task.sites if site.name == node), None)
    if task.features is None or site is None or site.prepare is None:
        raise ConfigError(f"task {task.name} does not say how a row of a table becomes an input (features, Site.prepare)", str(run_folder))
    rows, lines = read_columns(file, task.features)
    raw_MF = np.array(rows, dtype=np.float64)
    try:
        with users_code(task.name, "prepare", raw_MF, site=node):
            prepared: object = site.prepare(raw_MF)
    except DataError as error:
        raise DataError([_with_line(finding, lines) for finding in error.findings], str(file)) from error
    if not isinstance(prepared, Tensor) or prepared.dim() == 0 or len(prepared) != len(raw_MF):
        fault = f"it returned {described(prepared)} for {described(raw_MF)}: expected a tensor of as many rows"
        raise TaskError(fault, task=task.name, function="prepare", site=node)
    return _predicted(task, run, node, models[node], prepared)


def _predicted(task: Task, run: Run, node: str, flat_P: Tensor, prepared: Tensor) -> list[list[float]]:
    """Apply a node's model to prepared rows: probabilities where the task says them, else outputs."""
    model = build_loaded(task, run.experiment, flat_P, read_buffers(run.path, node))
    inputs = prepared.to(flat_P.dtype)
    with torch.no_grad():
        with users_code(task.name, "model", inputs, site=node):
            outputs = model(inputs)
        if task.probabilities is not None:
            outputs = probabilities_of(task, outputs, site=node)
    return [[float(value) for value in row] for row in outputs.reshape(len(inputs), -1).tolist()]


def _with_line(finding: str, lines: Sequence[int]) -> str:
    """Name the file's line in a finding about a row."""
    found = re.match(r"row (\d+), ", finding)
    return f"line {lines[int(found[1])]}, {finding[found.end() :]}" if found and int(found[1]) < len(lines) else finding


def write_models(
    folder: Path,
    names: tuple[str, ...],
    x_NP: Tensor,
    layout: Layout,
    buffers: Mapping[str, Tensor],
    round: int | None = None,
    *,
    frozen: Mapping[str, Tensor] | None = None,
) -> None:
    """Write each node's model to a safetensors file; above 1,000 nodes all of them, stacked, to one file.

    Buffers are each row's own, (N, ...); frozen parameters, which did not train, are the same for all rows. Without a round the models are
    the final ones.
    """
    fixed = {key: tensor.detach().cpu().contiguous() for key, tensor in (frozen or {}).items()}
    place = folder / "models" if round is None else folder / "models" / f"round-{round:06d}"
    x_NP = x_NP.detach().cpu()
    if len(names) > STACKED_ABOVE:
        target = folder / _STACKED if round is None else place.with_suffix(".safetensors")
        target.parent.mkdir(parents=True, exist_ok=True)
        stacked = {f"{_BUFFER}{key}": tensor.cpu().contiguous() for key, tensor in buffers.items()}
        stacked |= {f"{_FROZEN}{key}": tensor for key, tensor in fixed.items()}
        with target.open("wb") as file:
            write_tensors(file, {"x": x_NP, **stacked}, {"nodes": "\n".join(names)})
        return
    place.mkdir(parents=True, exist_ok=True)
    for row, name in enumerate(names):
        tensors = {**layout.views(x_NP[row]), **{key: rows[row] for key, rows in buffers.items()}, **fixed}
        with (place / f"{name}.safetensors").open("wb") as file:
            write_tensors(file, tensors, {"parameters": "\n".join(spec.name for spec in layout.tensors)})


def read_models(folder: Path, round: int | None = None) -> dict[str, Tensor]:
    """Read each node's parameters as a flat vector (P,), from files of `write_models`.

    Raises:
        ConfigError: there are none.
        StoreError: a file cannot be read.
    """
    place = folder / "models" if round is None else folder / "models" / f"round-{round:06d}"
    stacked = folder / _STACKED if round is None else place.with_suffix(".safetensors")
    try:
        if stacked.exists():
            with safe_open(stacked, framework="pt") as file:
                return dict(zip(file.metadata()["nodes"].split("\n"), file.get_tensor("x"), strict=True))
        found = {path.stem: _flat_model(path) for path in sorted(place.glob("*.safetensors"), key=lambda path: path.stem)}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StoreError(f"{place}: not readable as models: {error}") from error
    if not found:
        which = (
            "final models: the run has not ended" if round is None else f"models of round {round}: save_models_every decides which are kept"
        )
        raise ConfigError(f"no {which}", str(folder))
    return found


def read_buffers(folder: Path, node: str) -> dict[str, Tensor]:
    """Read a node's final buffers, such as BatchNorm's statistics, and its frozen parameters.

    Raises:
        StoreError: the file cannot be read.
    """
    stacked, single = folder / _STACKED, folder / "models" / f"{node}.safetensors"
    try:
        if stacked.exists():
            with safe_open(stacked, framework="pt") as file:
                row = file.metadata()["nodes"].split("\n").index(node)
                keys = list(file.keys())
                buffers = {name.removeprefix(_BUFFER): file.get_slice(name)[row] for name in keys if name.startswith(_BUFFER)}
                return buffers | {name.removeprefix(_FROZEN): file.get_tensor(name) for name in keys if name.startswith(_FROZEN)}
        with safe_open(single, framework="pt") as file:
            parameters = file.metadata()["parameters"].split("\n")
            return {name: file.get_tensor(name) for name in file.keys() if name not in parameters}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StoreError(f"{folder}: the model of {node} is not readable: {error}") from error


def _flat_model(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return torch.cat([file.get_tensor(name).reshape(-1) for name in file.metadata()["parameters"].split("\n")])
