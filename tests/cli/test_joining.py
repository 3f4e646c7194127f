"""docs/joining.md, as institutions would follow it: separate folders, real commands and daemons, and public files alone change hands."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from p2pfl.transports import reserve_port

EXAMPLES = Path(__file__).parents[2] / "examples"
HOSPITALS = ("charite", "lausanne", "ucl")
EXPERIMENT = """\
name: stroke
task: {name: "custom_task:stroke"}
topology: {name: path}
algorithm: {name: dpsgd, local_steps: 2, batch_size: 16}
rounds: 5
stop: {relative_consensus: 1.0e-2, settle: 100}
"""
DEADLINE_S = 120


def command(folder, *arguments):
    return {
        "args": [sys.executable, "-m", "p2pfl", *map(str, arguments)],
        "cwd": folder,
        "env": {**os.environ, "PYTHONPATH": str(EXAMPLES), "OMP_NUM_THREADS": "1"},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


def run(folder, *arguments, code=0):
    done = subprocess.run(**command(folder, *arguments), timeout=DEADLINE_S, check=False)
    assert done.returncode == code, done.stdout
    return done.stdout


def write_patients(folder, first):
    """A hospital's own table, in its own folder; invented by arithmetic."""
    folder.mkdir(parents=True)
    with (folder / f"{folder.parent.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["age", "systolic_pressure", "diabetes", "atrial_fibrillation", "stroke"])
        for number in range(first, first + 60):
            age, pressure = 40 + number * 7 % 50, 110 + number * 11 % 70
            writer.writerow([age, pressure, int(number % 5 == 0), int(number % 7 == 0), int(age + pressure // 4 > 100)])


@pytest.fixture(scope="module")
def institutions(tmp_path_factory):
    """A folder for each hospital after it has joined, and the digest that they compared."""
    root = tmp_path_factory.mktemp("institutions")
    with ExitStack() as ports:
        for i, name in enumerate(HOSPITALS):
            write_patients(root / name / "tables", 17 * i)
            address = [] if name == "charite" else ["--address", ports.enter_context(reserve_port()).address]
            run(root / name, "keys", "new", "--name", name, *address)
        first = root / "ucl"
        (first / "stroke.yaml").write_text(EXPERIMENT)
        cards = []
        for name in HOSPITALS:
            cards += ["--card", shutil.copy(root / name / "keys" / "card.yaml", first / f"{name}.yaml")]
        digest = json.loads(run(first, "study", "new", "stroke.yaml", *cards, "--allow-task", "custom_task:stroke", "--json"))[
            "digest_groups"
        ]
        for name in HOSPITALS[:-1]:
            shutil.copy(first / "study.yaml", root / name)
        yield root, digest


@pytest.mark.slow
def test_institutions_join_start_and_agree(institutions):
    root, digest = institutions
    for name in HOSPITALS:
        assert json.loads(run(root / name, "study", "show", "study.yaml", "--json"))["digest_groups"] == digest
        run(root / name, "study", "join", "study.yaml", "--keys", "keys", "--confirm", digest)
        with (root / name / "site.yaml").open("a") as file:
            file.write("task: {data: ./tables}\nallow_tasks: ['custom_task:stroke']\ngreet_timeout_s: 60\n")
    with ExitStack() as processes:
        nodes = {
            name: processes.enter_context(subprocess.Popen(**command(root / name, "node", "start", "site.yaml"))) for name in HOSPITALS
        }
        try:
            output = {name: node.communicate(timeout=DEADLINE_S)[0] for name, node in nodes.items()}
        finally:
            for node in nodes.values():
                node.kill()

    assert {name: (node.returncode, output[name].splitlines()[-1]) for name, node in nodes.items()} == dict.fromkeys(
        HOSPITALS, (0, "stopped: converged")
    ), output
    assert all("greet_timeout_s in " in text and "it is require.within_s in the experiment now" in text for text in output.values())
    summaries = {name: json.loads((root / name / "state" / "run" / "summary.json").read_text()) for name in HOSPITALS}
    assert len({summary["rounds"] for summary in summaries.values()}) == 1
    for name in HOSPITALS:
        assert [path.name for path in (root / name / "state" / "run" / "models").iterdir()] == [f"{name}.safetensors"]
        assert list(summaries[name]["metrics"]["auroc"]["per_node"]) == [name]
    for name in HOSPITALS:
        private = (root / name / "keys" / "private.pem").read_text().splitlines()
        assert not [line for line in private if not line.startswith("---") and any(line in text for text in output.values())]


@pytest.mark.parametrize(
    ("confirmed", "told"), [("null", "required, but missing"), ("00" * 32, "the study in"), ("yes", "expected 64 hex digits")]
)
@pytest.mark.slow
def test_a_node_does_not_start_without_the_digest(institutions, confirmed, told):
    root, digest = institutions
    (root / "ucl" / "hasty.yaml").write_text(
        f"member: ucl\nstudy: study.yaml\nstate: hasty\nconfirmed: '{confirmed}'\n".replace("'null'", "null")
    )
    refused = run(root / "ucl", "node", "start", "hasty.yaml", code=2)

    assert told in refused
    assert not (root / "ucl" / "hasty").exists()
    assert digest not in refused


@pytest.mark.slow
def test_a_node_does_not_start_with_another_members_keys(institutions):
    root, digest = institutions
    (root / "ucl" / "thief.yaml").write_text(f"member: lausanne\nstudy: study.yaml\nstate: thief\nconfirmed: {digest}\n")

    assert "not those of lausanne in the study" in run(root / "ucl", "node", "start", "thief.yaml", code=2)
