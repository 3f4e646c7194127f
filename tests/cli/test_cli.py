"""The command line as people and scripts meet it: help, exit codes, what goes to which stream, what is refused and how."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import typer

from commands import start_command
from p2pfl.cli import app, main
from p2pfl.cli.run import _progress
from p2pfl.evaluation.results import Run
from p2pfl.runs.records import read_run
from p2pfl.simulator import simulate
from p2pfl.yaml_files import load_yaml

DEADLINE_S = 60.0
AVERAGING = """\
task: {name: averaging, dimension: 3}
nodes: 4
rounds: 4
stop: null
baselines: []
"""
LEARNING = """\
task: {name: breast-cancer}
nodes: 3
rounds: 2
stop: null
"""


@pytest.fixture
def p2pfl(capfd, monkeypatch):
    """Runs a command in this process; its exit code, what it printed, and what it said on standard error."""
    monkeypatch.setenv("COLUMNS", "120")

    def p2pfl(*arguments):
        monkeypatch.setattr(sys, "argv", ["p2pfl", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capfd.readouterr()
        return end.value.code, said.out, said.err

    return p2pfl


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with two experiments in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "averaging.yaml").write_text(AVERAGING)
    (tmp_path / "learning.yaml").write_text(LEARNING)
    return tmp_path


def commands(group, path=()):
    """Every command that is not hidden, with the words that lead to it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        elif not command.hidden:
            yield " ".join((*path, name))


COMMANDS = list(commands(typer.main.get_command(app)))


# ---- help


def test_the_commands_are_those_of_the_manual():
    assert sorted(COMMANDS) == [
        "chaos",
        "dashboard",
        "data check",
        "data fetch",
        "data freeze",
        "data list",
        "data prepare",
        "doctor",
        "inspect",
        "keys card",
        "keys describe",
        "keys new",
        "keys show",
        "node egress",
        "node probe",
        "node start",
        "node status",
        "predict",
        "simulate",
        "stats calibration",
        "stats compare",
        "stats cox",
        "stats describe",
        "stats glm",
        "stats km",
        "stats mixed",
        "stats released",
        "stats together",
        "stats up",
        "study join",
        "study new",
        "study show",
        "sweep",
        "topology advise",
        "topology compare",
        "topology list",
        "topology show",
        "up",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_of_the_command(command, p2pfl):
    code, out, err = p2pfl(*command.split(), "--help")

    assert (code, err) == (0, "")
    assert f"Example: p2pfl {command}" in out
    assert "Usage:" in out


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "node start"])
def test_every_command_but_the_daemon_speaks_json(command, p2pfl):
    assert "--json" in p2pfl(*command.split(), "--help")[1]


def test_the_version_is_said(p2pfl):
    assert p2pfl("--version") == (0, f"p2pfl {version('p2pfl-mesh')}\n", "")


def test_python_dash_m_is_the_same_command_line(folder):
    done = subprocess.run([sys.executable, "-m", "p2pfl", "--help"], capture_output=True, text=True, check=True, timeout=DEADLINE_S)

    assert "p2pfl [OPTIONS] COMMAND" in done.stdout


# ---- exit codes, over a real process


def test_what_is_done_exits_with_0_and_prints_only_json(folder):
    running = start_command("simulate", "averaging.yaml", "--json", cwd=folder)
    out, err = running.communicate(timeout=DEADLINE_S)

    assert running.returncode == 0
    assert json.loads(out)["stop_reason"] == "rounds"
    assert json.loads(out) == json.loads((folder / "runs" / "averaging" / "summary.json").read_text())
    assert err == ""


@pytest.mark.usefixtures("folder")
def test_what_is_wrong_exits_with_2_and_one_readable_line(p2pfl):
    assert p2pfl("simulate", "missing.yaml", "--json") == (2, "", "p2pfl: missing.yaml: no such file\n")


