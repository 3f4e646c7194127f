"""Analyses that give no result: each for one reason, in one sentence, with exit code 2 and nothing released."""

from __future__ import annotations

import pytest
from study_tables import category, changed, integer, made, write_study

from commands import run_here
from p2pfl.analyses.policy import RefusedByPolicy
from p2pfl.analyses.site_files import load_settings, load_sites
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.stats import run
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.yaml_files import dump_yaml

POLICY_KEYS = "patients_per_cell, patients_per_sum, parameters_per_patient, cells, analyses, may_release, most_analyses, variables"
STRICT = {"patients_per_cell": 7, "cells": "site", "parameters_per_patient": 0.1}
LOGISTIC = {"kind": "glm", "formula": "died ~ age + sex", "family": "binomial"}
LINEAR = {"kind": "glm", "formula": "dose ~ age", "family": "gaussian"}
COX = {"kind": "cox", "formula": "Surv(days, died) ~ age + sex"}
GROUPS = {"kind": "compare", "formula": "Surv(days, died) ~ sex"}


def separated(study):
    return changed(study, died=lambda row, _: str(int(float(row["age"]) > 60)))


def first_missing(study, name, site="site-1"):
    return changed(study, **{name: lambda row, _: "" if row["site"] == site else row[name]})


def two_deaths(study):
    return changed(study, died=lambda row, place: str(int(row["sex"] == "male" and place in (1, 5, 9)) or int(row["sex"] == "female")))


STUDIES = {
    "separation": (separated, LOGISTIC, "the outcome is separated by (Intercept), age, sexmale: their coefficients have no end"),
    "one outcome": (lambda study: changed(study, died=lambda *_: "0"), LOGISTIC, "died: no complete row of any site has '1': there"),
    "separated events": (
        lambda study: changed(study, died=lambda *_: "1", days=lambda row, _: str(int(2000 - 10 * float(row["age"])))),
        {**COX, "formula": "Surv(days, died) ~ age"},
        "the coefficients grew beyond all numbers: a column is far too large, or the outcome is separated",
    ),
    "collinearity": (lambda study: changed(study, dose=lambda row, _: f"{float(row['age']) / 11}"),
                     {**LOGISTIC, "formula": "died ~ age + dose"}, "age, dose depend on each other"),
    "a category that nobody has": (lambda study: changed(study, stage=lambda row, _: "one" if row["stage"] == "two" else row["stage"]),
                                   {**LOGISTIC, "formula": "died ~ stage"}, "stage: no complete row of any site has 'two'"),
    "a constant number": (lambda study: changed(study, dose=lambda *_: "3"), {**LOGISTIC, "formula": "died ~ dose"},
                          "dose is the same in all rows and tells nothing: leave it out"),
    "all values missing at a site": (lambda study: first_missing(study, "dose"), LOGISTIC,
                                     "site-1.csv: dose: no row has a value: the contract refuses a site without it: 80 rows, refused"),
    "few patients in a cell": (two_deaths, LOGISTIC, "a combination of died and sex has fewer than 5 patients, and patients_per_cell is 5"),
    "few patients in all": (lambda study: (study[0], study[1], study[2][:9]), {**LOGISTIC, "formula": "died ~ 1"},
                            "fewer than 10 patients have a complete row, and patients_per_sum is 10"),
    "many coefficients": (lambda study: (study[0], study[1], study[2][:12]), {**LOGISTIC, "formula": "visits ~ age + dose + sex",
                          "family": "poisson"}, "4 coefficients from 12 patients: fewer than 0.33 for each are needed"),
    "many numbers": (lambda study: (study[0], study[1], study[2][:60]),
                     {**LOGISTIC, "formula": "visits ~ age * dose * sex", "family": "poisson", "patients_per_cell": 5},
                     "the iterations would release 180 numbers about the same patients, and 158 are the most: use fewer variables"),
    "no event": (lambda study: changed(study, died=lambda *_: "0"), COX, "no site has an event: there is nothing to fit"),
    "a time of 0": (lambda study: changed(study, days=lambda row, place: "0" if place == 4 else row["days"]), COX,
                    "site-1: days is 0 or less in some rows: whoever"),
    "one group": (lambda study: changed(study, sex=lambda *_: "male"), {**GROUPS, "grid": 100}, "sex: a log-rank test needs two groups"),
    "few patients in a group": (lambda study: changed(study, sex=lambda row, place: "male" if place < 3 else "female"),
                                {**GROUPS, "grid": 100}, "fewer than 5 patients in a group: no grid hides them"),
    "no group": (lambda study: study, {**GROUPS, "formula": "Surv(days, died) ~ age"}, "formula: age makes no groups"),
    "no logarithm": (lambda study: changed(study, dose=lambda row, place: "0" if place == 4 else row["dose"]),
                     {**LOGISTIC, "formula": "died ~ log(dose)"}, "site-1: log(dose) is no number in some rows of this site"),
    "an outcome without scatter": (lambda study: changed(study, dose=lambda *_: "3"), LINEAR,
                                   "the outcome has no scatter around the model"),
    "an outcome that follows": (lambda study: changed(study, dose=lambda row, _: f"{float(row['age']) / 16}"), LINEAR,
                                "the outcome has no scatter around the model"),
    "an outcome without scatter at any site": (
        lambda study: changed(study, dose=lambda *_: "3"),
        {**LOGISTIC, "kind": "compare", "formula": "dose ~ sex", "family": "gaussian", "coefficient": "sexmale"},
        "0 sites have an estimate",
    ),
    "no such coefficient": (lambda study: study, {**LOGISTIC, "kind": "compare", "coefficient": "sexmale2"},
                            "coefficient = 'sexmale2': expected one of (Intercept), age, sexmale"),
}  # fmt: skip


