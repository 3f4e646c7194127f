"""What the tests' attackers send: ZMTP and CURVE by hand, for all that libzmq's own ends will not do, and floods of connections."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import zmq
from zmq.utils import z85

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)
SERVER_GREETING = GREETING[:32] + b"\1" + GREETING[33:]
COMMAND, LONG, MORE = 4, 2, 1
PROBE_METADATA = b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER" + b"\x08Identity" + struct.pack(">I", 0)
SERVER_METADATA = b"\x0bSocket-Type" + struct.pack(">I", 6) + b"ROUTER" + b"\x08Identity" + struct.pack(">I", 0)


@cache
def sodium() -> ctypes.CDLL | None:
    """The cryptography of CURVE: the library that pyzmq brings along, or the system's; None where there is neither."""
    bundled = sorted((Path(zmq.__file__).parent.parent / "pyzmq.libs").glob("libsodium*"))
    name = str(bundled[0]) if bundled else ctypes.util.find_library("sodium")
    return ctypes.CDLL(name) if name else None


def _call(function: str, size: int, *arguments: bytes | int) -> bytes:
    result = ctypes.create_string_buffer(size)
    wrapped = [ctypes.c_ulonglong(each) if isinstance(each, int) else each for each in arguments]
    if getattr(sodium(), function)(result, *wrapped) != 0:
        raise ConnectionError(f"{function}: not for these keys")
    return result.raw


def box(text: bytes, nonce: bytes, public: bytes, secret: bytes) -> bytes:
    return _call("crypto_box_easy", len(text) + 16, text, len(text), nonce, public, secret)


def opened(sealed: bytes, nonce: bytes, public: bytes, secret: bytes) -> bytes:
    return _call("crypto_box_open_easy", len(sealed) - 16, sealed, len(sealed), nonce, public, secret)


def new_keys() -> tuple[bytes, bytes]:
    public, secret = zmq.curve_keypair()
    return z85.decode(public), z85.decode(secret)


