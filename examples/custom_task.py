"""A task of your own: will a patient have a stroke within a year?

Name it in an experiment file as

    task: {name: "custom_task:stroke", data: tables}

and run it from the folder that holds this file, with --allow-task custom_task:stroke: what an experiment names runs only where somebody has
allowed it, and only if it is marked as a task. `tables` is a folder with one CSV file for each hospital (charite.csv, ucl.csv, …), with the
columns below in any order. Without `data`, three hospitals with INVENTED patients stand in, so that you can try it at once.
"""

from __future__ import annotations

import csv
import random
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import p2pfl
from p2pfl.tasks import Site, Task, accuracy, auroc

FEATURES = ("age", "systolic_pressure", "diabetes", "atrial_fibrillation")
TYPICAL = ((65.0, 140.0, 0.2, 0.2), (10.0, 20.0, 0.4, 0.4))  # agreed on in advance: a number means the same at every hospital
LABEL = "stroke"  # 0 or 1


@p2pfl.task
def stroke(data: str | None = None) -> Task:
    """One site for each hospital whose table is on this machine: all of them when you simulate, exactly one at an institution."""
    tables = (
        {path.stem: list(csv.DictReader(path.read_text().splitlines())) for path in sorted(Path(data).glob("*.csv"))}
        if data
        else invented()
    )
    return Task(
        name="stroke",
        model=partial(nn.Linear, len(FEATURES), 1),  # any torch model; all hospitals start from the same parameters
        loss=F.binary_cross_entropy_with_logits,
        metrics={"auroc": auroc, "accuracy": accuracy},  # any functions of (outputs, targets)
        sites=[hospital(name, rows) for name, rows in tables.items()],
    )


def hospital(name: str, rows: list[dict[str, str]]) -> Site:
    """Every fourth patient is for testing. No row leaves the hospital: only model parameters travel."""
    inputs = torch.tensor([[float(row[feature]) for feature in FEATURES] for row in rows])
    targets = torch.tensor([[float(row[LABEL])] for row in rows])
    is_test = torch.arange(len(rows)) % 4 == 0
    centre, scale = torch.tensor(TYPICAL)
    inputs = (inputs - centre) / scale
    decades = [10 * (int(float(row["age"])) // 10) for row, chosen in zip(rows, is_test, strict=True) if chosen]
    return Site(
        name=name, train=(inputs[~is_test], targets[~is_test]), test=(inputs[is_test], targets[is_test]), groups={"decade": decades}
    )


def invented(num_patients: int = 200) -> dict[str, list[dict[str, str]]]:
    """Patients drawn by a random generator with a fixed seed. No figure computed from them says anything about strokes."""
    tables = {}
    for name, mean_age in {"hospital-a": 55, "hospital-b": 65, "hospital-c": 75}.items():
        draw = random.Random(name)  # noqa: S311  not for secrets
        rows = []
        for _ in range(num_patients):
            age, pressure = draw.gauss(mean_age, 10), draw.gauss(140, 20)
            diabetes, fibrillation = draw.random() < 0.2, draw.random() < age / 400  # noqa: PLR2004
            risk = 0.05 * (age - 65) + 0.03 * (pressure - 140) + diabetes + 2 * fibrillation - 1
            values = (age, pressure, diabetes, fibrillation, draw.gauss(0, 1) < risk)
            rows.append({key: str(float(value)) for key, value in zip((*FEATURES, LABEL), values, strict=True)})
        tables[name] = rows
    return tables