@pytest.mark.parametrize("case", STUDIES)
def test_rows_that_allow_no_answer_give_one_sentence_and_no_file(case, tmp_path, monkeypatch, capfd):
    change, asked, sentence = STUDIES[case]
    contract, sites = write_study(tmp_path, change(made()))
    options = [f"--{key.replace('_', '-')}={value}" for key, value in asked.items() if key not in ("kind", "formula")]

    code, out, err = run_here(
        "stats", asked["kind"], asked["formula"], *sites, "--contract", contract, *options, "--csv", tmp_path / "out.csv", "--json",
        monkeypatch=monkeypatch, capfd=capfd,
    )  # fmt: skip

    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()


def test_a_site_without_a_column_is_named(tmp_path, monkeypatch, capfd):
    contract, sites = write_study(tmp_path, made())
    table = tmp_path / "site-2.csv"
    table.write_text(table.read_text().replace("dose", "menge", 1))

    code, out, err = run_here("stats", "describe", *sites, "--contract", contract, monkeypatch=monkeypatch, capfd=capfd)

    assert (code, out) == (2, "")
    assert "site-2.csv: the header lacks dose: say in table.columns what the column is called" in err


def test_all_faults_of_several_sites_come_at_once(tmp_path):
    contract, sites = write_study(tmp_path, made())
    sites[0].write_text("table: {file: nowhere.csv}\npolicy: {patients_per_cel: 3}\ntabel: 3\n")
    sites[1].write_text("table: {file: nowhere.csv}\n")

    with pytest.raises(ConfigError) as error:
        load_sites(sites, Contract.load(contract))

    assert [each.partition(".yaml")[2] or each.partition("nowhere")[2] for each in error.value.findings] == [
        ": tabel = 3: unknown key, did you mean table? one of member, table, policy, contract, cohort, keys, state",
        f": policy.patients_per_cel = 3: unknown key, did you mean patients_per_cell? one of {POLICY_KEYS}",
        ".csv: no such file",
    ]


def test_two_sites_of_one_name_are_refused(tmp_path):
    contract, sites = write_study(tmp_path, made())
    sites[0].write_text(dump_yaml({"member": "site-1", "table": {"file": "site-0.csv"}}))

    with pytest.raises(ConfigError, match="another site has the name site-1 already"):
        load_sites(sites, Contract.load(contract))


