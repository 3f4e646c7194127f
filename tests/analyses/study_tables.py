"""Contracts, tables and site files of the real data, as institutions would have them, in a folder."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from p2pfl.yaml_files import dump_yaml

ANY = {"patients_per_cell": 1, "patients_per_sum": 1}
"""Floors that allow anything, for exact figures."""


def category(*labels):
    return {"type": "category", "categories": list(labels)}


def number(least, largest):
    return {"type": "number", "unit": "1", "range": [least, largest]}


def integer(least, largest):
    return {"type": "integer", "unit": "1", "range": [least, largest]}


def data(name):
    """A file's rows as texts, or a skip that says why."""
    if "P2PFL_DATA" not in os.environ:
        pytest.skip("P2PFL_DATA names no folder with data")
    with (Path(os.environ["P2PFL_DATA"]) / "inference" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def whole(text):
    return text and str(int(float(text)))


def stays():
    variables = {
        "age": category("middle", "old", "young"),
        "sex": category("F", "M"),
        "lab": number(0, 100),
        "los": integer(0, 60),
    }
    return variables, "los", [{**row, "los": whole(row["los"]), "site": row["site"]} for row in data("los.csv")]


def cnsim():
    variables = {
        "LAB_TSC": number(0, 20),
        "LAB_TRIG": number(-10, 30),
        "LAB_HDL": number(-5, 10),
        "PM_BMI_CONTINUOUS": number(5, 80),
        "GENDER": category("0", "1"),
        "DIS_DIAB": integer(0, 1),
    }
    rows = [{name: row[name] for name in variables} | {"site": row["study"]} for row in data("cnsim.csv")]
    return variables, "DIS_DIAB", rows


def infections():
    variables = {
        "treat": integer(0, 1),
        "age": number(0, 100),
        "steroids": integer(1, 2),
        "inherit": category("1", "2"),
        "inherited": integer(1, 2),
        "futime": number(1, 500),
        "count": integer(0, 7),
        "time": number(1, 500),
        "event": integer(0, 1),
    }
    rows = []
    for row in data("cgd0.csv"):
        num_events = sum(row[f"etime{k}"] != "" for k in range(1, 8))
        rows.append(
            {name: row[name] for name in ("treat", "age", "steroids", "inherit", "futime")}
            | {"inherited": row["inherit"], "count": str(num_events), "time": row["etime1"] or row["futime"]}
            | {"event": str(int(num_events > 0)), "site": f"centre-{row['center']}"}
        )
    return variables, "count", rows


def lung():
    variables = {"time": number(1, 1022), "status": integer(0, 1), "age": number(18, 110), "sex": integer(0, 1)}
    rows = [{name: whole(row[name]) if name in ("status", "sex") else row[name] for name in variables} | row for row in data("lung2.csv")]
    return variables, ("time", "status"), [{**row, "status": whole(row["status"]), "sex": whole(row["sex"])} for row in rows]


def write_study(folder, study, policy=None, split=None):
    """Write contract, tables and site files; gives their paths.

    Args:
        folder: for all files.
        study: variables, outcome and rows; each row has a key `site`.
        policy: of all sites.
        split: site of each row instead of its own.
    """
    variables, outcome, rows = study
    contract = {
        "name": "study",
        "patient": "patient",
        "outcome": list(outcome) if isinstance(outcome, tuple) else outcome,
        "table": {"decimal": "point"},
        "variables": {"patient": {"type": "id"}, **variables},
    }
    (folder / "contract.yaml").write_text(dump_yaml(contract))
    by_site = {}
    for place, row in enumerate(rows):
        by_site.setdefault(row["site"] if split is None else f"site-{split[place]}", []).append({"patient": f"p{place}", **row})
    paths = []
    for name, own in sorted(by_site.items()):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["patient", *variables], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(own)
        site = {"table": {"file": f"{name}.csv"}} | ({} if policy is None else {"policy": policy})
        (folder / f"{name}.yaml").write_text(dump_yaml(site))
        paths.append(folder / f"{name}.yaml")
    return folder / "contract.yaml", paths


def made(num_rows=240, num_sites=3, seed=4):
    """A study of patients that nobody has met: variables, outcome and rows, and no value missing."""
    random = np.random.default_rng(seed)
    variables = {
        "age": number(18, 110),
        "dose": number(0, 10),
        "sex": category("female", "male"),
        "stage": category("one", "two", "three"),
        "died": integer(0, 1),
        "visits": integer(0, 40),
        "days": number(0, 2000),
        "seen": {"type": "date", "range": ["2020-01-01", "2026-12-31"]},
    }
    rows = []
    for place in range(num_rows):
        age, sex = random.normal(60, 12), random.integers(0, 2)
        risk = 1 / (1 + np.exp(-(0.04 * (age - 60) + 0.6 * sex - 0.4)))
        rows.append(
            {
                "age": f"{np.clip(age, 19, 109):.3f}",
                "dose": f"{random.uniform(0.5, 9.5):.3f}",
                "sex": ("female", "male")[sex],
                "stage": ("one", "two", "three")[random.integers(0, 3)],
                "died": str(int(random.random() < risk)),
                "visits": str(min(40, random.poisson(4 + 2 * sex))),
                "days": f"{min(2000, np.ceil(random.exponential(300))):.0f}",
                "seen": f"{2020 + place % 7}-03-{1 + place % 28:02d}",
                "site": f"site-{place % num_sites}",
            }
        )
    return variables, "died", rows


def changed(study, **changes):
    """A study with other values: *changes* has a function of a row and its place for each column."""
    variables, outcome, rows = study
    return variables, outcome, [row | {name: new(row, place) for name, new in changes.items()} for place, row in enumerate(rows)]
