"""`p2pfl node egress` lists the sums of a study's analyses: those that a run then asks for, and no others."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
from test_own_analysis import ANALYSES, LOGISTIC
from test_own_table import Agreed

from commands import run_here
from p2pfl.analyses.policy import Policy
from p2pfl.governance.study import Study
from p2pfl.node.egress_sums import sums_of
from p2pfl.node.own_sums import memory_of
from p2pfl.node.site import SiteFile
from p2pfl.yaml_files import dump_yaml


@pytest.fixture
def agreed(tmp_path):
    with ExitStack() as stack:
        yield Agreed(tmp_path, stack)


def listed(study, place, **policy):
    return {each.name: each for each in sums_of(study, study.names[place], Policy(**policy), "study.yaml")}


def test_numbers_and_receivers_of_each_sum_are_listed(agreed):
    study = agreed.agree(unfrozen=range(3), risk=LOGISTIC)
    middle = listed(study, 1)["risk"]

    assert [(each.statistic, each.numbers, each.at_most) for each in middle.sums] == [
        ("patients and rows", 3, 1),
        ("cross table of died, sex", 4, 1),
        ("rows and means", 4, 1),
        ("squares around the means", 3, 1),
        ("missing rows and saturated log-likelihood", 3, 1),
        ("information, score and deviance, in an iteration", 10, 27),
    ]
    assert (middle.question, middle.number_bytes, middle.num_numbers) == ("glm, died ~ 1 + age + sex, binomial", 16, 287)
    assert [(each.parent, each.children) for each in (listed(study, place)["risk"] for place in range(3))] == [
        (None, ("node-1",)),
        ("node-0", ("node-2",)),
        ("node-1", ()),
    ]


@pytest.mark.slow
def test_a_run_asks_for_no_more_sums_than_were_listed(agreed):
    study = agreed.agree(unfrozen=range(3), risk=LOGISTIC, **{"table-1": ANALYSES["describe"]})
    counts = {}
    for name in ("risk", "table-1"):
        before = num_released(agreed)
        assert None not in [getattr(each, "summary", None) for each in agreed.found(name)]
        counts[name] = num_released(agreed) - before
    most = {name: sum(each.at_most for each in own.sums) for name, own in listed(study, 0).items()}

    assert 5 < counts["risk"] <= most["risk"]
    assert 20 < counts["table-1"] <= most["table-1"]


def num_released(agreed):
    """Totals that the first member has seen, one file each."""
    return len(list((memory_of(SiteFile.load(agreed.sites[0])) / "totals").glob("*/*")))


def test_an_analysis_that_the_sites_policy_refuses_takes_nothing(agreed):
    study = agreed.agree(unfrozen=range(3), risk=LOGISTIC)
    own = listed(study, 1, patients_per_cell=8)["risk"]

    assert own.refusals == ("policy.patients_per_cell = 8: the analysis asks for 5",)
    (line,) = own.lines
    assert line.startswith("analysis risk, glm, died ~ 1 + age + sex, binomial: no number leaves, as this site refuses it: ")
    assert line.endswith(own.refusals[0])


def test_a_study_without_analyses_has_no_sums(agreed):
    assert sums_of(agreed.agree(unfrozen=range(3)), "node-0", Policy(), "study.yaml") == ()


def egress(agreed, place, *options, **where):
    return run_here("node", "egress", agreed.sites[place], *options, **where)


def test_the_command_lists_sums_beside_the_updates(agreed, monkeypatch, capfd):
    agreed.agree(risk=LOGISTIC)
    where = {"monkeypatch": monkeypatch, "capfd": capfd}
    code, said, _ = egress(agreed, 1, **where)

    assert code == 0
    assert "node-1 sends updates to node-0, node-2" in said
    sizes = (
        "at most 287 numbers of 16 bytes; under a mask, added to those of node-2, to node-0, totals to node-2; all members learn the totals"
    )
    assert f"analysis risk, glm, died ~ 1 + age + sex, binomial: {sizes}\n  patients and rows: 3 numbers\n" in said
    assert "  information, score and deviance, in an iteration: 10 numbers, at most 27 times\n" in said
    assert "name, addresses, public keys, numbers of frozen rows and patients, with an HMAC of them" in said
    assert "openings and digests of secure sums, signed, to all members" in said
    assert "What stays: the table of the data contract, rows, labels, groups" in said
    found = json.loads(egress(agreed, 1, "--json", **where)[1])
    assert [each["name"] for each in found["analyses"]] == ["risk"]
    assert found["no_updates"] is None


def test_a_member_of_a_study_for_statistics_alone_sends_sums_and_no_updates(agreed, monkeypatch, capfd):
    study = agreed.agree(risk=LOGISTIC)
    experiment = {**study.experiment, "nodes": 2, "task": {"name": "averaging", "dimension": 1}}
    study = Study.from_mapping({**study.as_dict(), "experiment": experiment}, "study.yaml")
    (agreed.folder / "study.yaml").write_text(dump_yaml(study.as_dict()))
    agreed.change(2, confirmed=study.digest)
    where = {"monkeypatch": monkeypatch, "capfd": capfd}
    code, said, _ = egress(agreed, 2, **where)

    assert code == 0
    assert "node-2 sends no updates, as no node of this study starts here: " in said
    assert "analysis risk, glm, " in said
    assert "round record" not in said
    found = json.loads(egress(agreed, 2, "--json", **where)[1])
    assert (found["tensors"], found["receivers"], found["round_bytes"]) == ([], [], 0)
    assert "has no site of that name here" in found["no_updates"]