POLICIES = {
    "cells": ({"patients_per_cell": 6}, LOGISTIC, "policy.patients_per_cell = 6: the analysis asks for 5"),
    "sums": ({"patients_per_sum": 50}, LOGISTIC, "policy.patients_per_sum = 50: the analysis asks for 10"),
    "parameters": ({"parameters_per_patient": 0.1}, LOGISTIC, "policy.parameters_per_patient = 0.1: the analysis asks for 0.33"),
    "kinds": ({"analyses": ["describe", "km"]}, LOGISTIC, "policy.analyses = [describe, km]: the analysis is glm"),
    "variables": ({"variables": ["age", "died"]}, LOGISTIC, "policy.variables: the analysis uses sex, which it does not list"),
    "cells at the site": ({"cells": "site"}, LOGISTIC, "policy.cells = 'site': the analysis counts its cells over all sites"),
}


@pytest.mark.parametrize("case", POLICIES)
def test_a_policy_refuses_with_its_line_in_the_sites_log_and_nothing_but_that_to_others(case, tmp_path, caplog):
    policy, asked, line = POLICIES[case]
    contract, sites = write_study(tmp_path, made())
    sites[1].write_text(dump_yaml({"table": {"file": "site-1.csv"}, "policy": policy}))

    with pytest.raises(RefusedByPolicy) as refused:
        run(asked, contract, sites)

    assert str(refused.value) == "site-1: refused by policy"
    assert [record.getMessage() for record in caplog.records] == [f"site-1 refuses: {line}"]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (LOGISTIC, "policy.patients_per_cell: a combination of died and sex has fewer than 5 patients of this site"),
        ({"kind": "km", "formula": "Surv(days, died) ~ 1", "grid": 20},
         "policy.patients_per_cell: a cell of time has fewer than 5 patients of this site: agree on other ends"),
        ({"kind": "describe", "variables": ["sex", "died"]},
         "policy.patients_per_cell: a cell of died has fewer than 5 patients of this site"),
    ],
    ids=["glm", "km", "describe"],
)  # fmt: skip
def test_cells_that_are_small_at_one_site_alone_are_kept_there_where_sites_hold_them(asked, line, tmp_path, caplog):
    study = changed(made(), died=lambda row, place: str(int(place in (1, 4, 7))) if row["site"] == "site-1" else row["died"])
    contract, sites = write_study(tmp_path, study)
    assert run(asked, contract, sites)

    with pytest.raises(RefusedByPolicy, match=r"site-\d: refused by policy$"):
        run({**asked, "cells": "site"}, contract, sites)

    assert line in caplog.records[-1].getMessage()


def test_an_analysis_may_be_stricter_than_the_policies(tmp_path):
    contract, sites = write_study(tmp_path, made(), policy={**STRICT, "variables": ["died", "age", "sex"]})

    found = run({**LOGISTIC, "patients_per_cell": 7, "cells": "site", "parameters_per_patient": 0.1}, contract, sites)

    assert found.params == pytest.approx(run(LOGISTIC, *write_study(tmp_path, made())).params, rel=1e-12)


def faults(contract, **asked):
    with pytest.raises(ConfigError) as error:
        AnalysisSpec.from_mapping(asked).check(contract)
    return list(error.value.findings)


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreed")
    variables, outcome, rows = made(9)
    variables = {**variables, "code": {"type": "id"}, "ward": integer(1, 30), "outcome3": category("a", "b", "c")}
    write_study(folder, (variables, outcome, rows))
    return Contract.load(folder / "contract.yaml")


