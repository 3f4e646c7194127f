"""Members of a study that flood one of their neighbours: python flooding_member.py PLACE VICTIM.

PLACE is a folder as `networks.Institutions` makes it. A line MEMBER KIND SECONDS on standard input makes a member greet like an honest one
and print "greeted". After a second line it sends messages of one kind as fast as it can, and prints how many its own end of the link took.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, cycle
from pathlib import Path

import msgpack
import zmq

from p2pfl.experiment.loading import load_study
from p2pfl.governance.identity import Identity
from p2pfl.wire.codec import CHUNK_BYTES, decode, encode
from p2pfl.wire.messages import (
    NO_STOP,
    NOTHING_CLOSED,
    SCHEMA,
    Chunk,
    Goodbye,
    Heartbeat,
    Hello,
    Ready,
    Records,
    Report,
    ResendRequest,
    Update,
)
from p2pfl.wire.ready_record import ReadyRecord, packed
from p2pfl.wire.ready_record import seal as seal_ready
from p2pfl.wire.round_record import RoundRecord, seal

FLOODS = (
    "hello",
    "want",
    "alive",
    "signed_records",
    "deep_header",
    "wide_header",
    "wrong_digest",
    "chunks",
    "three_frames",
)
_DEADLINE_S = 120.0
_UNBELIEVABLE = 10**9


class FloodingMember:
    """One end of a link, with valid keys, that says what it likes."""

    def __init__(self, place: Path, me: str, victim: str) -> None:
        self.me, self.study = me, load_study(place / "study.yaml")
        self.identity = Identity.load(place / me / "keys", None)
        card = self.study.member(victim)
        self.link = zmq.Context.instance().socket(zmq.DEALER)
        self.link.curve_publickey = self.study.member(me).curve.encode()
        self.link.curve_secretkey = self.identity.curve_secret
        self.link.curve_serverkey = card.curve.encode()
        for option, number in {zmq.PROBE_ROUTER: 1, zmq.LINGER: 0, zmq.SNDHWM: 100, zmq.SNDTIMEO: 100}.items():
            self.link.setsockopt(option, number)
        self.link.connect(card.addresses[0])
        self.incarnation = secrets.randbelow(2**62) + 1
        self.heard: Hello | None = None
        self.update: tuple[Update, bytes] | None = None
        self.ready = self.readiness(place)

    def readiness(self, place: Path) -> Ready:
        """Word that all have started, in the name of each attacker: of all members but the first two."""
        num_members = len(self.study.names)
        sealed = []
        for number in range(2, num_members):
            signing = Identity.load(place / self.study.names[number] / "keys", None).signing
            everybody = {"links": packed(range(num_members - 1)), "started": packed(range(num_members))}
            record = ReadyRecord(member=number, began=1, number=0, **everybody)
            sealed.append(seal_ready(record, signing.sign, bytes.fromhex(self.study.digest)))
        return Ready(sealed=tuple(sealed), receipts=())

    def read(self) -> None:
        """Take what the victim has said; of it the newest Hello and the newest update are kept."""
        while self.link.poll(0):
            frames = self.link.recv_multipart()
            if frames == [b""]:
                continue  # a sign of life
            message, payload = decode(frames)
            if isinstance(message, Hello):
                self.heard = message
            elif isinstance(message, Update):
                self.update = message, bytes(payload)

    def hello(self) -> Hello:
        """Greeting with the victim's own digests."""
        assert self.heard is not None
        return replace(
            self.heard,
            member=self.me,
            incarnation=self.incarnation,
            echo=self.heard.incarnation,
            is_open=True,
            anew=0,
            exchange=0,
            report=NOTHING_CLOSED,
            stop=NO_STOP,
            remembered=replace(self.heard.remembered, anew=0, report=NOTHING_CLOSED),
        )

    def greet(self) -> None:
        """Open the link, and wait for an update of the victim."""
        end_s = time.monotonic() + _DEADLINE_S
        while self.update is None and time.monotonic() < end_s:
            self.link.poll(100)
            self.read()
            if self.heard is not None:
                self.say(encode(self.hello()))
                self.say(encode(self.ready))
        assert self.update is not None, "the victim has sent no update in time"

    def say(self, frames: list[bytes | memoryview]) -> bool:
        """Whether this end of the link took it."""
        try:
            self.link.send_multipart(frames, flags=zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def flood(self, frames: Iterator[list[bytes | memoryview]], seconds: float) -> int:
        """Send for some seconds; the number of messages that were taken."""
        end_s, taken, message = time.monotonic() + seconds, 0, next(frames)
        while time.monotonic() < end_s:
            if self.say(message):
                taken, message = taken + 1, next(frames)
            else:
                self.link.poll(5, zmq.POLLOUT)
            if taken % 64 == 0:
                self.read()
        return taken

    def messages(self, kind: str) -> Iterator[list[bytes | memoryview]]:
        """Messages of one kind without end."""
        assert self.update is not None
        update, payload = self.update
        if kind == "hello":
            while True:
                yield encode(self.hello())
        if kind.startswith("come_and_go"):
            pause_s = 0.5 if kind == "come_and_go_slowly" else 0.0
            while True:
                yield encode(Goodbye(reason="finished"))
                time.sleep(pause_s)
                self.read()
                yield encode(replace(self.hello(), exchange=0 if pause_s else _UNBELIEVABLE))
                time.sleep(pause_s)
        if kind == "restarts":
            while True:
                self.incarnation += 1
                yield encode(Goodbye(reason="pausing"))
                yield encode(replace(self.hello(), exchange=self.update[0].exchange))
        if kind == "wrong_digest":
            while True:  # of the exchange that the victim is in, so that it is looked at
                now = self.update[0].exchange
                report = Report(closed_through=now - 1, merged=(), confirmed=-1, settled=-1)
                yield encode(replace(update, exchange=now, digest=bytes(32), report=report), memoryview(payload))
        yield from cycle(self.fixed(kind))

    def fixed(self, kind: str) -> list[list[bytes | memoryview]]:
        """Messages that are the same every time."""
        if kind == "signed_records":
            records = [self.record(number) for number in range(1024)]
            return [encode(Records(sealed=tuple(records[i : i + 32]))) for i in range(0, len(records), 32)]
        maps = [[[{"": 0} for _ in range(20)] for _ in range(32)] for _ in range(32)]
        message: list[bytes | memoryview] = {
            "want": encode(ResendRequest(exchange=0, whole=False, lost=False, offset=0, digest=None)),
            "alive": encode(Heartbeat(exchange=_UNBELIEVABLE, report=NOTHING_CLOSED, stop=NO_STOP)),
            "deep_header": [b"\x91" * 65_000],
            "wide_header": [msgpack.packb({"v": SCHEMA, "t": Heartbeat.code, "exchange": maps})],
            "chunks": encode(Chunk(exchange=0, offset=CHUNK_BYTES), memoryview(bytes(CHUNK_BYTES))),
            "three_frames": [b"a", b"b", b"c"],
        }[kind]
        return [message]

    def record(self, number: int) -> bytes:
        """What this member says of a round, under its own signature."""
        record = RoundRecord(
            member=self.study.names.index(self.me),
            began=1,
            round=number,
            level=0,
            settles=False,
            closing=False,
            disagreement=0.0,
            norm=1.0,
            loss=1.0,
            skipped=0,
            without=(),
            agreed_for=0,
            sent=0,
            milliseconds=(0, 0, 0, 0),
            measured=None,
            metrics=(),
            rows=None,
        )
        return seal(record, self.identity.signing.sign, bytes.fromhex(self.study.digest))


def main() -> None:
    """See the module."""
    place, victim = sys.argv[1:]
    for line in sys.stdin:
        me, kind, seconds = line.split()
        member = FloodingMember(Path(place), me, victim)
        member.greet()
        frames = member.messages(kind)
        frames = chain([next(frames)], frames)  # what is signed is signed by now
        sys.stdout.write("greeted\n")
        sys.stdout.flush()
        sys.stdin.readline()
        sys.stdout.write(f"{member.flood(frames, float(seconds))}\n")
        sys.stdout.flush()
        member.link.close()


if __name__ == "__main__":
    main()
