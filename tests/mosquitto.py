"""A broker for the tests: Debian's mosquitto on a free port of this machine."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from p2pfl.transports import Broker, reserve_port

DEADLINE_S = 20.0


def program() -> str:
    """The path of mosquitto; skips the test where there is none."""
    found = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        assert os.environ.get("P2PFL_NEED_MOSQUITTO") != "1", "mosquitto is not installed: apt-get install mosquitto"
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    return found


def passwords(folder: Path, **of: str) -> Path:
    """A file of users and their passwords as mosquitto reads it: PBKDF2 with SHA-512, 101 rounds."""
    lines = []
    for user, password in of.items():
        salt = os.urandom(12)
        digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, 101)
        lines.append(f"{user}:$7$101${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}\n")
    file = folder / "broker-passwords"
    file.write_text("".join(lines), encoding="utf-8")
    return file


class Mosquitto:
    """A broker that runs from `start` to `stop`, any number of times at the same port.

    Args:
        listener: lines of its configuration for the listener.
        everywhere: lines that stand before the listener.
    """

    def __init__(self, listener: Iterable[str] = ("allow_anonymous true",), everywhere: Iterable[str] = ()) -> None:
        self.program = program()
        self.folder = Path(tempfile.mkdtemp(prefix="broker-"))
        self.held = reserve_port()
        self.port = self.held.port
        lines = ["user root", "persistence false", "log_type none", *everywhere, f"listener {self.port} 127.0.0.1", *listener]
        self.configuration = self.folder / "mosquitto.conf"
        self.configuration.write_text("\n".join([*lines, ""]), encoding="utf-8")
        self.process: subprocess.Popen[bytes] | None = None

    def broker(self, **settings: Any) -> Broker:
        """How members reach it."""
        return Broker(**{"host": "127.0.0.1", "port": self.port, "tls": False, **settings})

    def start(self) -> Mosquitto:
        self.process = subprocess.Popen([self.program, "-c", str(self.configuration)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end_s = time.monotonic() + DEADLINE_S
        while True:
            assert self.process.poll() is None, f"mosquitto has ended with {self.process.returncode}"
            assert time.monotonic() < end_s, "mosquitto does not listen"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.005)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(DEADLINE_S)
            self.process = None

    def close(self) -> None:
        self.stop()
        self.held.close()
        shutil.rmtree(self.folder)