def test_what_ran_and_failed_exits_with_1(p2pfl, folder):
    simulate("averaging.yaml", out="run")
    (folder / "run" / "summary.json").unlink()
    (folder / "run" / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    code, out, err = p2pfl("simulate", "--resume", "run")

    assert (code, out) == (1, "")
    assert err.startswith("p2pfl: run/checkpoint.safetensors: not a readable checkpoint")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["simulate", "averaging.yaml", "--nodes", "many"], "Invalid value for '--nodes'"),
        (["simulate", "averaging.yaml", "--colour", "blue"], "No such option: --colour"),
        (["simulate"], "give an EXPERIMENT to start, or --resume RUN to continue one; not both"),
        (["simulate", "averaging.yaml", "--resume", "runs/averaging"], "not both"),
        (["up", "--resume", "runs/averaging", "--rounds", "9"], "leave out --out, --nodes, --rounds and --set"),
        (["simulate", "--resume", "runs/averaging"], "runs/averaging/experiment.yaml: no such file"),
        (["simulate", "averaging.yaml", "--set", "rounds"], "--set: 'rounds': expected KEY=VALUE, such as algorithm.local_steps=10"),
        (["simulate", "averaging.yaml", "--set", "rounds.of=3"], "rounds = 4 is not a mapping"),
        (["simulate", "averaging.yaml", "--rounds", "-3"], "rounds = -3: must be >= 0"),
        (["simulate", "averaging.yaml", "--device", "abacus"], "--device: device = 'abacus': cannot be used here"),
        (["simulate", "."], "cannot be read"),
        (["inspect", "."], "holds no experiment.yaml and so is not a run"),
        (["predict", ".", "rows.csv", "--node", "a"], "no final models"),
        (["topology", "show", "rong"], "did you mean ring?"),
        (["keys", "show", "."], "card.yaml: no such file"),
        (["study", "show", "study.yaml"], "study.yaml: no such file"),
        (["study", "new", "averaging.yaml", "--card", "a.yaml", "--card", "b.yaml"], "b.yaml: no such file"),
        (["node", "start", "site.yaml"], "site.yaml: no such file"),
        (["node", "status", "site.yaml"], "site.yaml: no such file"),
        (["data", "fetch", "everything"], "NAME = 'everything': one of heart-disease"),
    ],
)
def test_what_cannot_be_is_refused_with_a_readable_line(arguments, words, folder, p2pfl):
    code, out, err = p2pfl(*arguments)

    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert not (folder / "runs").exists()


def test_five_faults_in_one_file_give_five_findings(folder, p2pfl):
    (folder / "faults.yaml").write_text("""\
task: {name: breast-cancer}
topology: {name: rinng}
algorithm: {name: dpsdg, local_step: 3}
rounds: -1
colour: blue
""")
    code, out, err = p2pfl("simulate", "faults.yaml")
    head, *findings = err.splitlines()

    assert (code, out, head) == (2, "", "p2pfl: faults.yaml:")
    assert len(findings) == 5
    for words in (
        "topology.name = 'rinng': did you mean ring?",
        "algorithm.name = 'dpsdg': did you mean dpsgd?",
        "algorithm.local_step",
        "rounds = -1: must be >= 0",
        "colour",
    ):
        assert sum(words in finding for finding in findings) == 1, words


# ---- simulate and up


def test_a_run_says_how_it_goes_on_standard_error_and_the_result_on_standard_output(folder, p2pfl):
    code, out, err = p2pfl("simulate", "learning.yaml")

    assert code == 0
    assert "hospital-0" in out
    assert "3 nodes, 2 rounds, at its cap of rounds" in out
    assert "more: p2pfl inspect runs/learning" in out
    assert err.splitlines()[-1].startswith("round 2: loss ")


def test_in_a_pipe_progress_is_a_line_each_tenth_and_each_five_seconds(capsys, monkeypatch):
    now_s = 0.0
    monkeypatch.setattr("p2pfl.cli.run.monotonic", lambda: now_s)
    with _progress(enabled=True) as progress:
        for number, now_s in [(1, 1.0), (2, 2.0), (3, 5.9), (4, 6.1), (99, 7.0), (100, 8.0), (1000, 9.0)]:  # noqa: B007
            progress(number, 1000, {"loss": 0.5})

    assert capsys.readouterr().err == "".join(f"round {number}: loss 0.5000\n" for number in (1, 4, 100, 1000))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"rms_disagreement": 0.0, "bound_high": 0.5}, "disagreement 0.00e+00"),
        ({"rms_disagreement": None, "bound_high": 0.5}, "disagreement 5.00e-01"),
        ({"rms_disagreement": None, "bound_high": None, "consensus_distance": 0.25}, "consensus distance 2.50e-01"),
    ],
)
def test_progress_says_the_exact_distance_also_where_it_is_zero(row, said, capsys):
    with _progress(enabled=True) as progress:
        progress(1, 10, {"loss": 0.5, **row})

    assert capsys.readouterr().err == f"round 1: loss 0.5000, {said}\n"


