"""Example of a complete conversation: two nodes agree on the start, average for some exchanges, and one is killed in between.

Each side is a protocol with a vector and a checkpoint, without sockets, on a clock that moves by a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pfl.algorithms import DPSGD, Context, InboxFactory
from p2pfl.params import Layout
from p2pfl.protocol.agreed_start import StartAgreement
from p2pfl.protocol.deadlines import Deadlines, RoundDurations
from p2pfl.protocol.edges import Edges, Flow
from p2pfl.protocol.neighbour import Neighbour, SendNew, SendUpdate
from p2pfl.protocol.protocol import Protocol
from p2pfl.protocol.snapshot import restore, snapshot
from p2pfl.topology.schedule import Neighbourhood
from p2pfl.wire.codec import Frame, decode, encode
from p2pfl.wire.link import LinkSession, Terms
from p2pfl.wire.messages import Goodbye, Message
from p2pfl.wire.update import UpdateFormat

NAMES = ("a", "b")
SECRETS = {name: bytes([place + 1] * 32) for place, name in enumerate(NAMES)}
FIRST = {"a": [1.0, 2.0, 3.0], "b": [3.0, -2.0, 0.5]}
FORMAT = UpdateFormat(channels=(("x", "float64", (3,)),))
LAYOUT = b'[["x",[3],"float64"]]'
EXCHANGES = 5
WEIGHT = 0.25
TERMS = Terms(study="aa" * 32, layout=sha256(LAYOUT).hexdigest(), start=sha256(bytes(24)).hexdigest())
BEGAN_MS = 1_790_000_000_000
STEP_S = 0.1
_CTX = Context(round=0, local_steps=0, lr=0.1, seed=0, nodes_N=torch.arange(1), layout=Layout(tensors=()))


class Side:
    """One node of the two; *saved*: the checkpoint of the process before."""

    def __init__(self, me: str, *, incarnation: int, began_ms: int, saved: Mapping[str, Any] | None = None, now_s: float = 0.0) -> None:
        self.me, self.peer = me, NAMES[1 - NAMES.index(me)]
        session = LinkSession(peer=self.peer, member=me, terms=TERMS, incarnation=incarnation, formats=(FORMAT,))
        row = Neighbourhood(weights={self.peer: WEIGHT}, receivers=frozenset({self.peer}), self_weight=1 - WEIGHT)
        edges = Edges(
            me=me, neighbours={self.peer: Neighbour(name=self.peer, session=session)}, neighbourhoods=lambda _: row, on_event=_no_event
        )
        secret, place = Ed25519PrivateKey.from_private_bytes(SECRETS[me]), NAMES.index(me)
        self.agreement = StartAgreement(
            me=place,
            neighbours=[[1], [0]],
            names={self.peer: 1 - place},
            keys=[Ed25519PrivateKey.from_private_bytes(SECRETS[name]).public_key().public_bytes_raw() for name in NAMES],
            sign=secret.sign,
            study=bytes.fromhex(TERMS.study),
            needed=2,
            within_s=60.0,
            grace_s=1.5,
            began_ms=began_ms,
        )
        durations = RoundDurations(factor=5.0, floor_s=30.0, window=20)
        self.protocol = Protocol(edges, Deadlines(edges, durations), num_exchanges=EXCHANGES, start=self.agreement)
        self.x, self.started, self.sent, self.saved = torch.tensor(FIRST[me], dtype=torch.float64), False, False, saved
        self.is_done = False
        if saved is not None:
            self.x, self.started = saved["x"].clone(), True
            self.agreement.start(saved["company"], now_s)
            restore(self.protocol, saved["metadata"], saved["tensors"], [FORMAT], since_s=now_s, place=Path(me))
        else:
            self.agreement.begin(now_s)
        self.protocol.begin(edges.exchange, now_s)

    def keep(self) -> None:
        """Write the checkpoint; its ledgers may be told from now on."""
        metadata, tensors = snapshot(self.protocol)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self.saved = {"x": self.x.clone(), "company": self.agreement.started, "metadata": metadata, "tensors": tensors}
        self.protocol.edges.checkpointed(metadata["ledgers"])

    def advance(self, now_s: float) -> None:
        """Do what can be done now: start, send, merge and go on, stop."""
        protocol, edges = self.protocol, self.protocol.edges
        if not self.started:
            up = [self.peer] if protocol.neighbours[self.peer].session.is_open else []
            self.agreement.note_links(up, now_s)
            company = self.agreement.decide(now_s)
            if company is not None:
                self.agreement.start(company, now_s)
                protocol.start_with([NAMES[place] for place in sorted(company)], now_s)
                self.started = True
                self.keep()
        if not self.started or edges.closing is not None:
            return
        if not self.sent:
            update = FORMAT.pack(edges.exchange, {"x": self.x.numpy()})
            protocol.send({self.peer: update}, now_s)
            self.sent = True
        due = protocol.due(now_s, ["x"])
        if due is None:
            return
        messages = {name: {"x": torch.from_numpy(np.array(received.arrays["x"]))} for name, received in due.came.items()}
        back = [-flow.amounts["x"] for _, flow in due.compensations]
        inbox = InboxFactory(channels=DPSGD.channels).for_node(
            {"x": self.x[None]},
            [self.peer],
            messages,
            due.neighbourhood.weights,
            self_weight=due.neighbourhood.self_weight,
            dtype=torch.float64,
            compensation={"x": sum(back)[None]} if back else {},
            flows={},
        )
        self.x = DPSGD().merge({"x": self.x[None]}, 0, inbox, _CTX)["x"][0]
        assert inbox.flows is not None
        flows = [Flow(exchange=edges.exchange, amounts=amounts) for amounts in inbox.flows.values()]
        protocol.close(dict.fromkeys([self.peer][: len(flows)], *flows), now_s)
        self.sent = False
        if edges.exchange + 1 == EXCHANGES:
            protocol.stop("rounds", EXCHANGES)
        else:
            protocol.begin(edges.exchange + 1, now_s)
        self.keep()

    def settle(self) -> None:
        """Make durable what was settled after the end, and say Goodbye once both ends are done, to one that has not left."""
        protocol = self.protocol
        neighbour = protocol.neighbours[self.peer]
        if protocol.edges.closing is None or self.is_done:
            return
        before = neighbour.ledger.report()
        self.keep()
        if neighbour.ledger.report() != before:
            neighbour.queue(protocol.stopping.where_it_is(neighbour))
        if not protocol.unacknowledged():
            self.is_done = True
            if neighbour.session.is_open:
                neighbour.queue(Goodbye(reason="finished"))

    def next_messages(self, now_s: float) -> list[list[Frame]]:
        """Take the next item out of the outbox, as messages; empty where there is none."""
        neighbour = self.protocol.neighbours[self.peer]
        while neighbour.outbox:
            item: Any = neighbour.outbox.popleft()
            if isinstance(item, SendUpdate):
                found = [list(frames) for frames in self.protocol.transfers.frames_of(neighbour, item)]
                self.protocol.transfers.note_handed_over(self.peer, item)
            elif item is SendNew.READY:
                ready = self.agreement.take(self.peer, now_s)
                found = [] if ready is None else [encode(ready)]
            elif item is SendNew.RECORDS:
                found = []
            else:
                found = [encode(item)]
            if found:
                return found
        return []

    def hear(self, frames: list[Frame], now_s: float) -> None:
        """Take one message, and do what follows."""
        self.protocol.hear(self.peer, tuple(map(memoryview, frames)), now_s)


def _no_event(*_: object) -> None:
    """Events are for the record of a run."""


def play() -> tuple[list[dict[str, Any]], dict[str, Side]]:
    """Let both nodes talk until both are done; b is killed when it has sent Update(2), and comes back a second later."""
    sides: dict[str, Side] = {name: Side(name, incarnation=11 * (place + 1), began_ms=BEGAN_MS + place) for place, name in enumerate(NAMES)}
    log: list[dict[str, Any]] = []
    killed: tuple[int, Side] | None = None
    step = 0
    while step < 100 and not all(side.is_done for side in sides.values()):  # noqa: PLR2004  # it ends far sooner
        now_s = round(step * STEP_S, 1)
        if killed is not None and step == killed[0] + 10:
            sides["b"] = Side("b", incarnation=33, began_ms=BEGAN_MS + 5000, saved=killed[1].saved, now_s=now_s)
            log.append({"at_s": now_s, "starts_again": "b", "incarnation": 33})
        for side in sides.values():
            side.protocol.tick(now_s)
            side.advance(now_s)
        _carry(sides, log, now_s)
        b = sides.get("b")
        if killed is None and b is not None and b.protocol.edges.exchange == 2 and b.sent:  # noqa: PLR2004
            killed = step, sides.pop("b")
            log.append({"at_s": now_s, "killed": "b"})
        for side in sides.values():
            side.settle()
        _carry(sides, log, now_s)
        step += 1
    return log, sides


def _carry(sides: Mapping[str, Side], log: list[dict[str, Any]], now_s: float) -> None:
    """Carry every message that there is; those to a process that is gone are lost. Nothing of exchange 2 reaches b before it is killed."""
    moved = True
    while moved:
        moved = False
        for name, side in sides.items():
            for frames in side.next_messages(now_s):
                moved = True
                message = decode(frames)[0]
                other = sides.get(side.peer)
                first_b = other is not None and other.me == "b" and other.protocol.edges.exchange == 2 and not _is_again(log)  # noqa: PLR2004
                is_lost = other is None or (first_b and _is_update_2(message))
                log.append(_row(now_s, name, message, frames, lost=is_lost))
                if not is_lost and other is not None:
                    other.hear(frames, now_s)
                    other.advance(now_s)


def _is_again(log: list[dict[str, Any]]) -> bool:
    return any("starts_again" in row for row in log)


def _is_update_2(message: Message) -> bool:
    return type(message).__name__ == "Update" and getattr(message, "exchange", None) == 2  # noqa: PLR2004


def _row(now_s: float, name: str, message: Message, frames: list[Frame], *, lost: bool) -> dict[str, Any]:
    header, *payload = (bytes(frame).hex() for frame in frames)
    row: dict[str, Any] = {"at_s": now_s, "from": name, "message": type(message).__name__, "header": header, "payload": "".join(payload)}
    return row | ({"lost": True} if lost else {})


def scenario() -> dict[str, Any]:
    """One conversation of two nodes with all that they were given, and the vectors that they end with."""
    log, sides = play()
    return {
        "study": TERMS.study,
        "layout": LAYOUT.decode("ascii"),
        "layout_digest": TERMS.layout,
        "start_digest": TERMS.start,
        "roster": list(NAMES),
        "ed25519_secrets": {name: secret.hex() for name, secret in SECRETS.items()},
        "began_ms": {"a": BEGAN_MS, "b": BEGAN_MS + 1, "b again": BEGAN_MS + 5000},
        "incarnations": {"a": 11, "b": 22, "b again": 33},
        "weight": WEIGHT,
        "first": FIRST,
        "exchanges": EXCHANGES,
        "conversation": log,
        "last": {name: sides[name].x.tolist() for name in NAMES},
    }
