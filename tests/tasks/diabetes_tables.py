"""Diabetes 130-US hospitals by ten specialties: first stays as tables with a data contract, and the same rows as arrays by hand."""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from clinic_tables import write_csv

from p2pfl.yaml_files import dump_yaml

COUNTS = {
    "time_in_hospital": (1, 14),
    "num_lab_procedures": (1, 132),
    "num_procedures": (0, 6),
    "num_medications": (1, 81),
    "number_outpatient": (0, 42),
    "number_emergency": (0, 76),
    "number_inpatient": (0, 21),
    "number_diagnoses": (1, 16),
}
LEVELS = {
    "race": ("Caucasian", "AfricanAmerican", "Asian", "Hispanic", "Other"),
    "gender": ("Female", "Male"),
    "age": tuple(f"[{ten}-{ten + 10})" for ten in range(0, 100, 10)),
    "A1Cresult": ("None", "Norm", ">7", ">8"),
    "insulin": ("No", "Steady", "Up", "Down"),
    "change": ("No", "Ch"),
    "diabetesMed": ("No", "Yes"),
}
CONTRACT: dict[str, Any] = {
    "name": "diabetes-130",
    "patient": "patient_nbr",
    "outcome": "readmitted",
    "inputs": [*COUNTS, *LEVELS],
    "missing": ["?", "Unknown/Invalid"],
    "variables": {
        "patient_nbr": {"type": "id"},
        **{name: {"type": "integer", "unit": 1, "range": list(ends)} for name, ends in COUNTS.items()},
        **{name: {"type": "category", "categories": list(levels)} for name, levels in LEVELS.items()},
        "readmitted": {"type": "category", "categories": {"later or never": ["NO", ">30"], "within 30 days": ["<30"]}},
        "part": {"type": "category", "categories": ["train", "test"]},
    },
}
EXPERIMENT: dict[str, Any] = {
    "topology": {"name": "ring"},
    "weighting": "samples",
    "algorithm": {"name": "dpsgd", "local_steps": 50, "batch_size": 64},
    "optimizer": {"name": "sgd", "lr": 0.2},
    "rounds": 10,
    "stop": None,
    "baselines": [],
}


def stays() -> dict[str, list[dict[str, str]]]:
    """First stay of each patient, by the ten specialties that have most; every fifth patient is tested on."""
    with zipfile.ZipFile(Path(os.environ["P2PFL_DATA"]) / "diabetes130" / "dataset_diabetes.zip") as archive:
        name = next(name for name in archive.namelist() if name.endswith("diabetic_data.csv"))
        rows = list(csv.DictReader(io.TextIOWrapper(archive.open(name), "utf-8")))
    first: dict[str, dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: int(row["encounter_id"])):
        first.setdefault(row["patient_nbr"], row)
    sizes = Counter(row["medical_specialty"] for row in first.values() if row["medical_specialty"] != "?")
    found: dict[str, list[dict[str, str]]] = {specialty: [] for specialty, _ in sizes.most_common(10)}
    for row in first.values():
        if row["medical_specialty"] in found:
            own = {name: row[name] for name in ("patient_nbr", *COUNTS, *LEVELS, "readmitted")}
            found[row["medical_specialty"]].append({**own, "part": "train" if int(row["patient_nbr"]) % 5 else "test"})
    return {specialty.replace("/", "-").lower(): found[specialty] for specialty in found}


def write_diabetes_tables(folder: Path, tables: dict[str, list[dict[str, str]]]) -> Path:
    """Write the contract, a folder of tables, and the experiment; the experiment's path."""
    (folder / "contract.yaml").write_text(dump_yaml(CONTRACT), encoding="utf-8")
    (folder / "specialties").mkdir()
    for specialty, rows in tables.items():
        write_csv(folder / "specialties" / f"{specialty}.csv", rows)
    task = {"name": "table", "contract": "contract.yaml", "model": "logistic", "sites": "specialties"}
    task |= {"test": {"variable": "part", "label": "test"}, "preprocessing": "preprocessing.yaml"}
    (folder / "diabetes.yaml").write_text(dump_yaml({"task": task, **EXPERIMENT}), encoding="utf-8")
    return folder / "diabetes.yaml"


def arrays_by_hand(tables: dict[str, list[dict[str, str]]]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Inputs (M, D), outcome (M,) and whether a row is tested on (M,), by specialty; as an analyst would write it with all rows at hand."""
    everybody = [row for rows in tables.values() for row in rows if row["part"] == "train"]
    common = {name: Counter(row[name] for row in everybody if row[name] in levels).most_common(1)[0][0] for name, levels in LEVELS.items()}
    numbers = {name: np.array([float(row[name]) for row in everybody]) for name in COUNTS}
    found = {}
    for specialty, rows in tables.items():
        columns = [(np.array([float(row[name]) for row in rows]) - of.mean()) / of.std(ddof=1) for name, of in numbers.items()]
        for name, levels in LEVELS.items():
            texts = np.array([row[name] if row[name] in levels else common[name] for row in rows])
            columns += [(texts == level) * 1.0 for level in levels[1:]]
        outcome = np.array([row["readmitted"] == "<30" for row in rows]) * 1.0
        found[specialty] = np.stack(columns, axis=1), outcome, np.array([row["part"] == "test" for row in rows])
    return found
