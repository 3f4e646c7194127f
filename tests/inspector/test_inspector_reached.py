"""When a run was good enough, in rounds and in seconds: from records made by hand."""

from __future__ import annotations

import io
import json

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from p2pfl.cli.inspect import inspect
from p2pfl.errors import ConfigError
from p2pfl.inspector.convergence import Reached, convergence, course_of, reached
from p2pfl.inspector.terminal import print_page
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run


@pytest.fixture
def folder(tmp_path):
    """Six rounds of 1.5 seconds; two nodes are measured after every second one, a tenth better each time, and one better than the other."""
    folder = RunFolder.create(tmp_path / "run", {"name": "by hand"}, engine="simulator")
    for number in range(6):
        row = {"round": number, "kind": "train", "rms_norm": 2.0, "consensus_distance": 0.4 / 2**number}
        folder.append_round({**row, "simulated_s": 1.5 * (number + 1)})
        for place, node in enumerate(("a", "b")):
            measured = {"metrics": {"accuracy": 0.5 + 0.05 * number + 0.1 * place, "log_loss": 1 - 0.1 * number}} if number % 2 else {}
            folder.append_node({"round": number, "node": node, "kind": "train", "simulated_s": 1.5 * number + 1, **measured})
    return folder.path


def test_a_metric_is_the_mean_of_the_nodes(folder):
    assert course_of(read_run(folder), "accuracy") == pytest.approx({1: 0.6, 3: 0.7, 5: 0.8}, rel=1e-12)


@pytest.mark.parametrize(
    ("what", "wanted", "rounds", "simulated_s"),
    [
        ("accuracy", 0.65, 4, 6.0),
        ("accuracy", 0.95, None, None),
        ("log_loss", 0.9, 2, 3.0),  # less is better
        ("relative_consensus", 0.05, 3, 4.5),  # 0.2, 0.1, 0.05
    ],
)
def test_the_first_round_that_was_good_enough(folder, what, wanted, rounds, simulated_s):
    assert reached(read_run(folder), what, wanted) == Reached(what=what, wanted=wanted, rounds=rounds, simulated_s=simulated_s)


def test_an_unknown_figure_names_those_that_there_are(folder):
    with pytest.raises(ConfigError, match="'accurracy': expected one of relative_consensus, accuracy, log_loss"):
        reached(read_run(folder), "accurracy", 0.9)


def test_the_course_of_a_run_has_its_seconds(folder):
    assert convergence(read_run(folder)).simulated_s == [1.5, 3.0, 4.5, 6.0, 7.5, 9.0]


def test_the_page_has_seconds_beside_rounds(folder):
    console = Console(file=io.StringIO(), width=80)
    print_page(read_run(folder), console, [reached(read_run(folder), "accuracy", 0.65)])
    lines = [line.split() for line in console.file.getvalue().splitlines()]

    assert ["2", "3.000", "2.00e-01", "0.600"] in lines
    assert ["6", "9.000", "1.25e-02", "0.800"] in lines
    assert ["1.500", "a", "round"] in lines
    assert ["accuracy", "0.65", "4", "6.000"] in lines


def test_the_command_says_when_it_was_reached(folder):
    app = typer.Typer()
    app.command()(inspect)
    run = CliRunner()
    found = json.loads(run.invoke(app, [str(folder), "--json", "--reach", "accuracy=0.65"]).stdout)["reached"]

    assert found == [{"what": "accuracy", "wanted": 0.65, "rounds": 4, "simulated_s": 6.0}]
    wrong = run.invoke(app, [str(folder), "--reach", "accuracy"]).exception

    assert isinstance(wrong, ConfigError)
    assert "'accuracy': expected METRIC=VALUE, such as accuracy=0.9" in str(wrong)