@pytest.mark.parametrize(
    ("asked", "findings"),
    [
        ({"kind": "glm"}, ["formula: required for glm, such as 'died ~ age + sex'"]),
        ({"kind": "mean"}, ["kind = 'mean': one of 'describe', 'glm', 'calibration', 'mixed', 'cox', 'km' or 'compare'"]),
        ({"kind": "glm", "formula": "died ~ age"}, ["family: required, one of gaussian, binomial, poisson"]),
        ({"kind": "glm", "formula": "died ~ ages + sec + code", "family": "binomial"}, [
            "formula: ages: no variable of the contract; did you mean age? expected one of patient, age, dose, sex, stage, died",
            "formula: sec: no variable of the contract; did you mean sex? expected one of patient, age, dose, sex, stage, died, visits",
            "formula: code is of type id, which no model takes",
        ]),
        ({"kind": "glm", "formula": "age ~ died", "family": "binomial"},
         ["formula: age is of type number with range [18, 110]; an outcome of family binomial has numbers with range [0, 1], or two"]),
        ({"kind": "glm", "formula": "outcome3 ~ age", "family": "binomial"},
         ["formula: outcome3 is of type category; an outcome of family binomial has numbers with range [0, 1], or two"]),
        ({"kind": "glm", "formula": "sex ~ age", "family": "poisson"},
         ["formula: sex is of type category; an outcome of family poisson has a number with a range from 0 on"]),
        ({"kind": "glm", "formula": "age ~ log(sex) + offset(stage) + age", "family": "gaussian"}, [
            "formula: log(sex): sex has categories, and a number is needed",
            "formula: age is the outcome, and stands on the right side as well",
            "formula: stage: stage has categories, and a number is needed",
        ]),
        ({"kind": "glm", "formula": "Surv(days, died) ~ age", "family": "binomial"},
         ["formula = 'Surv(days, died) ~ age': glm has one outcome; Surv(time, event) is for cox, km and compare"]),
        ({"kind": "cox", "formula": "died ~ age"},
         ["formula = 'died ~ age': expected Surv(time, event) on the left side, such as 'Surv(days, event) ~ age + sex'"]),
        ({"kind": "cox", "formula": "Surv(sex, visits) ~ age"}, [
            "formula: sex is of type category; expected a number, the time until the event or the last visit",
            "formula: visits is no event: expected whole numbers with range [0, 1], or two categories, the second the event",
        ]),
        ({"kind": "cox", "formula": "Surv(days, died) ~ age", "grid": 30, "strata": "site"},
         ["strata = 'site': each site has its own exact times; leave the grid out, or say strata: none"]),
        ({"kind": "cox", "formula": "Surv(days, died) ~ age", "strata": "none"},
         ["grid: required, the width of a cell of time, such as 30: one curve for all sites needs times that all agree on"]),
        ({"kind": "cox", "formula": "Surv(days, died) ~ age", "grid": 0.01},
         ["grid = 0.01: more than 20000 cells up to 2000, the contract's last time; expected wider ones"]),
        ({"kind": "km", "formula": "Surv(days, died) ~ sex", "ends": [100, 50]}, ["ends = [100.0, 50.0]: expected times that increase"]),
        ({"kind": "calibration", "formula": "died ~ age", "ends": [0.4, 0.2, 1]}, ["ends = [0.4, 0.2, 1.0]: expected risks that increase"]),
        ({"kind": "km", "formula": "Surv(days, died) ~ sex", "ends": [100, 500]},
         ["ends = [100.0, 500.0]: days goes up to 2000 in the contract; expected a last end there"]),
        ({"kind": "km", "formula": "Surv(days, died) ~ sex + stage", "grid": 30},
         ["formula = 'Surv(days, died) ~ sex + stage': km has one variable of groups on the right side, or 1 for none"]),
        ({"kind": "cox", "formula": "Surv(days, died) ~ 0 + sex"},
         ["formula = 'Surv(days, died) ~ 0 + sex': a Cox model has no intercept that could be left out"]),
        ({"kind": "cox", "formula": "Surv(days, died) ~ sex", "family": "binomial"},
         ["family = 'binomial': cox has none; it belongs to glm, compare",
          "family = 'binomial': it counts only where the outcome is one variable"]),
        ({"kind": "compare", "formula": "age ~ sex", "family": "gaussian"},
         ["coefficient: required: which coefficient of the sites' own models is compared"]),
        ({"kind": "describe", "variables": ["agee", "code"]}, [
            "variables: agee: no variable of the contract; did you mean age? expected one of patient, age, dose, sex, stage, died, visits",
            "variables: code is of type id: each value is one patient",
        ]),
        ({"kind": "describe", "by": "age"},
         ["by: age makes no groups: expected categories, or whole numbers with a range of at most 20 values"]),
        ({"kind": "describe", "variables": ["sex"], "by": "sex"}, ["by = 'sex': it is described as well"]),
        ({"kind": "glm", "formula": "died ~ age", "family": "binomial", "by": "sex"}, ["by = 'sex': glm has none; it belongs to describe"]),
        ({"kind": "describe", "patients_per_cell": 0, "level": 1, "cells": "mine", "where": "age > 40"}, [
            "patients_per_cell = 0: must be >= 1",
            "cells = 'mine': one of 'total' or 'site'",
            "level = 1: must be < 1",
            "where = 'age > 40': unknown key, ",
        ]),
    ],
)  # fmt: skip
def test_an_analysis_that_the_contract_does_not_allow_has_every_fault_named(asked, findings, agreed):
    found = faults(agreed, **asked)

    assert len(found) == len(findings)
    assert [each for each, wanted in zip(found, findings, strict=True) if not each.startswith(wanted)] == []


