"""A router in user space, in a process of its own: it makes one network namespace a host, and passes packets between their TUN devices.

It also starts the hosts' processes. Nothing here has a name in the system: namespaces and devices are gone with the last process that is in
them, and all these processes end with this one, which ends with its standard input.

    router.py SETTINGS                                  JSON: hosts, firewall, wires, capture
    {"start": KEY, "host": H, "command": [...], "log": FILE}     lines of standard input
    {"signal": KEY, "number": N}
    {"refused": WHY}                                    lines of standard output: no namespaces here
    {"ready": true, "namespaces": {H: DESCRIPTOR}, "user": false}     user: they are in a user namespace of this process
    {"started": KEY, "pid": N}
    {"ended": KEY, "code": N}
    {"counters": {...}}                                 the last one
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from packets import Firewall, Packet, Wires

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU, IFF_UP = 0x8914, 0x8916, 0x891C, 0x8922, 1  # linux/sockios.h, if.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h
DEVICE, MTU, NETMASK = "wan", 1500, "255.255.255.0"
LOOK_S = 0.05
AT_ONCE = 64

libc = ctypes.CDLL(None, use_errno=True)


class RefusedError(Exception):
    """This account may not make what is needed; the text says what."""


def called(name: str, *arguments: int) -> None:
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def become_able() -> bool:
    """Enter a user namespace where this account cannot make network namespaces as it is; whether it had to."""
    with suppress(OSError):
        called("unshare", CLONE_NEWNET)
        return False
    user, group = os.geteuid(), os.getegid()
    try:
        called("unshare", CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        called("unshare", CLONE_NEWNET)
    except OSError as error:
        raise RefusedError(f"neither network nor user namespaces can be made by this account: {error.strerror}") from error
    return True


def new_host(address: str) -> tuple[int, int]:
    """Make a namespace with one TUN device, its way to all others; descriptors of the namespace and of the device's other end."""
    called("unshare", CLONE_NEWNET)
    try:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    except OSError as error:
        raise RefusedError(f"/dev/net/tun: {error.strerror}") from error
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:

        def set_up(request: int, name: str, value: bytes) -> None:
            fcntl.ioctl(any_socket, request, struct.pack("16s24s", name.encode(), value))

        for request, numeric in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, NETMASK)):
            set_up(request, DEVICE, struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(numeric)))
        set_up(SIOCSIFMTU, DEVICE, struct.pack("i", MTU))
        for name in ("lo", DEVICE):
            set_up(SIOCSIFFLAGS, name, struct.pack("H", IFF_UP))
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC), device


class Router:
    """All hosts and what is under way between them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.addresses: dict[str, str] = settings["hosts"]
        of = self.addresses
        rules = settings["firewall"]
        self.firewall = Firewall(
            closed=frozenset(of[host] for host in rules["closed"]),
            only_to={of[host]: frozenset(of[other] for other in others) for host, others in rules["only_to"].items()},
            apart=frozenset(frozenset(of[host] for host in pair) for pair in rules["apart"]),
        )
        self.wires = Wires(**settings["wires"])
        self.counters: Counter[str] = Counter()
        self.processes: dict[int, str] = {}
        self.under_way: list[tuple[float, int, bool, Packet, bytes]] = []
        self.numbers = count()
        self.capture = Path(settings["capture"]).open("wb", buffering=2**20)  # noqa: SIM115
        self.commands = b""

    def open(self) -> None:
        self.is_user = become_able()
        made = {host: new_host(address) for host, address in self.addresses.items()}
        self.namespaces = {host: namespace for host, (namespace, _) in made.items()}
        self.devices = {self.addresses[host]: device for host, (_, device) in made.items()}

    def run(self) -> None:
        """Route until standard input ends."""
        poll = select.poll()
        poll.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
        for device in self.devices.values():
            poll.register(device, select.POLLIN)
        say(ready=True, namespaces=self.namespaces, user=self.is_user)
        next_look_s = 0.0
        while True:
            wait_s = LOOK_S
            if self.under_way:
                wait_s = min(wait_s, max(0.0, self.under_way[0][0] - time.monotonic()))
            for descriptor, _ in poll.poll(1000 * wait_s):
                if descriptor != sys.stdin.fileno():
                    self.read(descriptor)
                elif not self.obey():
                    return
            self.pass_on()
            if time.monotonic() > next_look_s:
                next_look_s = time.monotonic() + LOOK_S
                self.reap()

    def read(self, device: int) -> None:
        """Take what a host sends."""
        for _ in range(AT_ONCE):
            try:
                raw = os.read(device, 65536)
            except BlockingIOError:
                return
            packet = Packet.read(raw)
            if packet is None or packet.target not in self.devices:
                continue
            self.counters["sent"] += 1
            now_s = time.monotonic()
            if not self.firewall.lets_pass(packet):
                self.counters["refused"] += 1
                continue
            self.capture.write(len(raw).to_bytes(4, "big") + raw)
            self.add(self.wires.enter(packet, now_s), packet, raw, is_at_line=True)

    def add(self, due_s: float | None, packet: Packet, raw: bytes, *, is_at_line: bool) -> None:
        if due_s is None:
            self.counters["lost"] += 1
        else:
            heapq.heappush(self.under_way, (due_s, next(self.numbers), is_at_line, packet, raw))

    def pass_on(self) -> None:
        """Give the hosts what has come."""
        while self.under_way and self.under_way[0][0] <= time.monotonic():
            due_s, _, is_at_line, packet, raw = heapq.heappop(self.under_way)
            if is_at_line:
                self.add(self.wires.leave(packet, due_s), packet, raw, is_at_line=False)
            else:
                with suppress(OSError):  # its namespace is going
                    os.write(self.devices[packet.target], raw)
                self.counters["delivered"] += 1

    def obey(self) -> bool:
        """Do what the lines of standard input say; False at their end."""
        more = os.read(sys.stdin.fileno(), 65536)
        *lines, self.commands = (self.commands + more).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if "start" in order:
                self.start(order["start"], order["host"], order["command"], order["log"])
            else:
                for pid in [pid for pid, key in self.processes.items() if key == order["signal"]]:
                    os.kill(pid, order["number"])
        return bool(more)

    def start(self, key: str, host: str, command: list[str], log: str) -> None:
        parent = os.getpid()
        if pid := os.fork():
            self.processes[pid] = key
            say(started=key, pid=pid)
            return
        become(self.namespaces[host], command, log, parent)

    def reap(self) -> None:
        """Say which processes have ended."""
        while self.processes:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            say(ended=self.processes.pop(pid), code=os.waitstatus_to_exitcode(status))

    def close(self) -> None:
        """End every process, and write down what passed."""
        for pid in self.processes:
            os.kill(pid, signal.SIGKILL)
        for pid in self.processes:
            os.waitpid(pid, 0)
        self.capture.close()
        with suppress(BrokenPipeError):
            say(counters=self.counters)


def become(namespace: int, command: list[str], log: str, parent: int) -> NoReturn:
    """In a new process: enter a host and run a command there, no longer than the router runs."""
    try:
        called("setns", namespace, CLONE_NEWNET)
        called("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.getppid() != parent:
            os._exit(1)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, descriptor in enumerate((nothing, output, output)):
            os.dup2(descriptor, number)
        os.execvp(command[0], command)
    finally:
        os._exit(127)


def say(**words: Any) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this process
    router = Router(json.loads(sys.argv[1]))
    try:
        try:
            router.open()
        except RefusedError as error:
            say(refused=str(error))
            return
        router.run()
    finally:
        router.close()


if __name__ == "__main__":
    main()
