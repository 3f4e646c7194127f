"""`p2pfl stats` as people and machines meet it: tables of 80 columns, JSON, CSV, and the same from Python."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
from study_tables import category, changed, made, stays, write_study

import p2pfl
from commands import run_here
from p2pfl.analyses.policy import Policy
from p2pfl.yaml_files import check, parse_yaml

LONG = "the_length_of_stay_in_intensive_care_after_surgery"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    variables, outcome, rows = made(300)
    variables = {**variables, LONG: category("never", "at least once, and for longer than a week")}
    study = variables, outcome, [row | {LONG: tuple(variables[LONG]["categories"])[place % 2]} for place, row in enumerate(rows)]
    return write_study(tmp_path_factory.mktemp("files"), changed(study, dose=lambda row, place: "" if place < 7 else row["dose"]))


@pytest.fixture
def asked(files, monkeypatch, capfd):
    def ask(*arguments):
        contract, sites = files
        return run_here("stats", *arguments, *sites, "--contract", contract, monkeypatch=monkeypatch, capfd=capfd)

    return ask


QUESTIONS = {
    "describe": ["describe"],
    "describe groups": ["describe", "--by", "stage"],
    "linear": ["glm", "dose ~ age + stage", "--family", "gaussian"],
    "logistic": ["glm", f"died ~ age + dose + stage + {LONG}", "--family", "binomial", "--level", "0.9"],
    "calibration": ["calibration", "died ~ age + dose"],
    "gamma": ["glm", "days ~ dose", "--family", "gamma"],
    "cox": ["cox", f"Surv(days, died) ~ age + {LONG}", "--ties", "breslow"],
    "cox on a grid": ["cox", "Surv(days, died) ~ age * sex", "--grid", "60"],
    "km": ["km", f"Surv(days, died) ~ {LONG}", "--ends", "50,100,200,400,2000"],
    "log-rank": ["compare", "Surv(days, died) ~ stage"],
    "log-rank on a grid": ["compare", "Surv(days, died) ~ stage", "--grid", "60"],
    "meta": ["compare", "died ~ age + sex", "--family", "binomial", "--coefficient", "age"],
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_table_for_people_has_80_columns_and_one_for_machines_all_digits(question, asked, tmp_path):
    code, out, err = asked(*QUESTIONS[question])
    coded, printed, warned = asked(*QUESTIONS[question], "--json", "--csv", str(tmp_path / "out.csv"))

    assert (code, err, coded, warned) == (0, "", 0, "")
    assert max(map(len, out.splitlines())) <= 80
    found = json.loads(printed)
    assert found["analysis"]["kind"] == QUESTIONS[question][0]
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    if question == "logistic":
        assert [float(row["estimate"]) for row in rows] == [each["estimate"] for each in found["coefficients"]]
        assert (found["patients"], found["missing"]) == (293, 7)
        assert "293 patients; rows left out for missing values: 7" in out
        assert "90 % from" in out
        assert "odds ratio" in out


def test_a_file_that_exists_is_not_written_over(asked, tmp_path):
    (tmp_path / "out.csv").write_text("mine")
    code, out, err = asked("describe", "--csv", str(tmp_path / "out.csv"))

    assert (code, out) == (2, "")
    assert "it exists already; expected a new file" in err
    assert (tmp_path / "out.csv").read_text() == "mine"


def test_ends_that_are_no_numbers_are_refused(asked):
    assert asked("km", "Surv(days, died) ~ 1", "--ends", "50;100")[::2] == (
        2,
        "p2pfl: --ends = '50;100': expected numbers with commas between them, such as 90,210,300\n",
    )


def test_python_gives_what_the_command_prints(files, asked):
    contract, sites = files
    fit = p2pfl.stats.glm("died ~ age + sex", family="binomial", contract=contract, sites=sites)
    printed = json.loads(asked("glm", "died ~ age + sex", "--family", "binomial", "--json")[1])["coefficients"]

    assert fit.names == ("(Intercept)", "age", "sexmale")
    assert [each["estimate"] for each in printed] == fit.params.tolist()
    assert [each["se"] for each in printed] == fit.bse.tolist()
    assert [each["p"] for each in printed] == fit.pvalues.tolist()
    assert [[each["low"], each["high"]] for each in printed] == fit.conf_int().tolist()
    assert fit.conf_int(0.5)[1, 0] > fit.conf_int()[1, 0]
    assert fit.summary().splitlines()[0] == "died ~ age + sex, family binomial"


def test_few_rows_with_missing_values_are_not_counted_out(tmp_path):
    study = changed(made(), dose=lambda row, place: "" if place < 3 else row["dose"])
    contract, sites = write_study(tmp_path, study)
    fit = p2pfl.stats.glm("died ~ dose", family="binomial", contract=contract, sites=sites)

    assert fit.as_dict()["missing"] is None
    assert "rows left out for missing values: <5" in fit.summary()


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_page_is_written_for_every_analysis(question, asked, tmp_path):
    assert asked(*QUESTIONS[question], "--html", str(tmp_path / "page.html"))[0] == 0

    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == {"calibration": 2}.get(question, not question.startswith(("log-rank", "describe")))


@pytest.mark.parametrize(("num_allowing", "num_shown"), [(5, 5), (4, 0), (3, 0), (2, 2), (0, 0)])
def test_a_sites_estimate_is_shown_where_its_policy_says_so_and_none_follows_from_the_others(num_allowing, num_shown, tmp_path):
    contract, sites = write_study(tmp_path, made(num_sites=5))
    for site in sites[:num_allowing]:
        site.write_text(site.read_text() + "policy: {may_release: [site_estimates]}\n")

    found = p2pfl.stats.compare("dose ~ age", family="gaussian", coefficient="age", contract=contract, sites=sites)

    assert [name for name, *_ in found.sites] == [f"site-{place}" for place in range(num_shown)]
    assert [each["name"] for each in found.as_dict()["sites"]] == [name for name, *_ in found.sites]
    if num_shown == 5:
        weights = [1 / error**2 for *_, error in found.sites]
        fixed = sum(weight * value for weight, (_, value, _) in zip(weights, found.sites, strict=True)) / sum(weights)
        assert found.meta.fixed == pytest.approx(fixed, rel=1e-12)
        assert "site-4" in found.summary()


def test_the_manual_shows_what_the_command_prints(tmp_path, monkeypatch, capfd):
    page = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text(encoding="utf-8")
    command = next(line for line in page.splitlines() if line.startswith("p2pfl stats glm"))
    printed = re.search(r"```text\n(los ~ .*?)```", page, re.DOTALL)[1]
    write_study(tmp_path, stays())
    monkeypatch.chdir(tmp_path)

    assert run_here(*shlex.split(command)[1:], monkeypatch=monkeypatch, capfd=capfd) == (0, printed, "")


def test_the_manual_shows_the_default_policy():
    page = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text(encoding="utf-8")
    site = parse_yaml(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1], "docs")

    assert check(Policy, site["policy"], "docs") == Policy()
