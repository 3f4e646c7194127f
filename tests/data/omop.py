"""A small OMOP CDM for tests: the tables and columns of version 5.4 that the query on the page needs, and a few people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from p2pfl.yaml_files import parse_yaml

TABLES = (
    "CREATE TABLE concept (concept_id integer PRIMARY KEY, concept_name varchar(255), vocabulary_id varchar(20), concept_code varchar(50))",
    "CREATE TABLE concept_ancestor (ancestor_concept_id integer, descendant_concept_id integer)",
    "CREATE TABLE person (person_id integer PRIMARY KEY, gender_concept_id integer, year_of_birth integer)",
    "CREATE TABLE condition_occurrence (person_id integer, condition_concept_id integer, condition_start_date date)",
    (
        "CREATE TABLE measurement (person_id integer, measurement_concept_id integer, measurement_date date, "
        "value_as_number numeric, unit_concept_id integer)"
    ),
    "CREATE TABLE death (person_id integer, death_date date)",
)
ROWS: dict[str, list[tuple[Any, ...]]] = {
    "concept": [
        (8507, "MALE", "Gender", "M"),
        (8532, "FEMALE", "Gender", "F"),
        (443454, "Cerebral infarction", "SNOMED", "432504007"),
        (4110189, "Cerebral infarct due to thrombosis of precerebral arteries", "SNOMED", "195185009"),
        (3004501, "Glucose [Mass/volume] in Serum or Plasma", "LOINC", "2345-7"),
        (8840, "milligram per deciliter", "UCUM", "mg/dL"),
    ],
    "concept_ancestor": [(443454, 443454), (443454, 4110189)],
    "person": [(1, 8532, 1950), (2, 8507, 1949), (3, 8532, 1970)],
    "condition_occurrence": [(1, 4110189, "2020-02-29"), (1, 443454, "2021-01-01"), (2, 443454, "2021-03-09"), (3, 316866, "2020-01-01")],
    "measurement": [
        (1, 3004501, "2020-02-29", 90, 8840),
        (1, 3004501, "2020-02-29", 110, 8840),
        (1, 3004501, "2020-02-29", 5.5, 8753),  # in mmol/l, which the query leaves out
        (1, 3004501, "2020-03-01", 300, 8840),
    ],
    "death": [(2, "2022-01-01")],
}
EXPECTED = {
    "patient": ("1", "2"),
    "age": [70.0, 72.0],
    "glucose": 100 * 0.0555,
    "sex": ("female", "male"),
    "admitted": [18321.0, 18695.0],
    "died": [0.0, 1.0],
}


def sections_of_the_page() -> list[dict[str, Any]]:
    """What the page on the data contract has in YAML: the contract, a site with a CSV file, a site with a query."""
    page = (Path(__file__).parents[2] / "docs" / "data-contract.md").read_text(encoding="utf-8")
    return [parse_yaml(each, "page") for each in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]


def check_rows(table: Any) -> None:
    """Compare a checked table with what is in the database; the order of its rows is the database's own."""
    order = sorted(range(len(table.patients)), key=lambda row: table.patients[row])
    found = table.rows(order)

    assert found.patients == EXPECTED["patient"]
    assert found.columns["sex"] == EXPECTED["sex"]
    for name in ("age", "admitted", "died"):
        assert found.columns[name].tolist() == EXPECTED[name]
    glucose = found.columns["glucose"].tolist()
    assert glucose[0] == EXPECTED["glucose"]
    assert glucose[1] != glucose[1]  # nobody has measured it