@pytest.mark.parametrize(
    "formula",
    [
        "died ~ __import__('os').system('touch seen')",
        "died ~ age; open('seen', 'w')",
        "died ~ I(age == 41)",
        "died ~ (age == 41)",
        "died ~ age[1]",
        "died ~ eval(age)",
        "died ~ Q('age')",
        "died ~ C(sex, levels=['male'])",
        "died ~ `age`",
        "died ~ {age}",
        "died ~ age.__class__",
        "died ~ read_csv(age)",
        "died ~ age | sex",
        "died ~ age % 2",
        "died ~ age / 0",
        "died ~ 41",
        "died ~ age ^ 41",
        "died ~ exp(exp(age))",
        "died ~ .",
        "age > 40 ~ sex",
        "log(died) ~ age",
        "died ~ lambda: 0",
        "died ~ age\n'''",
    ],
)
def test_a_formula_that_would_run_or_select_something_is_refused_in_one_sentence(formula, agreed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert len(faults(agreed, kind="glm", formula=formula, family="binomial")) == 1
    assert not (tmp_path / "seen").exists()


def test_a_contract_with_several_rows_of_a_patient_is_counted_by_patient(tmp_path):
    study = made(60)
    contract, sites = write_study(tmp_path, study)
    contract.write_text(contract.read_text() + "rows: several-per-patient\n")
    for place, site in enumerate(sites):
        table = site.with_suffix(".csv")
        header, *rows = table.read_text().splitlines()
        twice = [f"q{place}-{number // 10},{row.partition(',')[2]}" for number, row in enumerate(rows)]
        table.write_text("\n".join([header, *twice]) + "\n")

    with pytest.raises(ConfigError, match="fewer than 10 patients have a complete row"):
        run(LOGISTIC, contract, sites)
    with pytest.raises(ConfigError, match="km counts patients by their rows, and the contract has rows: several-per-patient"):
        run({"kind": "km", "formula": "Surv(days, died) ~ 1", "grid": 30}, contract, sites)


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        ({"member": "a: b"}, "member = 'a: b': expected 1 to 64 of A-Z a-z 0-9"),
        ({"member": 7}, "member = 7: expected 1 to 64 of A-Z a-z 0-9"),
        ({"table": "registry.csv"}, "table: expected a mapping (key: value), such as {file: registry.csv}"),
        ({"table": {"file": "x.csv", "query": "SELECT"}}, "table.query = 'SELECT': unknown key"),
        ({"policy": 5}, "policy = 5: expected a mapping, such as {patients_per_cell: 5}"),
        ({"policy": {5: 3}}, "policy: the key 5: expected a text"),
        ({"policy": {"cells": "mine"}}, "policy.cells = 'mine': "),
        ({"policy": {"may_release": ["rows"]}}, "policy.may_release.0 = 'rows': one of 'site_estimates'"),
    ],
)
def test_a_fault_of_a_sites_file_names_its_key(content, finding, tmp_path):
    (tmp_path / "site.yaml").write_text(dump_yaml({"table": {"file": "x.csv"}} | content))

    with pytest.raises(ConfigError) as error:
        load_settings(tmp_path / "site.yaml")

    assert len(error.value.findings) == 1
    assert error.value.findings[0].startswith(finding)
