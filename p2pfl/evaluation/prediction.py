"""Predictions of a run's models for new rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from p2pfl.data.columns import read_columns
from p2pfl.errors import ConfigError, DataError, TaskError, some
from p2pfl.evaluation.results import Run, build_loaded, load_run_sites, read_buffers
from p2pfl.tasks.calling import described, probabilities_of, users_code


def predict_file(run_folder: Path, node: str, file: Path, allow_tasks: Collection[str] = ()) -> list[list[float]]:
    """Compute a node's predicted probabilities, or its outputs, for the rows of a CSV file.

    Args:
        run_folder: of a run that has ended.
        node: whose model, and whose site's standardisation of features.
        file: with a header; the columns that the task names, in any order, others are left out of account.
        allow_tasks: tasks that may run here beside the built-in ones, as distribution:entry or module:function.

    Returns:
        One list for each row.

    Raises:
        TaskNotAllowed: the run's task is not among them; nothing of it has been imported.
        ConfigError: there is no such node, the task does not say how rows become inputs, a column is missing, a value is no number.
        TaskError: the task's own functions fail.
    """
    run = Run(run_folder)
    models = run.models
    if node not in models:
        raise ConfigError(f"--node {node!r}: one of {some(list(models))}", str(run_folder))
    task = load_run_sites(run, allow_tasks)
    site = next((site for site in task.sites if site.name == node), None)
    if task.features is None or site is None or site.prepare is None:
        raise ConfigError(f"task {task.name} does not say how a row of a table becomes an input (features, Site.prepare)", str(run_folder))
    model = build_loaded(task, run.experiment, models[node], read_buffers(run_folder, node))
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
    inputs = prepared.to(models[node].dtype)
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
