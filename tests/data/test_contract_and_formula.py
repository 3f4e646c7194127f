"""Real stays of three hospitals, as differently written as hospitals write, give the pooled regression through one contract."""

import numpy as np
import pytest
from inference_data import table

from p2pfl.data.check import accepted_table, check_table
from p2pfl.data.contract import Contract
from p2pfl.data.csv_reading import read_csv
from p2pfl.data.table_format import SiteTable
from p2pfl.errors import DataError
from p2pfl.statistics.design import design
from p2pfl.statistics.families import FAMILIES
from p2pfl.statistics.formula import parse_formula
from p2pfl.statistics.glm import DesignRows, fit_glm
from p2pfl.statistics.sums import analyse

POOLED = [8.382168000234477, 0.9349764456107482, -0.9659624126033973, 0.4384692927765167, 0.10154651274012146]
"""Coefficients of the pooled rows, from the normal equations in rational arithmetic."""

CONTRACT = Contract.from_mapping(
    {
        "name": "length-of-stay",
        "patient": "patient",
        "outcome": "los",
        "inputs": ["age", "sex", "lab"],
        "missing": ["NA"],
        "table": {"decimal": "point"},
        "variables": {
            "patient": {"type": "id"},
            "age": {"type": "category", "categories": {"middle": ["middle", "mittel"], "old": ["old", "alt"], "young": ["young", "jung"]}},
            "sex": {"type": "category", "categories": {"F": ["F", "weiblich"], "M": ["M", "männlich"]}},
            "lab": {"type": "number", "unit": "mg/dl", "convert": {"g/l": {"factor": 100}}, "range": [0, 100]},
            "los": {"type": "integer", "unit": "day", "range": [1, 60]},
        },
    },
    "contract.yaml",
)
GERMAN = {"middle": "mittel", "old": "alt", "young": "jung", "F": "weiblich", "M": "männlich"}


def plain(rows):
    lines = [f"{number},{row['age']},{row['sex']},{row['lab']},{row['los']}" for number, row in enumerate(rows)]
    return "\ufeff" + "\r\n".join(["patient,age,sex,lab,los", *lines]), "utf-8", {"units": {"lab": "mg/dl"}}


def german(rows):
    lines = [
        f"{n};{GERMAN[row['age']]};{GERMAN[row['sex']]};{row['lab'].replace('.', ',')};{int(float(row['los']))}"
        for n, row in enumerate(rows)
    ]
    said = {"encoding": "latin-1", "separator": "semicolon", "decimal": "comma", "thousands": "point", "units": {"lab": "mg/dl"}}
    return (
        "\n".join(["Patient;Alter;Geschlecht;Laborwert;Liegedauer (männl./weibl.)", *lines]),
        "latin-1",
        said | {"columns": {"patient": "Patient", "age": "Alter", "sex": "Geschlecht", "lab": "Laborwert", "los": 5}},
    )


def in_grams(rows):
    lines = [
        f'"n{n}"\t"a ""note""\nof two lines"\t{row["los"]}\t{float(row["lab"]) / 100:.6f}\t{row["sex"]}\t{row["age"]}'
        for n, row in enumerate(rows)
    ]
    return (
        "\n".join(["patient\tnote\tlos\tlab\tsex\tage", *lines]),
        "utf-16",
        {"encoding": "utf-16", "separator": "tab", "units": {"lab": "g/l"}},
    )


WRITERS = {"site1": plain, "site2": german, "site3": in_grams}


def site_table(folder, name, rows, **said):
    path = folder / f"{name}.csv"
    text, encoding, own = WRITERS[name]([row for row in rows if row["site"] == name])
    path.write_bytes(text.encode(encoding))
    site = SiteTable.from_mapping({"file": str(path), **own, **said}, "site.yaml, table")
    return read_csv(site.file, CONTRACT, site), site


def test_three_ways_of_writing_give_the_pooled_regression(tmp_path):
    rows = table("los.csv")
    parts = []
    for name in WRITERS:
        raw, site = site_table(tmp_path, name, rows)
        checked = accepted_table(raw, CONTRACT, site)
        found = design(parse_formula("los ~ age + sex + lab"), checked.columns, checked.levels)
        weights = np.ones(len(checked.patients))
        parts.append(
            DesignRows(columns_MP=found.columns_MP, outcomes_M=checked.columns["los"], offsets_M=found.offsets_M, weights_M=weights)
        )

    fit = analyse(fit_glm(found.names, FAMILIES["gaussian"]), parts)

    assert [len(part.outcomes_M) for part in parts] == [500, 400, 100]
    assert found.names == ("(Intercept)", "ageold", "ageyoung", "sexM", "lab")
    assert fit.params == pytest.approx(POOLED, rel=0, abs=1e-11)
    assert fit.bse == pytest.approx([0.2783177416, 0.2874611359, 0.3519605616, 0.2573695442, 0.0043118331], rel=0, abs=6e-11)


def test_a_site_that_forgets_to_say_its_signs_or_unit_is_refused(tmp_path):
    rows = table("los.csv")

    raw, site = site_table(tmp_path, "site2", rows, decimal="point", thousands="none")
    assert not check_table(raw, CONTRACT, site)[0].is_accepted
    with pytest.raises(DataError, match="which is not utf-8"):
        site_table(tmp_path, "site2", rows, encoding="utf-8")
    with pytest.raises(DataError, match=r"units\.lab: required, but missing"):
        site_table(tmp_path, "site3", rows, units={})
