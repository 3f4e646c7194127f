"""A data contract of invented clinics, their tables in three spellings, and the experiment of a table task on them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from p2pfl.data.contract import Contract
from p2pfl.yaml_files import dump_yaml

CONTRACT: dict[str, Any] = {
    "name": "stroke-registry",
    "patient": "patient",
    "outcome": "died",
    "inputs": ["age", "glucose", "sex", "ward"],
    "table": {"decimal": "point"},
    "variables": {
        "patient": {"type": "id"},
        "age": {"type": "integer", "unit": "year", "range": [18, 110]},
        "glucose": {"type": "number", "unit": "mmol/l", "range": [1, 60], "convert": {"mg/dl": {"factor": 0.05}}},
        "sex": {"type": "category", "categories": {"female": ["F"], "male": ["M"]}},
        "ward": {"type": "category", "categories": ["east", "north", "west"], "unseen": "category", "unseen_category": "east"},
        "days": {"type": "number", "unit": "day", "range": [0, 400]},
        "died": {"type": "integer", "unit": 1, "range": [0, 1]},
    },
}
NAMES = ("basel", "bern", "genf")
PREPROCESSING: dict[str, Any] = {
    "age": {"centre": 60.0, "scale": 12.0, "missing": 61.0},
    "glucose": {"centre": 7.0, "scale": 2.0, "missing": 6.5},
    "sex": {"missing": "male"},
    "ward": {"missing": "north"},
    "days": {"centre": 100.0, "scale": 50.0},
}


def contract(**changes: Any) -> Contract:
    return Contract.from_mapping({**CONTRACT, **changes}, "contract.yaml")


def preprocessing(agreed: Contract | None = None, **changes: Any) -> dict[str, Any]:
    return {"contract": (agreed or contract()).digest, "variables": {**PREPROCESSING, **changes}}


def patients(name: str, num_rows: int = 80) -> list[dict[str, str]]:
    """Rows of one clinic, some with a gap, as texts; drawn from its name."""
    rng = np.random.default_rng(sum(map(ord, name)))
    rows = []
    for place in range(num_rows):
        age, glucose, sex, ward = rng.integers(40, 90), rng.uniform(4, 12), rng.choice(["F", "M"]), rng.choice(["east", "north", "west"])
        risk = (age - 65) / 10 + (glucose - 8) / 3 + (sex == "M") - 0.5 * (ward == "west")
        died, days = int(risk + rng.logistic() > 0), 120 - 8 * risk + rng.normal(0, 10)
        gap = place % 8 == 0
        rows.append(
            {
                "patient": f"{name}-{place}",
                "age": str(age),
                "glucose": "" if gap else f"{glucose:.2f}",
                "sex": str(sex),
                "ward": "" if place % 10 == 3 else str(ward),
                "days": f"{days:.1f}",
                "died": str(died),
            }
        )
    return rows


def write_csv(path: Path, rows: list[dict[str, str]], **dialect: Any) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **dialect)
        writer.writeheader()
        writer.writerows(rows)


def write_clinics(folder: Path, **task: Any) -> Path:
    """Write contract, tables, site files and the experiment into a folder; the experiment's path."""
    (folder / "contract.yaml").write_text(dump_yaml(CONTRACT), encoding="utf-8")
    for name in NAMES:
        (folder / name).mkdir()
        own: dict[str, Any] = {"file": "table.csv", "units": {"glucose": "mmol/l"}}
        rows = patients(name)
        if name == "bern":  # as its system writes them
            own |= {"separator": "semicolon", "decimal": "comma", "columns": {"age": "Alter"}, "units": {"glucose": "mg/dl"}}
            rows = [{("Alter" if key == "age" else key): value for key, value in row.items()} for row in rows]
            for row in rows:
                row["glucose"] = row["glucose"] and f"{float(row['glucose']) / 0.05:.1f}".replace(".", ",")
                row["days"] = row["days"].replace(".", ",")
        write_csv(folder / name / "table.csv", rows, delimiter=";" if name == "bern" else ",")
        (folder / name / "site.yaml").write_text(dump_yaml({"member": name, "table": own}), encoding="utf-8")
    said = {"name": "table", "contract": "contract.yaml", "model": "logistic", "preprocessing": "preprocessing.yaml"}
    said |= {"sites": [f"{name}/site.yaml" for name in NAMES]}
    experiment = {"task": said | task, "topology": {"name": "ring"}, "rounds": 3, "stop": None}
    (folder / "stroke.yaml").write_text(dump_yaml(experiment), encoding="utf-8")
    return folder / "stroke.yaml"
