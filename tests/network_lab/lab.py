"""Hosts in network namespaces of their own, as a test has them: inside `with`, which leaves nothing behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
from packets import Flow, Packet, streams

ROUTER, NODES = (Path(__file__).with_name(name) for name in ("router.py", "nodes_at_hosts.py"))
DEADLINE_S = 120.0


class Lines:
    """A process that is told what to do in lines of JSON, and answers in such lines."""

    def __init__(self, *command: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment)
        self.pid = self._process.pid
        self.said: list[dict[str, Any]] = []
        self._half = b""

    def order(self, **words: Any) -> None:
        self._process.stdin.write(json.dumps(words).encode() + b"\n")

    def answer(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a line."""
        end_s = time.monotonic() + DEADLINE_S
        while not (found := [words for words in self.said if fits(words)]):
            left_s = end_s - time.monotonic()
            assert left_s > 0, "no answer"
            assert self.hear(left_s), "it has ended"
        return found[-1]

    def hear(self, wait_s: float) -> bool:
        """Take what has been said, and wait so long for the first of it; False if no more will be."""
        while select.select([self._process.stdout], [], [], wait_s)[0]:
            more = os.read(self._process.stdout.fileno(), 65536)
            *lines, self._half = (self._half + more).split(b"\n")
            self.said += [json.loads(line) for line in lines]
            wait_s = 0.0
            if not more:
                return False
        return True

    def close(self) -> None:
        """Have it end."""
        if self._process.stdin.closed:
            return
        self._process.stdin.close()
        try:
            while self.hear(DEADLINE_S):
                pass
            self._process.wait(DEADLINE_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()


class LabProcess:
    """A process at a host; as much of `subprocess.Popen` as tests need."""

    def __init__(self, lines: Lines, key: str) -> None:
        assert not any(words.get("started") == key for words in lines.said), f"{key} was started before"
        self._lines, self._key = lines, key
        self.pid: int = lines.answer(lambda words: words.get("started") == key)["pid"]

    def poll(self) -> int | None:
        self._lines.hear(0.0)
        return next((words["code"] for words in self._lines.said if words.get("ended") == self._key), None)

    def wait(self, timeout: float = DEADLINE_S) -> int:
        end_s = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < end_s, f"{self._key} has not ended"
            time.sleep(0.02)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        self._lines.order(signal=self._key, number=int(number))

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class NetworkLab:
    """Hosts, each in a namespace of its own, and a router between them; the test is skipped where that cannot be.

    Args:
        hosts: their names.
        place: a folder for what the router writes.
        closed: hosts that let no connection in.
        only_to: by host, the only others that it reaches.
        apart: pairs between which nothing passes.
        wires: of `packets.Wires`.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        place: Path,
        *,
        closed: Iterable[str] = (),
        only_to: Mapping[str, Iterable[str]] | None = None,
        apart: Iterable[tuple[str, str]] = (),
        **wires: Any,
    ) -> None:
        self.addresses = {host: f"10.77.0.{number}" for number, host in enumerate(hosts, 1)}
        self.counters: dict[str, int] = {}
        self._capture = place / "packets"
        rules = {
            "closed": list(closed),
            "only_to": {host: list(others) for host, others in (only_to or {}).items()},
            "apart": [list(pair) for pair in apart],
        }
        self._settings = {"hosts": self.addresses, "firewall": rules, "wires": wires, "capture": str(self._capture)}
        self._nodes: Lines | None = None

    def __enter__(self) -> Self:
        self._router = Lines(sys.executable, str(ROUTER), json.dumps(self._settings))
        try:
            said = self._router.answer(lambda words: "ready" in words or "refused" in words)
        except BaseException:
            self.close()
            raise
        if "refused" in said:
            self.close()
            pytest.skip(f"no network namespaces here: {said['refused']}")
        self._namespaces: dict[str, int] = said["namespaces"]
        self._enters: list[str] = ["nsenter", f"--user=/proc/{self._router.pid}/ns/user", "--preserve-credentials"] if said["user"] else []
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the router and all processes at its hosts."""
        for lines in (self._nodes, self._router):
            if lines is not None:
                lines.close()
        self.counters = next((words["counters"] for words in self._router.said if "counters" in words), {})

    def start(self, host: str, key: str, *command: str, log: Path) -> LabProcess:
        """Start a process at a host; *key* is its name here, and no other's."""
        self._router.order(start=key, host=host, command=command, log=str(log))
        return LabProcess(self._router, key)

    def start_node(self, host: str, key: str, *arguments: str, log: Path) -> LabProcess:
        """Start `p2pfl` at a host, in a process that is forked from one that has imported it."""
        if self._nodes is None:
            self._nodes = Lines(*self._enters, sys.executable, str(NODES), " " * 4096)
            assert self._nodes.answer(lambda words: "ready" in words)["unfit"] is None
        namespace = f"/proc/{self._router.pid}/fd/{self._namespaces[host]}"
        self._nodes.order(start=key, arguments=[namespace, *arguments], log=str(log))
        return LabProcess(self._nodes, key)

    def packets(self) -> Iterator[Packet]:
        """Every packet that passed the firewall, lost ones as well; after `close`."""
        with self._capture.open("rb") as file:
            while size := file.read(4):
                yield Packet.read(file.read(int.from_bytes(size, "big")))

    def streams(self) -> dict[Flow, list[bytes]]:
        """What was said over each direction of each connection, by names of hosts; after `close`."""
        names = {address: host for host, address in self.addresses.items()}
        return {(names[a], p, names[b], q): said for (a, p, b, q), said in streams(self.packets()).items()}
