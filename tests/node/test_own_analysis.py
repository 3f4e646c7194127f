"""Analyses between the members of a study: the bits of simulated sites, or one sentence at each member and no result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from study_tables import made, write_study

from commands import start_command
from networks import averaging
from p2pfl.analyses import stats
from p2pfl.analyses.policy import RefusedByPolicy
from p2pfl.errors import ConfigError, MembersMissing, P2PFLError
from p2pfl.launcher.founding import found_network
from p2pfl.node.own_analysis import analyse_together
from p2pfl.node.own_sums import memory_of
from p2pfl.node.site import SiteFile
from p2pfl.yaml_files import dump_yaml, load_yaml

DEADLINE_S = 60.0
LOGISTIC = {"kind": "glm", "formula": "died ~ age + sex", "family": "binomial"}
ANALYSES = {
    "glm": LOGISTIC,
    "describe": {"kind": "describe", "by": "stage", "patients_per_sum": 80},
    "cox": {"kind": "cox", "formula": "Surv(days, died) ~ age + sex"},
    "cox on a grid": {"kind": "cox", "formula": "Surv(days, died) ~ age + sex", "grid": 25},
    "km": {"kind": "km", "formula": "Surv(days, died) ~ sex", "grid": 50},
    "compare": {"kind": "compare", "formula": "dose ~ age + sex", "family": "gaussian", "coefficient": "age"},
    "calibration": {"kind": "calibration", "formula": "died ~ age + sex"},
    "curves": {"kind": "glm", "formula": "days ~ poly(age, 2) + spline(dose, 2, 5, 8)", "family": "gamma"},
    "mixed": {"kind": "mixed", "formula": "dose ~ age + sex"},
    "theta": {"kind": "glm", "formula": "visits ~ dose", "family": "negative-binomial", "theta": 4},
}
SLOW = {"cox", "cox on a grid", "km", "compare", "calibration", "curves", "mixed", "theta"}


class Institutions:
    """Three members of a study with a table, a policy and the contract each; files as in real life."""

    def __init__(self, folder, stack):
        self.folder, self.contract = folder, folder / "contract.yaml"
        study = found_network(averaging({"name": "path"}, 3), folder, stack, {})
        write_study(folder, made(num_sites=3))
        self.sites = [folder / "sites" / name / "site.yaml" for name in study.names]
        for place, site in enumerate(self.sites):
            (folder / f"site-{place}.csv").rename(site.with_name("registry.csv"))
            self.change(place, table={"file": "registry.csv"})

    def change(self, place, **keys):
        self.sites[place].write_text(dump_yaml({**load_yaml(self.sites[place]), **keys}))

    def written(self, asked, name="analysis.yaml", contract="contract.yaml"):
        path = self.folder / name
        path.write_text(dump_yaml({**asked, "contract": contract}))
        return path

    def found(self, *analyses, **settings):
        """What each member finds: a result or an error."""

        def found(analysis, site):
            try:
                return analyse_together(analysis, site, **{"patience_s": DEADLINE_S, "presence_s": 0.2, **settings})
            except P2PFLError as error:
                return error

        with ThreadPoolExecutor(3) as threads:
            return list(threads.map(found, analyses if len(analyses) > 1 else analyses * 3, self.sites))

    def num_totals(self):
        return len([path for site in self.sites for path in (memory_of(SiteFile.load(site)) / "totals").glob("*/*")])


@pytest.fixture
def institutions(tmp_path):
    with ExitStack() as stack:
        yield Institutions(tmp_path, stack)


@pytest.mark.parametrize("name", [pytest.param(each, marks=pytest.mark.slow) if each in SLOW else each for each in ANALYSES])
def test_members_have_the_bits_of_simulated_sites(name, institutions):
    for place in range(3) if name == "mixed" else ():
        institutions.change(place, policy={"may_release": ["site_means"]})
    found = institutions.found(institutions.written(ANALYSES[name]))

    expected = stats.run(ANALYSES[name], institutions.contract, institutions.sites)
    assert [json.dumps(each.as_dict()) for each in found] == [json.dumps(expected.as_dict())] * 3, found


def test_a_site_whose_policy_refuses_names_the_line_to_itself_alone_and_nobody_has_a_total(institutions, caplog):
    institutions.change(1, policy={"patients_per_cell": 8})
    found = institutions.found(institutions.written(LOGISTIC))

    assert isinstance(found[1], RefusedByPolicy)
    assert str(found[1]) == "node-1: refused by policy"
    assert [str(each) for each in found[::2]] == [
        "node-1: gives no numbers to glm; died ~ 1 + age + sex; binomial: patients and rows: there is no result"
    ] * 2
    assert {type(each) for each in found[::2]} == {ConfigError}
    assert "node-1 refuses: policy.patients_per_cell = 8: the analysis asks for 5" in caplog.text
    assert institutions.num_totals() == 0


def test_exact_times_are_refused_under_the_default_floors_and_the_lines_stay_at_home(institutions, caplog):
    institutions.change(0, policy={"patients_per_cell": 1, "patients_per_sum": 1})
    institutions.change(2, policy={"patients_per_cell": 1, "patients_per_sum": 1})
    asked = {**ANALYSES["cox on a grid"], "grid": 1, "patients_per_cell": 1, "patients_per_sum": 1}
    found = institutions.found(institutions.written(asked))

    assert [type(each) for each in found] == [ConfigError, RefusedByPolicy, ConfigError]
    assert "policy" not in " ".join(str(each) for each in found[::2])
    assert [record.getMessage() for record in caplog.records if "refuses" in record.getMessage()] == [
        "node-1 refuses: policy.patients_per_cell = 5: the analysis asks for 1",
        "node-1 refuses: policy.patients_per_sum = 10: the analysis asks for 1",
    ]
    assert institutions.num_totals() == 0


def test_small_cells_of_one_site_are_refused_by_it_alone(institutions):
    found = institutions.found(institutions.written({**LOGISTIC, "patients_per_cell": 25, "cells": "site"}))

    assert {str(each) for each in found if isinstance(each, RefusedByPolicy)} <= {f"node-{place}: refused by policy" for place in range(3)}
    assert any(isinstance(each, RefusedByPolicy) for each in found)
    assert all(isinstance(each, ConfigError) for each in found)


def another_contract(institutions):
    agreed = load_yaml(institutions.contract)
    agreed["variables"]["age"]["range"] = [18, 109.5]
    (institutions.folder / "other.yaml").write_text(dump_yaml(agreed))
    return institutions.written(LOGISTIC, "with-other.yaml", "other.yaml")


def another_floor(institutions):
    return institutions.written({**LOGISTIC, "patients_per_cell": 6}, "with-other.yaml")


def another_formula(institutions):
    return institutions.written({**LOGISTIC, "formula": "died ~ age"}, "with-other.yaml")


@pytest.mark.parametrize(
    "other", [another_contract, *(pytest.param(each, marks=pytest.mark.slow) for each in (another_floor, another_formula))]
)
def test_another_contract_or_analysis_at_one_member_is_refused_before_anything_is_sent(other, institutions):
    same = institutions.written(LOGISTIC)
    found = institutions.found(same, same, other(institutions))

    said = "has another plan of sums: there is no result; expected the same analysis and the same contract at all members"
    assert [type(each) for each in found] == [ConfigError] * 3
    assert all(said in str(each) for each in found)
    assert institutions.num_totals() == 0


def test_a_question_is_not_asked_again_with_other_floors(institutions):
    assert all(each.counts.num_patients == 240 for each in institutions.found(institutions.written(LOGISTIC)))
    found = institutions.found(another_floor(institutions))

    assert {type(each) for each in found} == {ConfigError}
    assert any("has sent it under another plan; go on with that plan, or ask in another study" in str(each) for each in found)
    assert [each.counts.num_patients for each in institutions.found(institutions.written(LOGISTIC))] == [240] * 3


def test_a_site_that_refuses_shows_no_result_of_an_earlier_run(institutions):
    analysis = institutions.written(LOGISTIC)
    institutions.found(analysis)
    institutions.change(1, policy={"analyses": ["describe"]})
    found = institutions.found(analysis)

    assert str(found[1]) == "node-1: refused by policy"
    assert [each.counts.num_patients for each in found[::2]] == [240] * 2


def test_a_member_that_does_not_come_is_named(institutions):
    with pytest.raises(MembersMissing, match=r"^node-1, node-2: away for 0.5 s: there is no result; start again when they are there"):
        analyse_together(institutions.written(LOGISTIC), institutions.sites[0], patience_s=0.5, presence_s=0.1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({**ANALYSES["cox"], "formula": "Surv(days, died) ~ age * dose * stage * sex * visits", "grid": 0.2}, "and 4,194,304 are the most"),
        ({**LOGISTIC, "formula": "died ~ weight"}, "weight: no variable of the contract"),
        ({**LOGISTIC, "contract": 5}, "contract = 5: expected the file of the data contract"),
        ({**LOGISTIC, "contract": None}, "contract: required, but missing"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anybody_hears_of_it(asked, said, institutions):
    path = institutions.folder / "analysis.yaml"
    path.write_text(dump_yaml({"contract": "contract.yaml", **asked}))
    with pytest.raises(ConfigError, match=said):
        analyse_together(path, institutions.sites[0])

    assert not memory_of(SiteFile.load(institutions.sites[0])).exists()


@pytest.mark.slow
def test_three_processes_print_what_simulated_sites_give(institutions):
    institutions.change(0, contract="../../contract.yaml")
    analysis = institutions.written(LOGISTIC)
    own = institutions.folder / "own.yaml"
    own.write_text(dump_yaml(LOGISTIC))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    lines = [(own, "--json"), (analysis, "--json"), (analysis, "--csv", "rows.csv", "--html", "page.html")]
    running = [
        start_command("stats", "together", first, site, *rest, cwd=institutions.folder, env=environment)
        for (first, *rest), site in zip(lines, institutions.sites, strict=True)
    ]
    try:
        said = [each.communicate(timeout=2 * DEADLINE_S) for each in running]
    except subprocess.TimeoutExpired:
        for each in running:
            each.kill()
        raise
    expected = stats.run(LOGISTIC, institutions.contract, institutions.sites)

    assert [each.returncode for each in running] == [0] * 3, said
    assert [json.loads(out) for out, _ in said[:2]] == [json.loads(json.dumps(expected.as_dict()))] * 2
    assert said[2][0] == expected.summary() + "\n"
    page = (institutions.folder / "page.html").read_text()
    assert "simulated" not in page
    assert "the members of a study, by secure sums" in page
    assert (institutions.folder / "rows.csv").read_text().count("\n") == 4
