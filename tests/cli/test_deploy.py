"""examples/deploy and release/wheelhouse.py: a node as a service, in a container, and installed without a network."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

from commands import run_here
from p2pfl.cli import app
from p2pfl.cli.streams import JsonFormatter, JsonLines

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
UNIT = DEPLOY / "p2pfl-node.service"
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
DEADLINE_S = 240.0
EXPOSURE = 20
"""systemd's own score of a unit, of 100; a service with an account alone has 92."""


def settings(unit: Path) -> dict[str, str]:
    """Every key of a unit file with its last value."""
    lines = [line for line in unit.read_text().splitlines() if line and not line.startswith(("#", "["))]
    return dict(line.split("=", 1) for line in lines)


def option_names(*path: str) -> set[str]:
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize(
    "words", [settings(UNIT)["ExecStart"].split(), ["", *json.loads((DEPLOY / "Dockerfile").read_text().rpartition("CMD ")[2])]]
)
def test_the_command_that_is_started_is_one_of_ours(words):
    assert words[1:3] == ["node", "start"]
    assert {word for word in words[3:] if word.startswith("--")} <= option_names("node", "start")


def test_what_does_not_get_better_by_itself_is_not_started_again():
    unit = settings(UNIT)

    assert (unit["Restart"], unit["RestartPreventExitStatus"], unit["User"]) == ("on-failure", "2 3", "p2pfl")


def as_it_would_lie(folder: Path) -> Path:
    """The unit with a program that is there on this machine."""
    place = folder / UNIT.name
    place.write_text(UNIT.read_text().replace("/opt/p2pfl/bin/p2pfl", shutil.which("true") or "/bin/true"))
    return place


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", as_it_would_lie(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    about_it = [line for line in (done.stdout + done.stderr).splitlines() if UNIT.name in line]

    assert about_it == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_the_unit_has_few_rights(tmp_path):
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager", as_it_would_lie(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    if "Unknown" in done.stderr or "unrecognized" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at a unit that is not loaded")

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_the_containers_files_belong_together():
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["node"]
    dockerfile = (DEPLOY / "Dockerfile").read_text()

    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert f"USER {service['user']}" in dockerfile
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert "--require-hashes" in dockerfile


def test_every_file_for_deployment_is_on_the_page():
    named = set(re.findall(r"\.\./examples/deploy/([\w.-]+)", PAGE))

    assert {path.name for path in DEPLOY.iterdir()} == named
    assert "macOS" in PAGE


def record(message, *args, error=None):
    made = logging.LogRecord("p2pfl.node", logging.INFO, __file__, 1, message, args, error and (type(error), error, None))
    made.created = 1_790_000_000.25
    return made


def test_a_line_of_the_log_is_json_with_its_time_in_utc():
    line = JsonFormatter().format(record("round %d:\n\x1b[31mred", 7))

    assert "\n" not in line
    assert "\x1b" not in line
    assert json.loads(line) == {
        "time": "2026-09-21T14:13:20.250Z",
        "level": "INFO",
        "logger": "p2pfl.node",
        "message": "round 7:\n\x1b[31mred",
    }


def test_a_traceback_is_part_of_the_line():
    assert "ValueError: it broke" in json.loads(JsonFormatter().format(record("failed", error=ValueError("it broke"))))["traceback"]


def printed_as_json(text):
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(line["time"].endswith("Z") for line in lines)
    return [(line["level"], line["message"]) for line in lines]


def test_each_text_on_a_stream_of_json_lines_is_one_line():
    inner = io.StringIO()
    stream = JsonLines(inner, logging.ERROR)
    print("in", "pieces", file=stream)
    stream.write("two\nfaults\n")
    stream.write("\n")
    stream.write("without an end")
    stream.flush()

    assert printed_as_json(inner.getvalue()) == [("ERROR", "in pieces"), ("ERROR", "two\nfaults"), ("ERROR", "without an end")]


@pytest.mark.parametrize("option", [["--log-format", "json"], ["--log-format=json"]])
@pytest.mark.parametrize("fault", ["site.yaml", "option"])
def test_an_error_that_ends_a_node_is_json_where_the_log_is(option, fault, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    arguments = [tmp_path / "site.yaml"] if fault == "site.yaml" else [tmp_path / "site.yaml", "--unheard-of"]
    try:
        code, said, errors = run_here("node", "start", *arguments, *option, monkeypatch=monkeypatch, capfd=capfd)
    finally:
        logging.captureWarnings(False)
    named = "p2pfl: " if fault == "site.yaml" else "No such option: --unheard-of"

    assert (code, said) == (2, "")
    assert named in printed_as_json(errors)[-1][1]


NOISY = """
import logging, sys, warnings
from p2pfl.cli import main
from p2pfl.node import start

def noisy(*_, **__):
    logging.getLogger("p2pfl.node").info("round %d", 7)
    warnings.warn("it is old", DeprecationWarning)
    print("stopped: paused")
    raise ValueError("it broke")

start.start = noisy
sys.argv = ["p2pfl", "node", "start", "site.yaml", "--log-format", "json"]
main()
"""


def test_all_that_a_process_prints_is_json():
    ended = subprocess.run([sys.executable, "-W", "default", "-c", NOISY], capture_output=True, text=True, timeout=60, check=False)
    (info, round_7), (warning, old), (critical, broke) = printed_as_json(ended.stderr)

    assert printed_as_json(ended.stdout) == [("INFO", "stopped: paused")]
    assert (info, round_7) == ("INFO", "round 7")
    assert (warning, "DeprecationWarning: it is old" in old) == ("WARNING", True)
    assert (critical, broke) == ("CRITICAL", "ValueError: it broke")
    assert "Traceback" in json.loads(ended.stderr.splitlines()[-1])["traceback"]


TRIED = ["typer", "rich", "click", "shellingham", "annotated-doc", "markdown-it-py", "mdurl", "Pygments", "typing_extensions"]
"""Enough for `p2pfl --version`: a trial must not move torch."""


@pytest.mark.slow
def test_a_wheelhouse_is_made_and_installed_without_an_index(tmp_path):
    house, venv = tmp_path / "wheelhouse", tmp_path / "venv"
    only = [part for name in TRIED for part in ("--only", name)]
    made = subprocess.run(
        [sys.executable, ROOT / "release" / "wheelhouse.py", house, *only], capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    if "No matching distribution" in made.stderr or "Could not find a version" in made.stderr:
        pytest.skip("no package index can be reached from here")
    assert made.returncode == 0, made.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=DEADLINE_S)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--no-deps", "--no-index", "--find-links", house]

    install = [*pip, "--require-hashes", "-r", house / "requirements.txt"]
    isolated = {"PATH": "/usr/bin:/bin", "PIP_CONFIG_FILE": "/dev/null", "HOME": str(tmp_path)}
    wheel = next(house.glob("rich-*.whl"))
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused = subprocess.run(install, capture_output=True, text=True, check=False, timeout=DEADLINE_S, env=isolated)
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr

    wheel.write_bytes(whole)
    subprocess.run(install, check=True, capture_output=True, timeout=DEADLINE_S, env=isolated)
    said = subprocess.run(
        [venv / "bin" / "p2pfl", "--version"], capture_output=True, text=True, check=True, timeout=DEADLINE_S, env=isolated
    )
    assert said.stdout.startswith("p2pfl 0.")
