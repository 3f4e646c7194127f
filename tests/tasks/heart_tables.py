"""The four hospitals of UCI Heart Disease as institutions would have them: a data contract, a table each, and site files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from p2pfl.data.sources import SOURCES, read
from p2pfl.yaml_files import dump_yaml

COLUMNS = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak")
HOSPITALS = {"cleveland": "cleveland", "hungary": "hungarian", "switzerland": "switzerland", "va": "va"}


def number(least, largest, unit="1"):
    return {"type": "number", "unit": unit, "range": [least, largest]}


CONTRACT = {
    "name": "heart-disease",
    "patient": "patient",
    "outcome": "disease",
    # as the columns of the published protocol stand: those with levels last
    "inputs": ["age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak", "cp", "restecg"],
    "table": {"decimal": "point"},
    "variables": {
        "patient": {"type": "id"},
        "age": number(18, 100, "year"),
        "sex": number(0, 1),
        "cp": {
            "type": "category",
            "categories": {"typical": ["1"], "atypical": ["2"], "other": ["3"], "none": ["4"]},
        },
        "trestbps": number(0, 300, "mmHg"),
        "chol": number(0, 1000, "mg/dl"),
        "fbs": number(0, 1),
        "restecg": {"type": "category", "categories": {"normal": ["0"], "wave": ["1"], "hypertrophy": ["2"]}},
        "thalach": number(30, 250, "1/min"),
        "exang": number(0, 1),
        "oldpeak": number(-10, 10, "mm"),
        "part": {"type": "category", "categories": ["train", "test"]},
        "disease": {"type": "category", "categories": {"no": ["0"], "yes": ["1", "2", "3", "4"]}},
    },
}

EXPERIMENT = {
    "task": {
        "name": "table",
        "contract": "contract.yaml",
        "preprocessing": "preprocessing.yaml",
        "model": "logistic",
        "test": {"variable": "part", "label": "test"},
        "groups": ["cp"],
        "sites": [f"{hospital}/site.yaml" for hospital in HOSPITALS],
    }
}


def write_heart_tables(folder: Path) -> Path:
    """Write contract, tables and site files into a folder, rows and split as the published protocol has them; the experiment's path."""
    from p2pfl.tasks.medical import _flamby_split

    contents = read(SOURCES["heart-disease"], [f"processed.{file}.data" for file in HOSPITALS.values()])
    for hospital, file in HOSPITALS.items():
        lines = [line for line in csv.reader(contents[f"processed.{file}.data"].decode("ascii").splitlines()) if line]
        rows = [[line[place] for place in (*range(len(COLUMNS)), 13)] for line in lines]
        rows = [row for row in rows if "?" not in row]
        _, test = _flamby_split(np.array([float(row[-1]) > 0 for row in rows], dtype=np.int64))
        parts = ["test" if place in set(test.tolist()) else "train" for place in range(len(rows))]
        home = folder / hospital
        home.mkdir()
        with (home / "patients.csv").open("w", encoding="utf-8", newline="") as text:
            writer = csv.writer(text)
            writer.writerow(["patient", *COLUMNS, "disease", "part"])
            for place, (row, part) in enumerate(zip(rows, parts, strict=True)):
                # some files write 63.0, others 63 or .5; a label is a text
                writer.writerow([f"{hospital}-{place}", *(f"{float(value):g}" for value in row), part])
        site = {"member": hospital, "table": {"file": "patients.csv"}}
        (home / "site.yaml").write_text(dump_yaml(site), encoding="utf-8")
    (folder / "contract.yaml").write_text(dump_yaml(CONTRACT), encoding="utf-8")
    (folder / "heart.yaml").write_text(dump_yaml(EXPERIMENT), encoding="utf-8")
    return folder / "heart.yaml"