def test_options_replace_keys_of_the_file(folder, p2pfl):
    options = [
        "--nodes",
        "5",
        "--rounds",
        "7",
        "--set",
        "topology.name=complete",
        "--set",
        "stop={relative_consensus: 1e-2}",
        "--set",
        "seed=3",
    ]
    code, out, _ = p2pfl("simulate", "averaging.yaml", *options, "--out", "elsewhere", "--json")
    resolved = load_yaml(folder / "elsewhere" / "experiment.yaml")

    assert code == 0
    assert (json.loads(out)["nodes"], json.loads(out)["stop_reason"]) == (5, "converged")
    assert (resolved["nodes"], resolved["rounds"], resolved["seed"]) == (5, 7, 3)
    assert (resolved["topology"], resolved["stop"]["relative_consensus"]) == ({"name": "complete"}, 0.01)


def test_a_folder_that_exists_is_left_alone(folder, p2pfl):
    (folder / "precious").mkdir()
    (folder / "precious" / "file").write_text("old")
    for command in ("simulate", "up"):
        code, _, err = p2pfl(command, "averaging.yaml", "--out", "precious")

        assert code == 2
        assert "precious: exists already: choose another --out, or continue that run with --resume" in err
        assert [path.name for path in (folder / "precious").iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["simulate", "up"])
def test_a_dry_run_says_what_would_run_and_writes_nothing(command, folder, p2pfl):
    before = sorted(folder.rglob("*"))
    code, out, _ = p2pfl(command, "learning.yaml", "--dry-run")

    assert code == 0
    assert "3 nodes: hospital-0, hospital-1, hospital-2\n" in out
    assert "at most 2 rounds" in out
    assert re.search("^compiled: '?(on|off)'?$", out, re.MULTILINE)
    code, out, err = p2pfl(command, "learning.yaml", "--dry-run", "--json", "--rounds", "9")
    plan = json.loads(out)

    assert (code, err) == (0, "")
    assert plan["experiment"]["compiled"] in ("on", "off")
    assert plan["nodes"] == ["hospital-0", "hospital-1", "hospital-2"]
    # 30 features and a bias, four bytes each, over six directed edges
    assert (plan["parameters"], plan["bytes_per_model"], plan["bytes_per_round"]) == (31, 124, 744)
    assert (plan["most_rounds"], plan["experiment"]["rounds"]) == (9, 9)
    assert sorted(folder.rglob("*")) == before


def test_an_interrupted_simulation_is_resumed_to_the_same_weights(folder, p2pfl):
    def interrupt(number, most, row):
        if number == 3:
            raise KeyboardInterrupt

    whole = simulate("averaging.yaml", out="whole")
    with pytest.raises(KeyboardInterrupt):
        simulate("averaging.yaml", out="halves", progress=interrupt)

    assert p2pfl("inspect", "halves", "--json")[0] == 0
    code, out, _ = p2pfl("simulate", "--resume", "halves", "--json")

    assert (code, json.loads(out)["rounds"]) == (0, 4)
    assert [row["round"] for row in Run(Path("halves")).records] == [0, 1, 2, 3]
    for name, model in Run(Path("halves")).models.items():
        assert torch.equal(model, whole.models[name])
    # a run that has ended says so once more
    assert p2pfl("simulate", "--resume", "halves", "--json")[1] == out


