"""What a run's models say of new rows."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from p2pfl.errors import ConfigError, TaskError
from p2pfl.plan import load_sites
from p2pfl.results import Run, build_loaded, read_buffers
from p2pfl.tasks.calling import described, probabilities_of, users_code

_MAX_FINDINGS = 10


def predict_file(run_folder: Path, node: str, file: Path) -> list[list[float]]:
    """Probabilities (or outputs, where the task has no probabilities) of a node's final model for the rows of a CSV file.

    Args:
        run_folder: of a run that has ended.
        node: whose model, and whose site's standardisation of features.
        file: with a header; the columns that the task names, in any order, others are left out of account.

    Returns:
        One list for each row.

    Raises:
        ConfigError: there is no such node, the task does not say how rows become inputs, a column is missing, a value is no number.
        TaskError: the task's own functions fail.
    """
    run = Run(run_folder)
    models = run.models
    if node not in models:
        raise ConfigError(f"--node {node!r}: one of {', '.join(models)}", str(run_folder))
    task = load_sites(run.experiment)
    site = next((site for site in task.sites if site.name == node), None)
    if task.features is None or site is None or site.prepare is None:
        raise ConfigError(f"task {task.name} does not say how a row of a table becomes an input (features, Site.prepare)", str(run_folder))
    model = build_loaded(task, run.experiment, models[node], read_buffers(run_folder, node))
    raw_MF = _read_columns(file, task.features)
    with users_code(task.name, "prepare", raw_MF, site=node):
        prepared: object = site.prepare(raw_MF)
    if not isinstance(prepared, Tensor) or prepared.dim() == 0 or len(prepared) != len(raw_MF):
        fault = f"it returned {described(prepared)} for {described(raw_MF)}: expected a tensor of as many rows"
        raise TaskError(fault, task=task.name, function="prepare", site=node)
    inputs = prepared.to(models[node].dtype)
    with torch.no_grad():
        with users_code(task.name, "model", inputs, site=node):
            outputs = model(inputs)
        if task.probabilities is not None:
            outputs = probabilities_of(task, outputs, site=node)
    return [[float(value) for value in row] for row in outputs.reshape(len(inputs), -1).tolist()]


def _read_columns(file: Path, names: tuple[str, ...]) -> np.ndarray:
    """The named columns of a CSV file as float64 (rows, columns)."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            missing = [name for name in names if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(f"the header lacks {', '.join(missing)}; expected {', '.join(names)}", str(file))
            findings, rows = [], []
            for number, row in enumerate(reader, start=2):
                values = []
                for name in names:
                    try:
                        value = float(row[name])
                    except (TypeError, ValueError):
                        value = float("nan")
                    if not np.isfinite(value):
                        findings.append(f"line {number}, column {name}: expected a number")
                    values.append(value)
                rows.append(values)
    except FileNotFoundError as error:
        raise ConfigError("no such file", str(file)) from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot be read as CSV: {error}", str(file)) from error
    if findings:
        raise ConfigError(findings[:_MAX_FINDINGS], str(file))
    if not rows:
        raise ConfigError("has no rows below its header", str(file))
    return np.array(rows, dtype=np.float64)
