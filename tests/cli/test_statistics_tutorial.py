"""docs/tutorial-statistics.md, followed to the letter: five commands that print what it shows, and a Cox model equal to the pooled one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from commands import run_here

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial-statistics.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"```console\n\$ p2pfl (.*?)\n(.*?)```", PAGE, re.DOTALL)
FILES = re.findall(r"This is `([\w.]+)`:\n\n```yaml\n(.*?)```", PAGE, re.DOTALL)
HOME = "/home/ada/statistics"

POOLED = {"age": (0.0321547851375311, 0.00784920108145657), "sexmale": (0.346710387734589, 0.167532366288314),
          "treatmentnew": (-0.716994012180867, 0.169791864695592)}  # fmt: skip
"""Estimates and standard errors of lifelines 0.30.0 on the pooled rows, stratified by hospital, with tight settings; ties by Efron."""


@pytest.fixture
def follow(tmp_path, monkeypatch, capfd):
    """Run a command in a copy of the examples; gives what it prints, with the folder that the page names."""
    folder = tmp_path / "statistics"
    shutil.copytree(ROOT / "examples" / "statistics", folder)
    monkeypatch.chdir(folder)

    def followed(line):
        code, out, said = run_here(*shlex.split(line), monkeypatch=monkeypatch, capfd=capfd)
        assert (code, said) == (0, "")
        return out.replace(str(folder), HOME)

    return followed


def without_nodes(line):
    return not line.startswith("stats up ")


def test_the_page_has_five_commands_of_which_one_starts_nodes():
    assert [line.split()[:2] for line, _ in SHOWN] == [
        ["data", "check"],
        ["stats", "describe"],
        ["stats", "km"],
        ["stats", "cox"],
        ["stats", "up"],
    ]


def test_files_are_those_that_the_page_shows():
    shown = {name: (ROOT / "examples" / "statistics" / name).read_text(encoding="utf-8") for name, _ in FILES}

    assert dict(FILES) == shown
    assert set(shown) == {"contract.yaml", "leipzig.yaml"}
    assert (ROOT / "examples" / "statistics" / "analysis.yaml").read_text(encoding="utf-8") in PAGE


def test_tables_are_as_messy_as_the_page_says():
    tables = {name: (ROOT / "examples" / "statistics" / f"{name}.csv").read_bytes() for name in ("leipzig", "lyon", "leeds")}

    assert tables["leipzig"].startswith("\N{ZERO WIDTH NO-BREAK SPACE}Fallnummer;Alter (Jahre);".encode())
    assert '"verlegt;\nspäter zurück"'.encode() in tables["leipzig"]
    assert b";4,6;" in tables["leipzig"]
    assert "féminin".encode("latin-1") in tables["lyon"]
    assert b";NA;" in tables["lyon"]
    assert b",-9," in tables["leeds"]


@pytest.mark.parametrize(("line", "expected"), [each for each in SHOWN if without_nodes(each[0])], ids=["check", "describe", "km", "cox"])
def test_a_command_prints_what_the_page_shows(line, expected, follow):
    assert follow(line) == expected


def test_other_tables_are_accepted_too(follow):
    for name in ("lyon", "leeds"):
        assert follow(f"data check {name}.yaml --contract contract.yaml").endswith("\naccepted\n")


def assert_pooled(found):
    assert [each["name"] for each in found["coefficients"]] == [*POOLED]
    for each in found["coefficients"]:
        estimate, error = POOLED[each["name"]]
        tolerance = 1e-8 * max(abs(estimate), error)
        assert np.abs([each["estimate"] - estimate, each["se"] - error]).max() <= tolerance
        assert f"{estimate:.10f} | {error:.10f} |" in PAGE


def test_the_cox_model_is_that_of_the_pooled_rows(follow):
    line = next(line for line, _ in SHOWN if line.startswith("stats cox "))

    assert_pooled(json.loads(follow(f"{line} --json")))


@pytest.mark.slow
def test_nodes_print_what_the_page_shows_which_is_what_simulated_sites_give(follow):
    line, expected = next(each for each in SHOWN if not without_nodes(each[0]))
    of_simulated_sites = next(expected for line, expected in SHOWN if line.startswith("stats cox "))

    assert follow(line) == expected == of_simulated_sites
    page = Path("result.html").read_text(encoding="utf-8")
    assert "the members of a study, by secure sums" in page
    assert "treatmentnew" in page
