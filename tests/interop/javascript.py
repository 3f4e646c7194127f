"""The node in JavaScript beside this file, as a process of a study whose other members are daemons."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from typer.testing import CliRunner

from networks import DEADLINE_S, Institutions, starts
from p2pfl.cli.study import app
from p2pfl.yaml_files import load_yaml

FOLDER = Path(__file__).parent


def need_node() -> str:
    """The program `node`; skips the test where it or its package is missing, and fails where they must be there."""
    program = shutil.which("node")
    missing = "node is not installed" if program is None else ""
    if program is not None and not (FOLDER / "node_modules" / "zeromq").is_dir():
        missing = f"its packages are missing; run: npm ci --ignore-scripts --prefix {FOLDER.relative_to(FOLDER.parents[1])}"
    if missing and os.environ.get("P2PFL_NEED_NODE"):
        pytest.fail(f"P2PFL_NEED_NODE is set, and {missing}")
    if missing or program is None:
        pytest.skip(missing)
    return program


class JavaScriptNode:
    """One member of some institutions that runs in JavaScript; it has the study, its own keys and its vector, and nothing else."""

    def __init__(self, program: str, institutions: Institutions, name: str, **settings: Any) -> None:
        self._program, self.name, place = program, name, institutions.place
        self.folder = place / name
        derived = place / "derived.json"
        said = CliRunner().invoke(app, ["show", str(place / "study.yaml"), "--json"])
        derived.write_text(said.output)
        plan = institutions.plan
        config = {
            "derived": str(derived),
            "member": name,
            "keys": str(self.folder / "keys" / "private.pem"),
            "listen": load_yaml(institutions.site(name))["listen"],
            "first": starts(plan)[plan.names.index(name)].numpy().tobytes().hex(),
            "state": str(self.folder / "state"),
            "deadline_s": 30,
            "linger_s": 20,
            **settings,
        }
        self._config = self.folder / "config.json"
        self._config.write_text(json.dumps(config))
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        with (self.folder / "node.log").open("ab") as log:
            command = [self._program, str(FOLDER / "node.mjs"), str(self._config)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(DEADLINE_S)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(DEADLINE_S)

    def exchange(self) -> int:
        """Where its checkpoint is; -1 before there is one. It must run."""
        assert self.process is None or self.process.poll() in (None, -9), self.log()
        path = self.folder / "state" / "state.json"
        return json.loads(path.read_text())["t"] if path.exists() else -1

    def log(self) -> str:
        return (self.folder / "node.log").read_text()

    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "state" / "result.json").read_text())

    def model(self) -> np.ndarray:
        return np.frombuffer(bytes.fromhex(self.result()["x"]), dtype=np.float64)
