"""examples/mqtt/README.md, followed to the letter but for ports, which the system chooses here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from mosquitto import Mosquitto
from p2pfl.transports import reserve_port

EXAMPLE = Path(__file__).parents[2] / "examples" / "mqtt"
DEADLINE_S = 120
COMMAND = re.compile(r"^    (terminal \d)?\$ (.*)$", re.MULTILINE)
DIGEST = re.compile(r"^digest +((?:[0-9a-f]{4}\s+){16})", re.MULTILINE)
LINE_OF_SITE = re.compile(r"^    (mqtt: .*)$", re.MULTILINE)
NODES = ("centre", "north", "south")


def words(command):
    """A command as an argument list: p2pfl of this Python."""
    found = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
    assert found[0] == "p2pfl", command
    return [sys.executable, "-m", *found]


@pytest.mark.slow
def test_the_walk_through_ends_as_it_says(tmp_path):
    with ExitStack() as held:
        broker = Mosquitto()
        held.callback(broker.close)
        ports = {"18830": str(broker.port), "17701": str(held.enter_context(reserve_port()).port)}
        for file in EXAMPLE.iterdir():
            shutil.copy(file, tmp_path)
        text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
        assert all(text.count(port) >= 1 for port in ports)
        configuration = (EXAMPLE / "mosquitto.conf").read_text(encoding="utf-8") + "user root\n"
        for given, chosen in ports.items():
            text, configuration = text.replace(given, chosen), configuration.replace(given, chosen)
        broker.configuration.write_text(configuration, encoding="utf-8")
        broker.start()
        settings = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parents[1])}, "text": True}

        def run(command):
            done = subprocess.run(
                words(command), timeout=DEADLINE_S, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings
            )
            assert done.returncode == 0, done.stdout
            return done.stdout

        commands = [(bool(terminal), command) for terminal, command in COMMAND.findall(text)]
        shown = digest = ""
        for waits, command in commands:
            if not waits:
                shown += run(command.replace("DIGEST", digest))
                digest = " ".join(DIGEST.findall(shown)[-1].split()) if "study new" in command else digest
        assert re.search(r"north - south +│ mqtt\b", shown), shown
        (line,) = LINE_OF_SITE.findall(text)
        for name in ("north", "south"):
            with (tmp_path / name / "site.yaml").open("a", encoding="utf-8") as site:
                site.write(f"{line}\n")
        starts = [command for waits, command in commands if waits and "node start" in command]
        assert [command.split()[-1] for command in starts] == [f"{name}/site.yaml" for name in NODES]
        logs = [held.enter_context((tmp_path / f"{name}.log").open("w+")) for name in NODES]
        nodes = [subprocess.Popen(words(command), stdout=log, stderr=log, **settings) for command, log in zip(starts, logs, strict=True)]
        for node in nodes:
            held.callback(node.wait)
            held.callback(node.kill)
        codes = [node.wait(DEADLINE_S) for node in nodes]
        said = [(tmp_path / f"{name}.log").read_text(encoding="utf-8") for name in NODES]

        assert codes == [0, 0, 0], said
        assert all(text.rstrip().endswith("stopped: rounds") for text in said), said
