"""Several analyses about nearly the same patients: refused in one sentence, exit code 2 and nothing released, whatever came between."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from study_tables import category, changed, made, write_study

from commands import run_here
from p2pfl.analyses.policy import Policy
from p2pfl.analyses.release_log import ReleaseLog
from p2pfl.analyses.releases import recorded, with_release
from p2pfl.analyses.run import conversation
from p2pfl.analyses.site_files import load_settings, load_sites
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.stats import run
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError

AGE = ("glm", "died ~ age", "--family", "binomial")
DOSE = ("glm", "died ~ age + dose", "--family", "binomial")
ONE = 4
"""Place of a patient of site-1."""


def one_without(name):
    return changed(made(), **{name: lambda row, place: "" if place == ONE else row[name]})


def meeting_in_one():
    """A study of which any two of three variables are there for none or many patients of site-0, and all three for one of them."""
    there = {"age": (1, 2, 4, 7), "dose": (1, 3, 5, 7), "visits": (2, 3, 6, 7)}

    def kind(place):
        return 7 if place == 0 else place // 3 % 7

    def given(name):
        return lambda row, place: row[name] if row["site"] != "site-0" or kind(place) in there[name] else ""

    return changed(made(), **{name: given(name) for name in there})


class Site:
    """Simulated sites that keep logs of what they have released."""

    def __init__(self, folder, study, monkeypatch, capfd, policy=None):
        self.contract, self.sites = write_study(folder, study, policy=policy)
        self.releases, self.folder, self._patches = folder / "logs", folder, {"monkeypatch": monkeypatch, "capfd": capfd}

    def ask(self, *question, releases=True):
        log = ["--releases", self.releases] if releases else []
        return run_here("stats", *question, *self.sites, "--contract", self.contract, *log, **self._patches)

    def released(self, name="site-1"):
        with ReleaseLog(self.releases / name, self.releases / name) as log:
            return list(log.analyses)

    def show(self, *options):
        return run_here("stats", "released", self.sites[1], "--releases", self.releases, *options, **self._patches)


@pytest.fixture
def made_site(tmp_path, monkeypatch, capfd):
    return lambda study, **more: Site(tmp_path, study, monkeypatch, capfd, **more)


ATTACKS = {
    "two that differ by one patient": (lambda: one_without("dose"), [AGE, DOSE], "site-1"),
    "the other way round": (lambda: one_without("dose"), [DOSE, AGE], "site-1"),
    "a description and a model": (lambda: one_without("died"), [("describe", "--variables", "age"), AGE], "site-1"),
    "a description of a variable that many lack and a model": (
        lambda: changed(one_without("died"), dose=lambda row, place: "" if place % 8 == 3 else row["dose"]),
        [("describe", "--variables", "age,dose"), ("glm", "visits ~ dose + died", "--family", "poisson")],
        "site-1",
    ),
    "two descriptions": (
        lambda: changed(one_without("dose"), age=lambda row, place: "" if place == ONE + 3 else row["age"]),
        [("describe", "--variables", "age"), ("describe", "--variables", "age,dose", "--by", "died"), ("describe", "--variables", "dose")],
        "site-1",
    ),
    "a curve and a test": (
        lambda: one_without("stage"),
        [("km", "Surv(days, died) ~ 1", "--grid", "100"), ("compare", "Surv(days, died) ~ stage")],
        "site-1",
    ),
    "three that meet in one": (
        meeting_in_one,
        [("glm", f"died ~ {name}", "--family", "binomial") for name in ("age", "dose", "visits")],
        "site-0",
    ),
}


OFTEN = {"two that differ by one patient", "a description of a variable that many lack and a model", "three that meet in one"}


@pytest.mark.parametrize("attack", [each if each in OFTEN else pytest.param(each, marks=pytest.mark.slow) for each in ATTACKS])
def test_analyses_that_tell_one_patient_apart_are_refused(attack, made_site, caplog):
    study, questions, name = ATTACKS[attack]
    site = made_site(study())
    before = []
    for question in questions:
        assert site.ask(*question, releases=False)[0] == 0  # each alone is answered
        answers = site.ask(*question)
        if answers[0]:
            break
        before = site.released(name)

    assert answers == (2, "", f"p2pfl: {name}: refused by policy\n")
    assert f"{name} refuses: policy.patients_per_cell = 5: with what was released before, " in caplog.text
    assert "fewer than 5 patients would be told apart" in caplog.text
    assert [each.statistic for each in site.released(name)] == [each.statistic for each in before]
    assert len(before) == len(questions) - 1 or attack == "two descriptions"


def with_a_twin(places):
    """A study with a second sex, which is another one than the first for some patients."""
    variables, outcome, rows = made()
    other = {"male": "female", "female": "male"}
    twins = [row | {"sex_at_birth": other[row["sex"]] if place in places else row["sex"]} for place, row in enumerate(rows)]
    return {**variables, "sex_at_birth": category("female", "male")}, outcome, twins


@pytest.mark.parametrize("kind", ["model", pytest.param("description", marks=pytest.mark.slow)])
def test_two_variables_that_differ_in_few_patients_are_not_both_used(kind, made_site, caplog):
    def question(name):
        return ("glm", f"dose ~ {name}", "--family", "gaussian") if kind == "model" else ("describe", "--variables", "dose", "--by", name)

    site = made_site(with_a_twin([ONE]))
    assert site.ask(*question("sex"))[0] == 0

    assert site.ask(*question("sex_at_birth")) == (2, "", "p2pfl: site-1: refused by policy\n")
    assert "sex_at_birth differs from sex, of which totals have been released, in fewer than 5 patients of this site alone" in caplog.text


@pytest.mark.slow
def test_two_variables_that_differ_in_many_patients_are_both_used(made_site):
    site = made_site(with_a_twin(range(30)))

    assert [site.ask("glm", f"dose ~ {name}", "--family", "gaussian")[0] for name in ("sex", "sex_at_birth")] == [0, 0]


# cells are merged until each has so many patients: also one grid that is made of cells of the other may then end a patient later
GRIDS = [
    ((50, 51), (0, 2)),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in (((50, 200), (0, 2)), ((200, 300), (0, 2)), ((50, 50), (0, 0)))),
]


@pytest.mark.parametrize(("grids", "codes"), GRIDS)
def test_nobody_is_found_by_halving_the_cells_of_time(grids, codes, made_site, caplog):
    site = made_site(changed(made(), days=lambda row, place: "51" if place == ONE else str(25 + 50 * (place // 3 % 16))))

    assert tuple(site.ask("km", "Surv(days, died) ~ 1", "--grid", str(grid))[0] for grid in grids) == codes
    if codes[1]:
        assert "days was counted in other cells before, and fewer than 5 patients may be between their ends" in caplog.text


@pytest.mark.parametrize(
    "questions",
    [
        [("calibration", "died ~ age", "--ends", "0.4,1"), ("calibration", "died ~ age", "--ends", "0.41,1")],
        [("calibration", "died ~ age", "--ends", "0.4,1"), ("calibration", "died ~ age", "--ends", "0.4,1", "--patients-per-cell", "6")],
        [("km", "Surv(days, died) ~ 1", "--grid", "9"), ("km", "Surv(days, died) ~ 1", "--grid", "9", "--patients-per-cell", "6")],
    ],
    ids=["ends of risk", "floor of risk", "floor of time"],
)
def test_nobody_is_found_between_cells_that_are_merged_elsewhere(questions, made_site, caplog):
    site = made_site(made())
    first, second = questions
    assert [site.ask(*first)[0], site.ask(*second)[0]] == [0, 2]
    assert "before, and fewer than" in caplog.text
    assert site.ask(*first)[0] == 0


def test_nobody_is_found_by_another_contract_with_other_cells(made_site):
    site = made_site(made())
    assert site.ask("describe", "--variables", "age")[0] == 0
    site.contract.write_text(site.contract.read_text().replace("- 110\n", "- 111\n"))

    assert site.ask("describe", "--variables", "age") == (2, "", "p2pfl: site-0: refused by policy\n")


def test_nobody_is_found_by_another_contract_with_other_codes(made_site, caplog):
    site = made_site(made())
    assert site.ask("describe", "--variables", "sex")[0] == 0
    contract = yaml.safe_load(site.contract.read_text())
    categories = contract["variables"]["sex"]["categories"]
    categories = categories if isinstance(categories, dict) else {each: [each] for each in categories}
    first, second = categories
    contract["variables"]["sex"]["categories"] = {first: [*categories[first], *categories[second]], second: ["another"]}
    site.contract.write_text(yaml.safe_dump(contract, sort_keys=False))

    assert site.ask("describe", "--variables", "sex") == (2, "", "p2pfl: site-0: refused by policy\n")
    assert "sex was released with other codes in a category before" in caplog.text


@pytest.mark.slow
def test_any_two_of_the_three_that_meet_in_one_are_answered(made_site):
    site = made_site(meeting_in_one())
    for pair in (("age", "dose"), ("dose", "visits"), ("age", "visits")):
        shutil.rmtree(site.releases, ignore_errors=True)
        assert [site.ask("glm", f"died ~ {name}", "--family", "binomial")[0] for name in pair] == [0, 0]


@pytest.mark.parametrize("change", ["leaves", pytest.param("comes", marks=pytest.mark.slow)])
def test_a_patient_who_comes_or_leaves_between_two_analyses_is_not_told_apart(change, made_site):
    site = made_site(made())
    table = site.folder / "site-1.csv"
    lines = table.read_text().splitlines(keepends=True)
    if change == "comes":
        table.write_text("".join(lines[:-1]))
    assert site.ask(*AGE)[0] == 0
    table.write_text("".join(lines if change == "comes" else lines[:-1]))

    assert site.ask(*AGE) == (2, "", "p2pfl: site-1: refused by policy\n")


@pytest.mark.slow
def test_several_who_come_are_enough(made_site):
    site = made_site(made())
    table = site.folder / "site-1.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-5]))
    assert site.ask(*AGE)[0] == 0
    table.write_text("".join(lines))

    assert site.ask(*AGE)[0] == 0


def test_the_same_question_is_answered_as_often_as_it_is_asked(made_site):
    site = made_site(one_without("dose"), policy={"most_analyses": 1})
    answers = [site.ask(*DOSE) for _ in range(3)]

    assert len({*answers}) == 1
    assert answers[0][0] == 0
    assert len(site.released()) == 1


def test_common_rows_are_the_same_patients_in_all_analyses(made_site, tmp_path):
    site = made_site(one_without("dose"))
    common = ("--common", "age,dose,died", "--json")
    answers = [site.ask(*question, *common) for question in (AGE, DOSE)]
    (tmp_path / "without").mkdir()
    variables, outcome, rows = made()
    pooled = run(
        {"kind": "glm", "formula": "died ~ age", "family": "binomial"},
        *write_study(tmp_path / "without", (variables, outcome, [row for place, row in enumerate(rows) if place != ONE])),
    )

    assert [code for code, *_ in answers] == [0, 0]
    found = json.loads(answers[0][1])
    assert found["analysis"]["rows"] == "common"
    assert [each["estimate"] for each in found["coefficients"]] == pooled.params.tolist()
    assert site.ask(*AGE)[0] == 2  # all rows after all: the one who lacks a dose would be told apart


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rows": "common"}, "rows = 'common': the variables of all analyses of the study are not known; name them"),
        ({"common": ["age"]}, "common = ['age']: it counts only with rows: common"),
        ({"rows": "common", "common": ["weight"]}, "common: weight: no variable of the contract"),
    ],
)
def test_common_rows_without_their_variables_are_refused(asked, said, tmp_path):
    with pytest.raises(ConfigError) as error:
        run({"kind": "glm", "formula": "died ~ age", "family": "binomial", **asked}, *write_study(tmp_path, made()))

    assert said in str(error.value)


def test_a_variable_is_in_no_more_analyses_than_the_policy_says(made_site, caplog):
    site = made_site(made(), policy={"most_analyses": 2})
    codes = [site.ask("glm", f"died ~ {right}", "--family", "binomial")[0] for right in ("age", "age + sex", "sex", "age + dose")]

    assert codes == [0, 0, 2, 2]
    assert "policy.most_analyses = 2: died has been in 2 analyses before" in caplog.text
    assert "policy.most_analyses = 2: age has been in 2 analyses before" in caplog.text
    assert site.ask("glm", "visits ~ sex", "--family", "poisson")[0] == 0


@pytest.mark.slow
def test_numbers_about_the_same_patients_are_counted_over_all_analyses(made_site, caplog):
    site = made_site(made(75))
    rights = ("age + dose", "dose + age + visits", "age + visits", "dose + visits", "age * dose", "dose * visits", "age * visits")
    answers = [site.ask("glm", f"died ~ {right}", "--family", "binomial") for right in rights]
    alone = [site.ask("glm", f"died ~ {right}", "--family", "binomial", releases=False)[0] for right in rights]

    assert alone == [0] * len(rights)
    assert answers[0][0] == 0
    assert answers[-1] == (2, "", "p2pfl: site-0: refused by policy\n")
    assert "policy.parameters_per_patient: with " in caplog.text
    released = site.released("site-0")
    columns = {name for each in released for name in each.columns}
    assert sum(each.numbers for each in released) <= 0.33 * 75 * len(columns)


def test_rows_of_one_patient_are_not_told_apart_where_patients_have_several(tmp_path):
    variables, outcome, rows = made()
    contract, sites = write_study(tmp_path, (variables, outcome, rows))
    contract.write_text(contract.read_text() + "rows: several-per-patient\n")
    for site in sites:  # two rows of each patient
        table = site.with_suffix(".csv")
        head, *lines = table.read_text().splitlines()
        lines = [line.replace(line.split(",")[0], f"q{place // 2}", 1) for place, line in enumerate(lines)]
        if site.stem == "site-1":
            cells = lines[0].split(",")
            lines[0] = ",".join("" if name == "dose" else cell for name, cell in zip(head.split(","), cells, strict=True))
        table.write_text("\n".join([head, *lines]) + "\n")
    logistic = {"kind": "glm", "family": "binomial"}
    run({**logistic, "formula": "died ~ age"}, contract, sites, releases=tmp_path / "logs")

    with pytest.raises(ConfigError, match="site-1: refused by policy"):
        run({**logistic, "formula": "died ~ age + dose"}, contract, sites, releases=tmp_path / "logs")


# ---- the log itself


def deleted(folder):
    (folder / "log.jsonl").unlink()


def emptied(folder):
    (folder / "log.jsonl").write_bytes(b"")


def changed_byte(folder):
    content = bytearray((folder / "log.jsonl").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "log.jsonl").write_bytes(content)


def without_its_key(folder):
    (folder / "releases.key").unlink()


def without_its_last(folder):
    (folder / "releases.last").unlink()


def shorter(folder):
    lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "log.jsonl").write_bytes(b"".join(lines[:-2]))


DAMAGES = [deleted, changed_byte, *(pytest.param(each, marks=pytest.mark.slow) for each in (emptied, without_its_key, without_its_last))]


@pytest.mark.parametrize("damage", [*DAMAGES, pytest.param(shorter, marks=pytest.mark.slow)])
def test_a_log_that_was_damaged_ends_the_analysis_in_one_sentence(damage, made_site):
    site = made_site(made())
    assert site.ask(*AGE)[0] == 0
    damage(site.releases / "site-1")
    for answer in (site.ask(*AGE), site.ask("glm", "died ~ sex", "--family", "binomial"), site.show()):
        assert answer[:2] == (2, "")
        assert answer[2].count("\n") == 1
        assert str(site.releases / "site-1") in answer[2]
        assert "restore the log and its key from their newest backup" in answer[2]


def test_an_older_backup_of_the_log_alone_is_noticed(made_site):
    site = made_site(made())
    assert site.ask(*AGE)[0] == 0
    old = (site.releases / "site-1" / "log.jsonl").read_bytes()
    assert site.ask("glm", "died ~ sex", "--family", "binomial")[0] == 0
    (site.releases / "site-1" / "log.jsonl").write_bytes(old)
    code, out, err = site.ask(*DOSE)

    assert (code, out) == (2, "")
    assert "lacks what was released last, as one from an older backup does" in err


def test_an_analysis_is_in_the_log_before_its_first_numbers_are_there(tmp_path):
    contract, sites = write_study(tmp_path, made())
    agreed = Contract.load(contract)
    spec, site = AnalysisSpec.from_mapping({"kind": "describe"}), load_sites(sites, agreed)[0]
    analysis, rows_of = conversation(spec, agreed)
    with ReleaseLog(tmp_path / "log", tmp_path / "keys") as log:
        rows = with_release(log, spec, agreed, site.table, rows_of(site.table))
        request = next(recorded(spec, analysis))
        assert ReleaseLog(tmp_path / "log", tmp_path / "keys").look().analyses == []
        request.contribution(rows)

        assert [each.name for each in ReleaseLog(tmp_path / "log", tmp_path / "keys").look().analyses] == ["describe all variables"]


def test_the_log_has_no_patient_in_clear_and_is_its_owners_alone(made_site):
    site = made_site(made())
    site.ask(*AGE)
    files = [path for path in site.releases.rglob("*") if path.is_file()]

    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in site.releases.iterdir()} == {0o700}
    assert len(files) == 9
    assert not any(b'"p1"' in path.read_bytes() for path in files)
    (site.releases / "site-1").chmod(0o755)
    assert "others may use the folder; run: chmod 700" in site.ask(*AGE)[2]


def test_a_floor_that_fails_on_the_total_counts_as_released(made_site):
    site = made_site(changed(made(), sex=lambda _, place: "male" if place == ONE else "female"))

    assert site.ask("glm", "died ~ sex", "--family", "binomial")[0] == 2
    assert [each.name for each in site.released()] == ["glm died ~ sex, binomial"]


def test_a_refusal_of_one_site_is_in_nobodys_log(made_site):
    site = made_site(made())
    site.sites[2].write_text(site.sites[2].read_text() + "policy: {variables: [age]}\n")

    assert site.ask(*AGE)[0] == 2
    assert not site.releases.exists()


def test_the_log_is_shown_in_80_columns_and_as_json(made_site):
    site = made_site(made(), policy={"most_analyses": 9})
    assert site.show() == (0, "site-1: nothing has been released.\n", "")
    site.ask(*AGE)
    site.ask("describe", "--by", "stage")
    code, out, err = site.show()
    found = json.loads(site.show("--json")[1])

    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "1. glm died ~ age, binomial" in out
    assert "simulated sites: 80 patients, " in out
    assert "\nage       2 of 9\n" in out
    assert [each["analysis"] for each in found["analyses"]] == ["glm died ~ age, binomial", "describe all variables by stage"]
    assert [each["patients"] for each in found["analyses"]] == [80, 80]
    assert found["analyses"][0]["numbers"] > found["analyses"][1]["numbers"] > 0
    assert (found["patients"], found["most_analyses"], found["analyses_of_variables"]["age"]) == (80, 9, 2)


@pytest.mark.slow
def test_a_small_site_counts_with_all_of_its_patients_or_with_none(made_site):
    variables, outcome, rows = one_without("dose")
    few = [row for place, row in enumerate(rows) if row["site"] != "site-1" or place in (1, ONE, 7)]
    site = made_site((variables, outcome, few))

    assert site.ask(*AGE)[0] == 0
    assert site.ask(*DOSE)[0] == 2
    assert site.ask("glm", "died ~ sex", "--family", "binomial")[0] == 0


def test_a_policy_without_a_limit_counts_nothing():
    assert Policy().most_analyses is None


def test_a_sites_file_says_the_limit(tmp_path):
    _, sites = write_study(tmp_path, made(), policy={"most_analyses": 3})
    assert load_settings(sites[0]).policy.most_analyses == 3
    sites[0].write_text(sites[0].read_text().replace("3", "0"))
    with pytest.raises(ConfigError, match="most_analyses = 0"):
        load_settings(sites[0])


def test_an_atom_is_of_all_sets_together():
    from p2pfl.analyses.released_rows import fewest_in_atom, tells_few_apart

    sets_NS = np.array([[1, 1, 1], *[[1, 1, 0], [0, 1, 1], [1, 0, 1]] * 5, *[[0, 0, 0]] * 4], dtype=np.uint16)

    assert [fewest_in_atom(sets_NS[:, pair]) for pair in ([0, 1], [1, 2], [0, 2])] == [5, 5, 5]
    assert fewest_in_atom(sets_NS) == 1
    assert tells_few_apart(sets_NS, 5)
    assert not tells_few_apart(sets_NS[1:], 5)
    assert not tells_few_apart(sets_NS[:0], 5)