class RawCurve:
    """One end of an encrypted connection whose frames may be anything.

    Args:
        line: connected.
        keys: public and secret, z85.
        other: the other end's public key, z85; None: this end is the listener's, and takes anybody.
    """

    def __init__(self, line: socket.socket, keys: tuple[bytes, bytes], other: bytes | None) -> None:
        self.line = line
        self.line.settimeout(10.0)
        self._public, self._secret = (z85.decode(key) for key in keys)
        self._short = new_keys()
        self._count = 1
        if other is None:
            self._welcome()
        else:
            self._knock(z85.decode(other))

    def _knock(self, server: bytes) -> None:
        public, secret = self._short
        self.line.sendall(GREETING)
        self._exactly(64)
        counter = struct.pack(">Q", 1)
        hello = box(bytes(64), b"CurveZMQHELLO---" + counter, server, secret)
        self.command(b"\x05HELLO\x01\x00" + bytes(72) + public + counter + hello)
        welcome = self._frame()
        plain = opened(welcome[24:], b"WELCOME-" + welcome[8:24], server, secret)
        theirs, cookie = plain[:32], plain[32:]
        nonce = secrets.token_bytes(16)
        vouch = box(public + server, b"VOUCH---" + nonce, theirs, self._secret)
        counter = struct.pack(">Q", 2)
        initiate = box(self._public + nonce + vouch + PROBE_METADATA, b"CurveZMQINITIATE" + counter, theirs, secret)
        self.command(b"\x08INITIATE" + cookie + counter + initiate)
        answer = self._frame()
        if not answer.startswith(b"\x05READY"):
            raise ConnectionError(f"not let in: {answer[:10]!r}")
        self._begin(theirs, b"CurveZMQMESSAGEC")
        self._count = 2

    def _welcome(self) -> None:
        public, secret = self._short
        self.line.sendall(SERVER_GREETING)
        self._exactly(64)
        hello = self._frame()
        theirs = hello[80:112]
        nonce = secrets.token_bytes(16)
        cookie = bytes(96)
        self.command(b"\x07WELCOME" + nonce + box(public + cookie, b"WELCOME-" + nonce, theirs, self._secret))
        self._frame()
        counter = struct.pack(">Q", 1)
        self.command(b"\x05READY" + counter + box(SERVER_METADATA, b"CurveZMQREADY---" + counter, theirs, secret))
        self._begin(theirs, b"CurveZMQMESSAGES")

    def _begin(self, theirs: bytes, nonce: bytes) -> None:
        self._key = _call("crypto_box_beforenm", 32, theirs, self._short[1])
        self._nonce = nonce

    def packed(self, part: bytes, flags: int) -> bytes:
        """One encrypted frame as it goes over the wire."""
        self._count += 1
        counter = struct.pack(">Q", self._count)
        text = bytes([flags]) + part
        body = b"\x07MESSAGE" + counter
        body += _call("crypto_box_easy_afternm", len(text) + 16, text, len(text), self._nonce + counter, self._key)
        return (bytes([LONG]) + struct.pack(">Q", len(body)) if len(body) > 255 else bytes([0, len(body)])) + body

    def send(self, part: bytes, *, more: bool = False) -> None:
        self.line.sendall(self.packed(part, MORE if more else 0))

    def command(self, body: bytes) -> None:
        size = bytes([COMMAND | LONG]) + struct.pack(">Q", len(body)) if len(body) > 255 else bytes([COMMAND, len(body)])
        self.line.sendall(size + body)

    def _exactly(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            some = self.line.recv(size - len(found))
            if not some:
                raise ConnectionError("closed")
            found += some
        return found

    def _frame(self) -> bytes:
        flags = self._exactly(1)[0]
        size = struct.unpack(">Q", self._exactly(8))[0] if flags & LONG else self._exactly(1)[0]
        return self._exactly(size)


IP_BIND_ADDRESS_NO_PORT = 24
"""Of Linux; the socket module of Python 3.11 does not name it."""


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    """A connection with a node on this machine, from an address of the loopback network."""
    line = socket.socket()
    try:
        line.settimeout(5.0)
        # the system chooses the port when it connects: one that is reserved at another address could not be listened at any more
        line.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        line.bind((source, 0))
        with contextlib.suppress(BrokenPipeError):  # it was taken, and has been ended before this process could see so
            line.connect(("127.0.0.1", port))
    except OSError:
        line.close()
        raise
    return line


def member_at(port: int, keys: tuple[bytes, bytes], server: bytes) -> RawCurve:
    """An encrypted connection with a node by somebody who has a member's keys."""
    line = connect(port)
    try:
        return RawCurve(line, keys, server)
    except OSError:
        line.close()
        raise


def endless_message(member: RawCurve, part: bytes, most_bytes: int, until: Callable[[], bool] = lambda: False) -> int:
    """Send one message that never ends, part by part; bytes sent until the other end cut it off, or enough were."""
    sent = 0
    parts = max(1, 2**16 // (len(part) + 42))
    while sent < most_bytes and not until():
        packet = b"".join(member.packed(part, MORE) for _ in range(parts))
        try:
            member.line.sendall(packet)
        except OSError:
            break
        sent += len(packet)
    return sent


def silent_connections(port: int, number: int, rate: float, source: str = "127.0.0.1", hold: int = 5000) -> int:
    """Connect at a rate and say nothing, holding on to each; how many were made."""
    lines: list[socket.socket] = []
    began_s, made = time.monotonic(), 0
    while made < number:
        due = min(number, int((time.monotonic() - began_s) * rate) + 1)
        while made < due:
            with suppress(OSError):
                lines.append(connect(port, source))
            made += 1
            if len(lines) > hold:
                lines.pop(0).close()
        time.sleep(0.002)
    for line in lines:
        line.close()
    return made


def unfinished_command(size: int) -> bytes:
    """A greeting and the largest command that libzmq takes instead of the handshake's first, but for its last byte."""
    return GREETING + bytes([COMMAND | LONG]) + struct.pack(">Q", size) + b"\x05HELLO" + bytes(size - 7)


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no RssAnon")


def open_files_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208  # names only, and many


def wrong_key_handshakes(port: int, server: bytes, source: str, rate: float, is_over: Callable[[], bool]) -> int:
    """Whole handshakes at a rate with keys that nobody knows, each given up after 0.3 s; how many were begun."""
    began_s, begun = time.monotonic(), 0
    dealers: list[tuple[float, zmq.Socket[bytes]]] = []
    with zmq.Context() as context:
        context.set(zmq.MAX_SOCKETS, 4000)
        keys = [zmq.curve_keypair() for _ in range(20)]
        while not is_over():
            while begun < (time.monotonic() - began_s) * rate:
                dealer = context.socket(zmq.DEALER)
                dealer.linger, dealer.reconnect_ivl = 0, -1
                dealer.curve_publickey, dealer.curve_secretkey = keys[begun % len(keys)]
                dealer.curve_serverkey = server
                dealer.connect(f"tcp://{source}:0;127.0.0.1:{port}")
                dealers.append((time.monotonic(), dealer))
                begun += 1
            while dealers and time.monotonic() > dealers[0][0] + 0.3:
                dealers.pop(0)[1].close(0)
            time.sleep(0.002)
        for _, dealer in dealers:
            dealer.close(0)
    return begun
