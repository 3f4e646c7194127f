"""A database server for the tests: Debian's PostgreSQL on a free port of this machine, in an account that is not root."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from p2pfl.transports import reserve_port

DEADLINE_S = 60.0
SUPERUSER_PASSWORD = "of the tests' superuser"


def program(name: str) -> str:
    """The path of one of PostgreSQL's programs; skips the test where there is none."""
    folders = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    found = shutil.which(name, path=":".join([*folders, os.environ.get("PATH", "")]))
    if found is None:
        assert os.environ.get("P2PFL_NEED_POSTGRESQL") != "1", f"{name} is not installed: apt-get install postgresql"
        pytest.skip(f"{name} is not installed: apt-get install postgresql")
    return found


def account() -> dict[str, Any]:
    """Whom the server runs as: it refuses to be root's."""
    if os.geteuid() != 0:
        return {}
    name = next((name for name in ("postgres", "nobody") if name in {each.pw_name for each in pwd.getpwall()}), None)
    if name is None:
        pytest.skip("PostgreSQL does not run as root, and there is neither an account postgres nor nobody")
    return {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []}


class PostgreSQL:
    """A server that runs from `start` to `close`, with accounts that log in by password."""

    def __init__(self) -> None:
        initdb, self.program = program("initdb"), program("postgres")
        self.account = account()
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))
        password = self.folder / "password"
        password.write_text(SUPERUSER_PASSWORD + "\n", encoding="utf-8")
        if self.account:
            for path in (self.folder, password):
                os.chown(path, pwd.getpwnam(self.account["user"]).pw_uid, -1)
        self.held = reserve_port()
        self.port = self.held.port
        arguments = ["--no-sync", "--auth=scram-sha-256", "--username=postgres", "--encoding=UTF8", "--no-locale", f"--pwfile={password}"]
        done = subprocess.run(
            [initdb, *arguments, "-D", str(self.folder / "data")],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
            cwd=self.folder,
            **self.account,
        )
        assert done.returncode == 0, done.stderr
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> PostgreSQL:
        settings = ["fsync=off", "listen_addresses=127.0.0.1", "unix_socket_directories=", "shared_buffers=16MB"]
        command = [self.program, "-D", str(self.folder / "data"), "-p", str(self.port)]
        command += [part for each in settings for part in ("-c", each)]
        log = (self.folder / "log").open("wb")
        with log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self.account)
        end_s = time.monotonic() + DEADLINE_S
        while True:
            said = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
            assert self.process.poll() is None, said
            assert time.monotonic() < end_s, said
            if "ready to accept connections" in said:
                return self
            time.sleep(0.01)

    def run(self, *statements: str, rows: Sequence[tuple[str, Sequence[Sequence[Any]]]] = ()) -> None:
        """Run statements as the superuser, and an insertion for each row of some."""
        import psycopg

        with psycopg.connect(host="127.0.0.1", port=self.port, user="postgres", password=SUPERUSER_PASSWORD, dbname="postgres") as link:
            for statement in statements:
                link.execute(statement.encode())
            for statement, values in rows:
                with link.cursor() as cursor:
                    cursor.executemany(statement.encode(), values)

    def one(self, query: str) -> Any:
        """The one value of a query, as the superuser sees it."""
        import psycopg

        with psycopg.connect(host="127.0.0.1", port=self.port, user="postgres", password=SUPERUSER_PASSWORD, dbname="postgres") as link:
            found = link.execute(query.encode()).fetchone()
        assert found is not None
        return found[0]

    def close(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)  # a fast shutdown, which waits for nobody
            try:
                self.process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(DEADLINE_S)
        self.held.close()
        shutil.rmtree(self.folder, ignore_errors=True)
