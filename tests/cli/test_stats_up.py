"""`p2pfl stats up`: what is wrong is said before a node starts, and a site that refuses says why in its own log alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from commands import run_here
from p2pfl.yaml_files import dump_yaml, load_yaml

EXAMPLE = Path(__file__).parents[2] / "examples" / "statistics"
SITES = ("leipzig.yaml", "lyon.yaml", "leeds.yaml")


@pytest.fixture
def up(tmp_path, monkeypatch, capfd):
    """Run the command in a copy of the examples."""
    shutil.copytree(EXAMPLE, tmp_path / "statistics")
    monkeypatch.chdir(tmp_path / "statistics")
    return lambda *arguments: run_here("stats", "up", *arguments, monkeypatch=monkeypatch, capfd=capfd)


def change(file, **keys):
    Path(file).write_text(dump_yaml({**load_yaml(Path(file)), **keys}))


def test_two_sites_are_too_few_for_a_secure_sum(up):
    code, out, said = up("analysis.yaml", *SITES[:2])

    assert (code, out) == (2, "")
    assert said == "p2pfl: 2 sites: secure sums want 3 at least, so that none is known from the others'\n"


def test_every_fault_of_the_files_is_said_before_a_node_starts(up):
    change("leeds.yaml", table={"file": "leeds.csv", "decimal": "point"})
    change("lyon.yaml", member="leipzig")
    code, _, said = up("analysis.yaml", *SITES, "--out", "kept")

    assert code == 2
    assert "lyon.yaml: another site has the name leipzig already; say member: NAME in its file" in said
    change("lyon.yaml", member="lyon")
    code, _, said = up("analysis.yaml", *SITES, "--out", "kept")
    assert code == 2
    assert "leeds.yaml, table: units.glucose: required, but missing" in said
    assert not Path("kept").exists()


def test_an_analysis_that_cannot_be_is_said_before_a_node_starts(up):
    change("analysis.yaml", formula="Surv(days, died) ~ weight")
    code, _, said = up("analysis.yaml", *SITES)

    assert code == 2
    assert "weight: no variable of the contract" in said


@pytest.mark.parametrize("option", ["--out", "--csv", "--html"])
def test_what_is_there_is_left_alone(option, up):
    Path("kept").mkdir()
    code, _, said = up("analysis.yaml", *SITES, option, "kept")

    assert code == 2
    assert said.startswith(f"p2pfl: {option} = 'kept': it exists already; expected a new f")


@pytest.mark.slow
def test_a_site_that_refuses_says_why_in_its_own_log_alone(up):
    change("leeds.yaml", policy={"variables": ["age", "days", "died"]})
    code, out, said = up("analysis.yaml", *SITES, "--out", "kept", "--csv", "rows.csv")

    assert (code, out) == (2, "")
    logs = {name: Path("kept", "sites", name, "node.log").read_text() for name in ("leipzig", "lyon", "leeds")}
    line = "leeds refuses: policy.variables: the analysis uses sex, treatment, which it does not list"
    assert [name for name, log in logs.items() if line in log] == ["leeds"]
    assert all("policy" not in log for name, log in logs.items() if name != "leeds")
    assert line in said
    assert "leeds: refused by policy" in said
    assert "leipzig, lyon: leeds: gives no numbers to cox;" in said
    assert not Path("rows.csv").exists()
