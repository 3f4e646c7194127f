"""A contract for tests, as its file has it, and tables that follow it."""

from __future__ import annotations

import copy

from p2pfl.data.contract import Contract
from p2pfl.data.csv_reading import read_csv
from p2pfl.data.table_format import SiteTable

CONTENT = {
    "name": "stroke-registry",
    "patient": "patient",
    "outcome": "died",
    "inputs": ["age", "glucose", "sex", "admitted"],
    "missing": ["NA", -9],
    "table": {"decimal": "point"},
    "variables": {
        "patient": {"type": "id"},
        "age": {"type": "integer", "unit": "year", "range": [18, 110]},
        "glucose": {
            "type": "number",
            "unit": "mmol/l",
            "convert": {"mg/dl": {"factor": 0.0555}},
            "range": [1, 60],
            "absent": "indicator",
            "absent_value": 6,
        },
        "sex": {"type": "category", "categories": {"female": ["F", 2], "male": ["M", 1]}},
        "admitted": {"type": "date", "range": ["2015-01-01", "2026-12-31"]},
        "died": {"type": "integer", "unit": 1, "range": [0, 1]},
    },
}
"""Of variables of every type."""

HEADER = "patient,age,glucose,sex,admitted,died"
ROWS = ["p1,60,5.5,F,2020-02-29,0", "p2,71,7,M,2021-03-09,1", "p3,NA,,2,2022-12-01,0"]


def content(**changes):
    """The content with some dotted keys replaced, as a__b; None takes one away."""
    changed = copy.deepcopy(CONTENT)
    for key, value in changes.items():
        *path, last = key.split("__")
        place = changed
        for part in path:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return changed


def contract(**changes):
    return Contract.from_mapping(content(**changes), "contract.yaml")


def site(**said):
    return SiteTable.from_mapping({"file": "table.csv", "units": {"glucose": "mmol/l"}} | said, "site.yaml, table")


def table_of(folder, written, agreed=None, own=None):
    """Write a text or bytes to a file, and read it as the site's table."""
    path = folder / "table.csv"
    path.write_bytes(written if isinstance(written, bytes) else written.encode())
    return read_csv(path, agreed or contract(), own or site())
