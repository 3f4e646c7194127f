"""What no output says: a count of one patient, an exact small count of a site, or one site's own result."""

from __future__ import annotations

import os

import numpy as np
import pytest
from study_tables import category, changed, integer, made, number, write_study

from commands import run_here
from p2pfl.analyses.site_files import load_settings
from p2pfl.analyses.stats import run
from p2pfl.data.site_section import SiteSection
from p2pfl.errors import ConfigError
from p2pfl.inspector.statistics_page import statistics_page
from p2pfl.yaml_files import dump_yaml

LOGISTIC = {"kind": "glm", "formula": "died ~ age + sex", "family": "binomial"}


@pytest.mark.parametrize("cells", ["total", "site"])
def test_a_group_of_one_patient_is_refused_however_many_groups_there_are(cells, tmp_path):
    variables, outcome, rows = made()
    variables = {**variables, "visits": integer(0, 6)}
    study = changed((variables, outcome, rows), visits=lambda _, place: "6" if place == 4 else str(place % 2))
    contract, sites = write_study(tmp_path, study)

    with pytest.raises(ConfigError, match=r"a combination of died and visits has fewer than 5 patients|refused by policy"):
        run({"kind": "compare", "formula": "Surv(days, died) ~ visits", "cells": cells}, contract, sites)


@pytest.mark.parametrize("asked", [LOGISTIC, {"kind": "describe"}, {"kind": "km", "formula": "Surv(days, died) ~ 1", "grid": 100}])
def test_one_site_alone_has_no_result_unless_it_lets_it_be_shown(asked, tmp_path):
    contract, sites = write_study(tmp_path, made())

    with pytest.raises(ConfigError, match="one site alone has rows for this analysis"):
        run(asked, contract, sites[:1])

    sites[0].write_text(sites[0].read_text() + "policy: {may_release: [site_estimates]}\n")
    assert run(asked, contract, sites[:1])
    assert run(asked, contract, sites[1:])


def test_a_site_whose_others_have_no_complete_row_is_alone(tmp_path):
    study = changed(
        made(),
        age=lambda row, place: row["age"] if row["site"] == "site-0" or place % 2 else "",
        dose=lambda row, place: row["dose"] if row["site"] == "site-0" or not place % 2 else "",
    )
    study = changed(study, dose=lambda row, place: "" if row["site"] != "site-0" and row["age"] else row["dose"])

    with pytest.raises(ConfigError, match="one site alone has rows for this analysis"):
        run({**LOGISTIC, "formula": "died ~ age + dose"}, *write_study(tmp_path, study))


@pytest.mark.parametrize(("key", "meant"), [("polcy", "policy"), ("Policy", "policy"), ("cohrt", "cohort")])
def test_a_key_of_a_nodes_file_that_is_nearly_one_of_the_tables_is_refused(key, meant, tmp_path):
    own = {"member": "a", "study": "study.yaml", "table": {"file": "a.csv"}, "old_state": "x", "state_group": 1, "task": {}, "threads": 1}
    (tmp_path / "site.yaml").write_text(dump_yaml(own))
    assert load_settings(tmp_path / "site.yaml").name == "a"
    (tmp_path / "site.yaml").write_text(dump_yaml({**own, key: {"patients_per_cell": 20}}))

    for load in (load_settings, SiteSection.load):
        with pytest.raises(ConfigError, match=rf"{key} = .*: unknown key, did you mean {meant}\?"):
            load(tmp_path / "site.yaml")


def test_a_file_of_a_table_may_have_a_policy(tmp_path):
    (tmp_path / "a.yaml").write_text("table: {file: a.csv}\npolicy: {patients_per_cell: 7}\n")

    assert SiteSection.load(tmp_path / "a.yaml").table.file == "a.csv"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--csv", "out.csv", "--html", "nowhere/page.html"],
            "--html = 'nowhere/page.html': its folder does not exist; make the folder first",
        ),
        (["--csv", "out.csv", "--html", "./out.csv"], "--html = 'out.csv': --csv names the same file; expected another one"),
    ],
)
def test_outputs_are_checked_before_anything_is_computed(options, sentence, tmp_path, monkeypatch, capfd):
    contract, sites = write_study(tmp_path, made())
    monkeypatch.chdir(tmp_path)

    code, out, err = run_here("stats", "describe", *sites, "--contract", contract, *options, monkeypatch=monkeypatch, capfd=capfd)

    assert (code, out, err) == (2, "", f"p2pfl: {sentence}\n")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capfd):
    contract, sites = write_study(tmp_path, made())
    (tmp_path / "locked").mkdir(mode=0o500)

    found = run_here(
        "stats", "describe", *sites, "--contract", contract, "--csv", tmp_path / "locked" / "a.csv", monkeypatch=monkeypatch, capfd=capfd
    )

    assert found[0] == 2
    assert "nothing can be written in its folder" in found[2]


