"""What people see: the commands behind a real pseudo-terminal, narrow and wide, in a pipe, and without colours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from functools import cache, partial

import pytest
from rich.cells import cell_len
from test_inspector_terminal import FIVE, RATE, make_run, summary_of

from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from thorough import first_fast

pytest.importorskip("pyte")

from terminals import Terminal

LONG = ("Inselspital, Universitätsspital Bern", "Hôpitaux universitaires de Genève", "basel", "東京大学医学部附属病院", "zürich")
COLUMNS = [80, 200]
DEADLINE_S = 60
HURRIED = "import time; sleep = time.sleep; time.sleep = lambda pause_s: sleep(pause_s / 10)"
TOPOLOGIES = [["torus", "--nodes", "64"], ["one-peer-exponential", "--nodes", "16"], ["karate-club"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run whose links fail every other round, and one of hospitals with long names and long stories."""
    place = tmp_path_factory.mktemp("terminal")
    skips = [(number, "bern", "basel") for number in range(1, 14, 2)] + [(number, "geneva", "zurich") for number in (2, 3, 7, 8, 11)]
    make_run(place / "five", summary=summary_of(), skips=skips)
    story = "a neighbour whose certificate ran out said so at some length, and then once more, before it left " * 2
    events = [{"round": 3, "node": LONG[0], "event": "unsettled", "detail": story}]
    make_run(place / "long", nodes=LONG, summary=summary_of(LONG, stop_reason="rounds"), skips=[(3, LONG[1], LONG[0])], events=events)
    sure = {"metric": "auroc", "gain": 0.01, "low": 0.001, "high": 0.02, "rows": 40, "confidence": 0.95}
    RunFolder.open(place / "long").write_found("worth", [{"site": name, **sure} for name in LONG])
    return place


@pytest.fixture(scope="module")
def shown(runs):
    """A run's page on a terminal of so many columns, at its end."""

    @cache
    def page(name, columns):
        with Terminal("inspect", runs / name, columns=columns) as terminal:
            assert terminal.to_its_end() == 0
        return terminal

    return page


def assert_fits(terminal):
    """No line is longer than the terminal, none is continued by it, none is cut."""
    printed = [line.rstrip() for line in terminal.printed]
    while printed and not printed[-1]:
        printed.pop()

    assert max(map(cell_len, printed)) <= terminal.columns
    assert printed == terminal.lines
    assert not [line for line in printed if "…" in line or "�" in line]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", ["five", "long"])
def test_a_runs_page_fits(shown, name, columns):
    terminal = shown(name, columns)

    assert_fits(terminal)
    text = "\n".join(terminal.lines)
    assert "│" in text
    assert "└────" in text
    assert re.search(r"[\u2801-\u28ff]{20}", text)  # the curve


@pytest.mark.parametrize("columns", COLUMNS)
def test_every_hospital_has_one_line_with_all_its_numbers(shown, columns):
    terminal = shown("five", columns)
    rows = [line.split() for line in terminal.lines]

    for number, node in enumerate(FIVE):
        network = 0.955 + 0.01 * number
        gain = f"{network - 0.962:+.3f}"
        assert [node, "0.962", f"{network:.3f}", f"{network + 0.003:.3f}", gain, "0.900"] in rows


@pytest.mark.parametrize("columns", COLUMNS)
def test_names_and_numbers_begin_on_the_same_line(shown, columns):
    terminal = shown("long", columns)
    skipped = [line.strip() for line in terminal.lines]
    begin = skipped.index("Skipped neighbours, in all rounds recorded here")

    assert skipped[begin + 3].startswith("Hôpitaux")
    assert re.search(r" 1 +3$", skipped[begin + 3])


@pytest.mark.parametrize("columns", COLUMNS)
def test_rounds_that_were_missed_regularly_are_said_shortly(shown, columns):
    terminal = shown("five", columns)
    rows = [line.split(maxsplit=3) for line in terminal.lines]

    assert ["bern", "basel", "7", "every 2nd of 1-13"] in rows
    assert ["geneva", "zurich", "5", "2-3, 7-8, 11"] in rows


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("arguments", TOPOLOGIES, ids=lambda arguments: arguments[0])
def test_a_graphs_figures_fit(arguments, columns):
    with Terminal("topology", "show", *arguments, columns=columns) as terminal:
        assert terminal.to_its_end() == 0
    pairs = [line for line in terminal.lines if re.match(r"(nodes|spectral gap|gap a round|rounds to)", line)]

    assert_fits(terminal)
    assert len(pairs) == 3
    assert len({re.search(r" {2,}", line).end() for line in pairs}) == 1  # one below the other


