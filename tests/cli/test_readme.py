"""README.md, as a newcomer would follow it: its blocks run from top to bottom, in one folder, and print what it says that they print."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from p2pfl.transports import reserve_port

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DEADLINE_S = 240
FENCE = re.compile(r"^(?:<!-- (?P<note>.*?) -->\n)?```(?P<language>\w+)\n(?P<content>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    language: str
    content: str
    note: str


BLOCKS = [Block(found["language"], found["content"], found["note"] or "") for found in FENCE.finditer(README.read_text(encoding="utf-8"))]


def in_order(wanted, printed):
    """Which wanted lines do not follow each other in what was printed; "..." stands for any number of lines."""
    rest = iter(" ".join(line.split()) for line in printed.splitlines())
    lines = [" ".join(line.split()) for line in wanted.splitlines()]
    return [line for line in lines if line not in ("", "...") and line not in rest]


@pytest.fixture
def newcomer(tmp_path):
    """A folder that has what a clone has, and the environment of an activated .venv."""
    for name in ("examples", "topologies"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}  # measured elsewhere, and slower
    return {"cwd": tmp_path, "env": {**inherited, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONPATH": str(tmp_path)}}


def run(block, ports, newcomer):
    """What a block prints."""
    if block.note.startswith("file: "):
        (newcomer["cwd"] / block.note.removeprefix("file: ")).write_text(block.content)
        return ""
    content = block.content
    for written, port in ports.items():
        content = content.replace(written, port.address)
    left_in = newcomer["cwd"] / "left-in"
    shell = ["bash", "-euo", "pipefail", "-c", f"{content}\npwd > '{left_in}'"]
    command = [sys.executable, "-c", content] if block.language == "python" else shell
    done = subprocess.run(command, **newcomer, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S, check=False)

    assert done.returncode == 0, f"{content}\n{done.stdout}"
    if left_in.exists():  # the next block goes on in the folder that this one ended in
        newcomer["cwd"] = Path(left_in.read_text().strip())
    return done.stdout


@pytest.mark.slow
def test_the_blocks_run_and_print_what_the_readme_says(newcomer):
    printed = ""
    with reserve_port() as one, reserve_port() as other:
        ports = {"tcp://127.0.0.1:7701": one, "tcp://127.0.0.1:7702": other}
        for block in BLOCKS:
            if block.language == "text":
                if block.note == "checked":
                    assert in_order(block.content, printed) == [], printed
            elif not block.note.startswith("not run by the tests"):
                printed = run(block, ports, newcomer)


def test_few_blocks_are_left_out():
    assert sum(block.note.startswith("not run by the tests") for block in BLOCKS) == 2
    assert sum(block.note == "checked" for block in BLOCKS) >= 4


def leads_somewhere(file, heading):
    """Whether a file is there and has the heading, if one is named."""
    if not (ROOT / file).exists():
        return False
    headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE) if heading else [""]
    return heading in [re.sub(r"[^a-z0-9 -]", "", text.lower()).replace(" ", "-") for text in headings]


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8"))

    assert targets
    assert [target for target in targets if not target.startswith("http") and not leads_somewhere(*target.partition("#")[::2])] == []
