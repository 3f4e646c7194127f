"""Text from elsewhere on its way to a terminal: what would steer it is shown and does nothing."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import sys
from pathlib import Path

import pytest

import p2pfl
from p2pfl.cli import main
from p2pfl.cli.streams import OneLineFormatter, VisibleText
from p2pfl.cli.terminal import open_console
from p2pfl.errors import ConfigError, on_one_line, visible
from p2pfl.experiment.loading import experiment_from
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.topology import make, weighted
from p2pfl.yaml_files import dump_yaml

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066\x85\x7f\r\b"
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
CLI = Path(p2pfl.__file__).parent / "cli"


def run(*arguments, monkeypatch, capsys):
    """Exit code, standard output and standard error of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["p2pfl", *map(str, arguments)])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # put back what main wraps
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


@pytest.fixture
def study(tmp_path):
    """The content of a study's file."""
    experiment = experiment_from({"name": "calm", "task": {"name": "breast-cancer"}, "nodes": 2})
    cards = [Identity.new().card(name, f"tcp://127.0.0.1:770{i}") for i, name in enumerate("ab")]
    return Study.create(experiment.as_dict(), cards, weighted(make("path", 2), "metropolis").renamed(["a", "b"])).as_dict()


def saved(study, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(study), encoding="utf-8")  # every escape of it is YAML's, too
    return path


@pytest.mark.parametrize("number", [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xDC80])
def test_everything_that_steers_a_terminal_becomes_an_escape(number):
    sign = chr(number)

    assert on_one_line(f"a{sign}b") == f"a\\u{ord(sign):04x}b"
    assert visible(f"a{sign}b") == (f"a{sign}b" if sign in "\n\t" else f"a\\u{ord(sign):04x}b")


@pytest.mark.parametrize("text", ["", "plain", "é ü 名前 ≤ │ ━ ⠋ 👩‍⚕️", "two\nlines\tand a tab", "a\xa0b"])
def test_text_that_steers_nothing_is_left_alone(text):
    assert visible(text) == text


def test_a_json_document_stays_one():
    document = {"name": HOSTILE}

    assert json.loads(visible(json.dumps(document))) == document
    assert json.loads(visible(json.dumps(document, ensure_ascii=False))) == document


def test_a_hostile_graph_name_is_shown_and_does_nothing(study, tmp_path, monkeypatch, capsys):
    study["graph"]["name"] = HOSTILE + "\ndigest   0000"
    code, out, err = run("study", "show", saved(study, tmp_path), monkeypatch=monkeypatch, capsys=capsys)

    assert (code, err) == (0, "")
    assert not STEERING.search(out)
    assert "\\u001b" in out
    assert [line for line in out.splitlines() if line.startswith("digest")] == [out.splitlines()[-3]]


@pytest.mark.parametrize("field", ["name", "key", "value", "unknown key"])
def test_hostile_names_in_an_error_do_nothing(study, tmp_path, monkeypatch, capsys, field):
    if field == "name":
        study["experiment"]["name"] = HOSTILE
    elif field == "unknown key":
        study[HOSTILE + "\np2pfl: all is well"] = 1
    else:
        study["experiment"]["task"][HOSTILE + "\np2pfl: all is well" if field == "key" else "fraction"] = HOSTILE
    code, out, err = run("study", "show", saved(study, tmp_path), monkeypatch=monkeypatch, capsys=capsys)

    assert (code, out) == (2, "")
    assert not STEERING.search(err)
    assert "\\u001b" in err or "\\x1b" in err
    assert [line for line in err.splitlines() if line.startswith("p2pfl: all")] == []


def test_a_hostile_card_does_nothing(tmp_path, monkeypatch, capsys):
    card = Identity.new().card("a").as_dict()
    (tmp_path / "card.yaml").write_text(json.dumps(card | {"name": HOSTILE, HOSTILE: HOSTILE}), encoding="utf-8")
    code, out, err = run("keys", "show", tmp_path / "card.yaml", monkeypatch=monkeypatch, capsys=capsys)

    assert (code, out) == (2, "")
    assert not STEERING.search(err)


def test_the_resolved_experiment_of_a_dry_run_does_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "graph.yaml").write_text("nodes: [a\\u001b, b]\nedges: [[a\\u001b, b]]\n")
    content = {"name": "calm", "task": {"name": "averaging"}, "nodes": 2, "topology": {"file": "graph.yaml", HOSTILE: HOSTILE}}
    (tmp_path / "e.yaml").write_text(dump_yaml(content), encoding="utf-8")
    _, out, err = run("simulate", tmp_path / "e.yaml", "--dry-run", monkeypatch=monkeypatch, capsys=capsys)

    assert not STEERING.search(out + err)


def test_a_log_line_is_one_line():
    record = logging.LogRecord("p2pfl", logging.WARNING, __file__, 1, "event %s", (HOSTILE + "\n2026 WARNING forged",), None)
    line = OneLineFormatter("%(levelname)s: %(message)s").format(record)

    assert not STEERING.search(line)
    assert len(line.splitlines()) == 1


def test_a_traceback_in_a_log_keeps_its_lines():
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.LogRecord("p2pfl", logging.WARNING, __file__, 1, "it failed", (), sys.exc_info())

    assert len(OneLineFormatter("%(message)s").format(record).split("\n")) > 3


def test_a_console_keeps_its_own_styles_and_shows_the_rest(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", VisibleText(stream))
    open_console(force_terminal=True, color_system="standard", width=200).print(f"a{HOSTILE}b", style="bold", markup=False, highlight=False)
    inner = stream.getvalue().removeprefix("\x1b[1m").removesuffix("\x1b[0m\n")

    assert stream.getvalue().startswith("\x1b[1ma")
    assert not STEERING.search(inner)


def test_nothing_gets_past_a_guarded_stream(monkeypatch):
    stream = io.StringIO()
    guarded = VisibleText(stream)
    monkeypatch.setattr(sys, "stdout", guarded)
    print(HOSTILE)  # noqa: T201

    assert not STEERING.search(stream.getvalue())
    assert not hasattr(guarded, "buffer")


def test_one_place_makes_consoles():
    made = set()
    for path in (p for folder in (CLI, CLI.parent / "inspector") for p in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"Console", "VisibleConsole"}:
                made.add(path.name)

    assert made == {"terminal.py"}


def test_a_finding_is_one_line():
    error = ConfigError(["a\nb", "c\x1b"], "file\x1b\n")

    assert len(str(error).splitlines()) == 3
    assert not STEERING.search(str(error))