def test_a_label_is_no_formula_of_a_spreadsheet(tmp_path, monkeypatch, capfd):
    variables, outcome, rows = made()
    study = changed(({**variables, "stage": category("=1+1", "two")}, outcome, rows), stage=lambda _, place: ("=1+1", "two")[place % 2])
    contract, sites = write_study(tmp_path, study)
    options = ["--variables", "stage", "--csv", tmp_path / "out.csv"]

    assert run_here("stats", "describe", *sites, "--contract", contract, *options, monkeypatch=monkeypatch, capfd=capfd)[0] == 0
    assert "'=1+1" in (tmp_path / "out.csv").read_text()


def test_patients_of_a_site_without_an_estimate_are_said_to_have_no_part(tmp_path):
    study = changed(made(), sex=lambda row, place: "male" if row["site"] == "site-1" else row["sex"])
    asked = {"kind": "compare", "formula": "age ~ sex", "family": "gaussian", "coefficient": "sexmale"}

    found = run(asked, *write_study(tmp_path, study))

    assert found.meta.num_estimates == 2
    assert "a site without an estimate of its own is counted, and has no part in the effects" in " ".join(found.summary().split())


def test_an_outcome_of_a_logistic_model_is_0_or_1(tmp_path):
    variables, outcome, rows = made()
    study = changed(({**variables, "dose": number(0, 1)}, outcome, rows), dose=lambda row, _: str(float(row["dose"]) / 10))

    with pytest.raises(ConfigError, match="an outcome that no binomial model has: 0 and 1 are expected"):
        run({**LOGISTIC, "formula": "dose ~ age"}, *write_study(tmp_path, study))


def test_separation_by_one_number_is_told_as_such(tmp_path):
    study = changed(made(60), died=lambda row, _: str(int(float(row["age"]) > 60)))

    with pytest.raises(ConfigError, match="the outcome may be separated by a variable"):
        run({**LOGISTIC, "formula": "died ~ age"}, *write_study(tmp_path, study))


def test_one_path_instead_of_a_list_is_a_sentence(tmp_path):
    contract, sites = write_study(tmp_path, made())

    with pytest.raises(ConfigError, match=r"sites = '.*: expected a list of files"):
        run(LOGISTIC, contract, str(sites[0]))


def test_figures_on_cells_of_time_say_how_wide_these_are(tmp_path):
    contract, sites = write_study(tmp_path, made())
    asked = {"kind": "km", "formula": "Surv(days, died) ~ sex", "grid": 1}
    found = run(asked, contract, sites)
    content, words = found.as_dict(), " ".join(found.summary().split())

    assert (content["cells"]["number"], content["cells"]["agreed"]) == (len(found.table.ends_T), 2000)
    for median in content["medians"].values():
        assert median["cell"][0] < median["cell"][1] == median["median"]
        assert f"(cell from {median['cell'][0]:g} to {median['cell'][1]:g})" in words
    for about in (words, " ".join(statistics_page(content).split())):
        assert content["cells"]["about"] in about
        assert "may be far from those on exact times" in about
    assert f"10 of {len(found.table.ends_T)} cells; the others are in --csv and --json" in words

    for kind, formula in (("cox", "Surv(days, died) ~ sex"), ("compare", "Surv(days, died) ~ sex")):
        other = run({"kind": kind, "formula": formula, "grid": 1}, contract, sites)
        assert "may be far from those on exact times" in " ".join(other.summary().split())
        assert "may be far" not in run({"kind": kind, "formula": formula}, contract, sites).summary()


def test_a_quantile_in_a_cell_wider_than_the_spread_is_not_shown(tmp_path):
    variables, outcome, rows = made()
    contract, sites = write_study(tmp_path, ({**variables, "dose": number(0, 1_000_000)}, outcome, rows))
    result = run({"kind": "describe", "variables": ["dose", "age", "visits"]}, contract, sites)
    found = {each.name: each.as_dict() for each in result.variables}

    assert {found["dose"][key] for key in ("q5", "q50", "q95")} == {None}
    assert found["dose"]["mean"] == pytest.approx(5, abs=0.5)
    assert None not in (found["age"]["q50"], found["visits"]["q50"])
    assert "one whose cell is wider than the SD is not shown" in " ".join(result.summary().split())


def test_where_few_values_are_missing_nothing_says_how_many_are_there(tmp_path):
    study = changed(made(), dose=lambda row, place: "" if place < 3 else row["dose"])
    contract, sites = write_study(tmp_path, study)
    result = run({"kind": "describe", "variables": ["dose"]}, contract, sites)
    found = result.variables[0].as_dict()
    edges = result.variables[0].description.edges

    assert [found[key] for key in ("values", "missing", "mean", "sd")] == [None] * 4
    assert all(np.isclose(found[key], (edges[:-1] + edges[1:]) / 2).any() for key in ("q5", "q25", "q50", "q75", "q95"))

    fit = run({**LOGISTIC, "formula": "died ~ dose"}, contract, sites)
    content = fit.as_dict()
    assert [content[key] for key in ("patients", "rows", "missing")] == [None] * 3
    assert "237" not in fit.summary() + statistics_page(content)
    assert "235" not in fit.summary() + str(content.get("df_resid"))