def members_of(place):
    """Processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(place).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return found


def wait_for(condition):
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.slow
def test_daemons_tell_their_status_and_ctrl_c_leaves_none_behind_and_the_run_can_be_resumed(folder, p2pfl):
    place = folder / "network"
    options = ["--nodes", 2, "--rounds", 300, "--set", "checkpoint_every=1", "--out", place]
    running = start_command("up", "averaging.yaml", *options, cwd=folder, start_new_session=True)
    try:
        wait_for(lambda: all((place / "sites" / f"node-{i}" / "state" / "checkpoint.safetensors").exists() for i in range(2)))

        assert len(members_of(place)) == 3
        code, out, err = p2pfl("node", "status", place / "sites" / "node-0" / "site.yaml", "--json")

        assert (code, err, json.loads(out)["member"], list(json.loads(out)["neighbours"])) == (0, "", "node-0", ["node-1"])
        code, out, _ = p2pfl("node", "status", place / "sites" / "node-1" / "site.yaml")

        assert code == 0
        assert "node-1: round " in out
        assert re.search(r"│ node-0 +│ up for \d+ s +│ yes ", out)
        assert "it has heard of 2 of 2 members, at most" in out
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=DEADLINE_S)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.communicate()  # closes its pipes, which would else be a warning in another test

    assert running.returncode == 0  # paused
    wait_for(lambda: not members_of(place))
    assert not (place / "summary.json").exists()
    code, out, _ = p2pfl("up", "--resume", place, "--json")

    assert (code, json.loads(out)["engine"], json.loads(out)["rounds"]) == (0, "daemons", 300)
    events = [event["event"] for event in read_run(place).events]
    assert events.count("resumed") == 2


# ---- the others print JSON and nothing else, too


def test_an_institutions_commands_print_json(folder, p2pfl):
    for name in ("basel", "bern"):
        code, out, _ = p2pfl("keys", "new", "--name", name, "--address", f"tcp://{name}.example:7700", "--out", name, "--json")

        assert (code, json.loads(out)["name"]) == (0, name)
    (folder / "study-of-two.yaml").write_text("task: {name: averaging}\nrounds: 3\n")
    cards = [argument for name in ("basel", "bern") for argument in ("--card", f"{name}/card.yaml")]
    digest = json.loads(p2pfl("study", "new", "study-of-two.yaml", *cards, "--json")[1])["digest"]
    shown = json.loads(p2pfl("study", "show", "study.yaml", "--json")[1])

    assert (shown["digest"], [member["name"] for member in shown["members"]]) == (digest, ["basel", "bern"])
    joined = json.loads(p2pfl("study", "join", "study.yaml", "--keys", "basel", "--confirm", digest, "--json")[1])

    row = {"name": "x", "shape": [10], "dtype": "float64", "trains": True, "travels": True}
    assert joined == {"site": "site.yaml", "member": "basel", "digest": digest, "layout": [row]}
    assert json.loads(p2pfl("keys", "show", "basel", "--json")[1])["name"] == "basel"
    code, _, err = p2pfl("node", "status", "site.yaml", "--json")

    assert code == 2
    assert "no node is running here" in err


def test_keys_may_have_several_addresses(folder, p2pfl):
    given = ["tcp://node.basel.example:7700", "tcp://[2001:db8::7]:7700"]
    options = [argument for address in given for argument in ("--address", address)]

    assert json.loads(p2pfl("keys", "new", "--name", "basel", *options, "--out", "two", "--json")[1])["address"] == given
    assert f"address      {', '.join(given)}\n" in p2pfl("keys", "show", "two")[1]
    assert json.loads(p2pfl("keys", "new", "--name", "basel", *options[:2], "--out", "one", "--json")[1])["address"] == given[0]


def test_results_print_json(folder, p2pfl):
    simulate("learning.yaml", out="run")
    page = json.loads(p2pfl("inspect", "run", "--json")[1])

    assert (page["engine"], len(page["rounds"])) == ("simulator", 2)
    (folder / "rows.csv").write_text("nothing\n1\n")
    code, _, err = p2pfl("predict", "run", "rows.csv", "--node", "hospital-0", "--json")

    assert code == 2
    assert "the header lacks mean radius" in err
    code, _, err = p2pfl("predict", "run", "rows.csv", "--node", "hospital-9")

    assert code == 2
    assert "hospital-0, hospital-1, hospital-2" in err


@pytest.mark.parametrize(
    "arguments", [["topology", "list"], ["topology", "show", "ring"], ["topology", "compare", "ring", "star"], ["data", "list"]]
)
def test_lists_print_json(arguments, folder, p2pfl):
    code, out, err = p2pfl(*arguments, "--json")

    assert (code, err) == (0, "")
    assert json.loads(out)
    code, out, _ = p2pfl(*arguments)

    assert code == 0
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(out)
