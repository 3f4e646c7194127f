"""`p2pfl doctor` finds what the start of the node would refuse, and measures what the node will take."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from clinics import DIALS, EXAMPLES, LISTENS, OTHER, TASK, Clinics, founded

from p2pfl.errors import ConfigError
from p2pfl.governance.study import Study
from p2pfl.node.doctor import machine, rows
from p2pfl.node.doctor.checks import Report, examine
from p2pfl.node.doctor.examination import Examination
from p2pfl.node.memory import forecast_node
from p2pfl.node.own_contract import contract_here
from p2pfl.node.start import start
from p2pfl.node.state_folder import held_state, unused_state
from p2pfl.training import Population

NOBODY = 65534


@pytest.fixture
def clinics(tmp_path, monkeypatch) -> Iterator[Clinics]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with ExitStack() as ports:
        yield founded(tmp_path, ports)
    sys.modules.pop("custom_task", None)


def examined(clinics: Clinics) -> Report:
    return examine(Examination(path=clinics.site(LISTENS), wait_s=0.0))


def faults(report: Report) -> list[tuple[str, str]]:
    return [(name, found.text) for name, found in report.findings]


def facts(report: Report) -> dict[str, str]:
    return {fact.what: fact.said for _, fact in report.facts}


def test_a_site_that_must_say_where_its_old_state_is_gets_the_words_of_node_start(clinics):
    tie = {"study": OTHER, "members": {LISTENS: LISTENS, DIALS: DIALS}}
    clinics.make_again(lambda study: Study.from_mapping({**study.as_dict(), "continues": tie}, "the study"))
    ((name, text),) = faults(examined(clinics))
    with pytest.raises(ConfigError) as refused:
        start(clinics.site(LISTENS))

    assert name == "old state"
    assert "old_state: required, but missing" in text
    assert text == str(refused.value)

    (clinics.place / "old").mkdir(mode=0o700)
    clinics.set(LISTENS, old_state="../old")
    ((name, text),) = faults(examined(clinics))

    assert name == "old state"
    assert "is it the folder of a node's state?" in text


@pytest.mark.parametrize(("state", "words"), [("a-file", "is a file, and a folder is needed"), ("x" * 300, "File name too long")])
def test_a_state_that_can_be_no_folder_is_found_and_refused_in_the_same_words(clinics, state, words):
    (clinics.site(LISTENS).parent / "a-file").write_text("notes")
    clinics.set(LISTENS, state=state)
    ((name, text),) = faults(examined(clinics))
    with pytest.raises(ConfigError) as refused:
        start(clinics.site(LISTENS))

    assert name == "state folder"
    assert words in text
    assert "name another folder in site.yaml" in text
    assert text == str(refused.value)


def test_a_state_below_a_folder_that_may_not_be_entered_is_refused_with_place_and_remedy(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)  # root may enter everything
    try:
        for hold in (held_state, unused_state):
            with (
                pytest.raises(ConfigError, match=r"closed/state: account \d+ may not enter .*; name another folder"),
                hold(closed / "state"),
            ):
                pass
    finally:
        if is_root:
            os.seteuid(0)
        closed.chmod(0o700)


def test_memory_and_disk_are_those_of_a_node_that_spills(clinics, monkeypatch):
    limits = []

    def recorded(*arguments, **options):
        limits.append(options.get("spill_mb"))
        return replace(forecast_node(*arguments, **options), spilled_bytes=10**15)

    monkeypatch.setattr(rows, "forecast_node", recorded)
    monkeypatch.setattr(machine, "forecast_node", recorded)
    clinics.set(LISTENS, spill_mb=0.001)
    ((name, text),) = faults(examined(clinics))

    assert limits == [0.001, 0.001]
    assert name == "disk"
    assert "checkpoints and records need 1,000,000,0" in text


def test_a_round_without_a_finite_loss_is_found(clinics, monkeypatch):
    monkeypatch.setattr(Population, "_without_loss", lambda *_: (LISTENS,))
    ((name, text),) = faults(examined(clinics))

    assert name == "training"
    assert "no finite loss" in text


def test_a_difference_that_was_accepted_is_shown_as_one(clinics):
    clinics.make_again(lambda study: study.with_result_contract(replace(contract_here(TASK), torch="1.99")))
    clinics.set(LISTENS, accept_differences=["torch"])
    report = examined(clinics)

    assert faults(report) == []
    assert facts(report)["result contract"].startswith("not kept, and this site has accepted that on record: ")
    assert "1.99" in facts(report)["result contract"]
