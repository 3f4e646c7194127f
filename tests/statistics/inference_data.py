"""Tables of the folder with real data, split by site."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest


def table(name):
    """A file's rows as texts, or a skip that says why."""
    if "P2PFL_DATA" not in os.environ:
        pytest.skip("P2PFL_DATA names no folder with data")
    with (Path(os.environ["P2PFL_DATA"]) / "inference" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows, name):
    return np.array([float(row[name]) if row[name] else np.nan for row in rows])


def is_level(rows, name, level):
    return np.where([row[name] == "" for row in rows], np.nan, np.array([row[name] == level for row in rows], dtype=float))


def sites(rows, name):
    """Positions of each site's rows, by the column that names it."""
    labels = np.array([row[name] for row in rows])
    return [np.flatnonzero(labels == label) for label in sorted(set(labels.tolist()))]
