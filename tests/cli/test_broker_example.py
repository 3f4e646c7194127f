"""examples/mqtt/README.md, followed to the letter but for ports, which the system chooses here."""

from __future__ import annotations

import re
import shlex
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from commands import run_here
from mosquitto import Mosquitto
from networks import start_process
from p2pfl.runs.records import read_run
from p2pfl.transports import reserve_port

EXAMPLE = Path(__file__).parents[2] / "examples" / "mqtt"
DEADLINE_S = 120
COMMAND = re.compile(r"^    (terminal \d)?\$ (.*)$", re.MULTILINE)
DIGEST = re.compile(r"^digest +((?:[0-9a-f]{4}\s+){16})", re.MULTILINE)
LINE_OF_SITE = re.compile(r"^    (mqtt: .*)$", re.MULTILINE)
NODES = ("hospital-0", "hospital-1", "hospital-2")


def words(command):
    """The arguments that a command gives p2pfl."""
    program, *found = shlex.split(command)
    assert program == "p2pfl"
    return found


@pytest.mark.slow
def test_the_walk_through_ends_as_it_says(tmp_path, monkeypatch, capfd):
    with ExitStack() as held:
        broker = Mosquitto()
        held.callback(broker.close)
        ports = {"18830": str(broker.port), "17701": str(held.enter_context(reserve_port()).port)}
        for file in EXAMPLE.iterdir():
            shutil.copy(file, tmp_path)
        text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
        configuration = (EXAMPLE / "mosquitto.conf").read_text(encoding="utf-8")
        assert all(port in text for port in ports)
        for given, chosen in ports.items():
            text, configuration = text.replace(given, chosen), configuration.replace(given, chosen)
        broker.configuration.write_text(configuration + "user root\n", encoding="utf-8")
        broker.start()
        monkeypatch.chdir(tmp_path)
        shown = digest = ""
        for terminal, command in COMMAND.findall(text):
            if not terminal:
                code, said, faults = run_here(*words(command.replace("DIGEST", digest)), monkeypatch=monkeypatch, capfd=capfd)
                assert code == 0, faults
                shown += said
                digest = " ".join(DIGEST.findall(shown)[-1].split()) if "study new" in command else digest
        assert re.search(r"hospital-1 - hospital-2 +│ mqtt\b", shown), shown
        (line,) = LINE_OF_SITE.findall(text)
        for name in ("hospital-1", "hospital-2"):
            with (tmp_path / name / "site.yaml").open("a", encoding="utf-8") as site:
                site.write(f"{line}\n")
        starts = [command for terminal, command in COMMAND.findall(text) if terminal and "node start" in command]
        assert [words(command)[-1] for command in starts] == [f"{name}/site.yaml" for name in NODES]
        nodes = {name: start_process(*words(command), log=tmp_path / f"{name}.log") for name, command in zip(NODES, starts, strict=True)}
        for node in nodes.values():
            held.callback(node.wait)
            held.callback(node.kill)
        codes = [node.wait(DEADLINE_S) for node in nodes.values()]
        said = [(tmp_path / f"{name}.log").read_text(encoding="utf-8") for name in NODES]

        assert codes == [0, 0, 0], said
        assert all(text.rstrip().endswith("stopped: rounds") for text in said), said
        assert [read_run(tmp_path / name / "state" / "run").summary["stop_reason"] for name in NODES] == ["rounds"] * 3