@pytest.mark.parametrize("columns", COLUMNS)
def test_live_a_finished_run_is_shown_once(runs, columns):
    with Terminal("inspect", runs / "five", "--live", columns=columns) as terminal:
        assert terminal.to_its_end() == 0

    assert sum("breast-cancer: converged" in line for line in terminal.lines) == 1
    assert max(map(cell_len, terminal.lines)) <= columns
    assert not terminal.screen.is_second


def is_followed(terminal, *, number):
    """Whether a round is told of, and the curve with its whole axis goes so far."""
    told = f"in round {number} the disagreement is" in " ".join(" ".join(terminal.lines).split())
    return told and any(re.fullmatch(rf" +0 +{number}", line) for line in terminal.lines)


@pytest.mark.parametrize("columns", [80, pytest.param(200, marks=pytest.mark.slow)])
def test_live_a_growing_run_is_followed_to_its_end(tmp_path, columns):
    place = make_run(tmp_path / "run", training=3, settling=0)
    folder, seen, go_on = RunFolder.open(place), [], threading.Event()

    def grow():
        """A round when the last one has been seen, and in the end the summary."""
        for number in range(3, 6):
            go_on.wait(DEADLINE_S)
            go_on.clear()
            bounds = {"consensus_distance": 0.3 * RATE**number, "bound_low": 0.01, "bound_high": 0.3, "rms_norm": 2.0}
            folder.append_round({"round": number, "kind": "train", "nodes": 5, "loss": 0.5, **bounds})
        go_on.wait(DEADLINE_S)
        folder.write_summary(summary_of())

    growing = threading.Thread(target=grow)
    growing.start()
    with Terminal("inspect", place, "--live", columns=columns, rows=24, before=HURRIED) as terminal:
        for number in range(2, 6):
            terminal.until(partial(is_followed, number=number))
            seen.append((terminal.screen.is_second, list(terminal.lines)))
            go_on.set()
        assert terminal.to_its_end() == 0
    growing.join()

    for is_second, lines in seen:
        assert is_second  # what stood there before is not written over
        assert lines[0].startswith("breast-cancer: running")
        assert len(lines) <= 24
        assert max(map(cell_len, lines)) <= columns
        assert not [line for line in lines if "…" in line]
    assert not terminal.screen.is_second
    assert read_run(place).summary is not None
    assert "It has converged" in "\n".join(terminal.lines)


def piped(*arguments, **environment):
    wanted = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR", "TERM", "COLUMNS")}
    wanted = {name: value for name, value in wanted.items() if not name.startswith("COVERAGE")}  # measured elsewhere, and slower
    done = subprocess.run(
        [sys.executable, "-m", "p2pfl", *map(str, arguments)],
        env={**wanted, **environment},
        capture_output=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0
    return done.stdout


@pytest.mark.parametrize("environment", first_fast([{}, {"NO_COLOR": "1"}, {"TERM": "xterm-256color"}, {"TERM": "dumb"}]), ids=str)
def test_in_a_pipe_there_is_text_and_nothing_else(runs, environment):
    others = [["inspect", runs / "five", "--live"], ["topology", "show", "ring", "--nodes", "5"]]
    for arguments in (["inspect", runs / "long"], *(others if not environment else [])):
        found = piped(*arguments, **environment)
        assert b"\x1b" not in found
        assert found.decode().strip()
        assert not [line for line in found.decode().split("\n") if cell_len(line) > 80]


def test_a_terminal_that_can_do_nothing_is_sent_text_alone(runs):
    for arguments in (["inspect", runs / "five"], ["inspect", runs / "five", "--live"]):
        with Terminal(*arguments, columns=80, environment={"TERM": "dumb"}) as terminal:
            assert terminal.to_its_end() == 0
        assert b"\x1b" not in terminal.written


def test_who_wants_no_colours_gets_none(runs, shown):
    coloured = shown("five", 80)
    with Terminal("inspect", runs / "five", columns=80, environment={"NO_COLOR": "1"}) as plain:
        plain.to_its_end()
    colour = re.compile(rb"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38)[;m]")

    assert colour.search(coloured.written)
    assert not colour.search(plain.written)
    assert plain.lines == coloured.lines


def test_machines_get_one_object_also_on_a_terminal(runs):
    with Terminal("inspect", runs / "five", "--json", columns=10_000) as terminal:
        assert terminal.to_its_end() == 0

    assert b"\x1b" not in terminal.written
    assert json.loads(terminal.written)["summary"]["stop_reason"] == "converged"
