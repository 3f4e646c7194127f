"""A member of a study of four that hears signed records, without sockets."""

from __future__ import annotations

from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nodes_by_hand import Node, hello

from p2pfl.algorithms.stopping import StopRule
from p2pfl.protocol.view import NetworkView
from p2pfl.wire.messages import Report
from p2pfl.wire.round_record import RoundRecord, seal
from p2pfl.wire.update import UpdateFormat
from wire_samples import RECORD

STUDY = b"\xaa" * 32
MEMBERS = "abcd"
"""The node that is looked at, two honest members, and one that lies."""
SECRETS = {name: Ed25519PrivateKey.from_private_bytes(name.encode() * 32) for name in MEMBERS}
TICK_S = 0.1
ROUND_S = 1.0
HOUR_S = 3600.0
LARGE = UpdateFormat(channels=(("x", "float64", (300_000,)),))
"""Three chunks."""
RULE = StopRule(tolerance=0.1, patience=2, diameter=2, lambda_2=1.0)


def record(name: str, number: int, **changes) -> RoundRecord:
    return replace(RECORD, **{"member": MEMBERS.index(name), "round": number, "level": 0, "skipped": 0, "without": ()} | changes)


def signed(name: str, number: int, *, key: str | None = None, **changes) -> bytes:
    return seal(record(name, number, **changes), SECRETS[key or name].sign, STUDY)


class Member(Node):
    """A node of a study of four, or of fewer, that hears signed records."""

    def __init__(self, me: str, *peers: str, members: str = MEMBERS, **parts) -> None:
        self.ended = -1
        view = NetworkView(
            me=MEMBERS.index(me),
            keys=[SECRETS[name].public_key().public_bytes_raw() for name in members],
            sign=SECRETS[me].sign,
            study=STUDY,
            neighbours=peers,
            diameter=2,
            last_round=100_000,
            bytes_per_s=None,
        )
        super().__init__(
            me,
            *peers,
            view=view,
            num_others=len(members) - 1,
            places={name: MEMBERS.index(name) for name in peers},
            prove=lambda: None if self.ended < 0 else signed(self.me, self.ended),
            **parts,
        )
        for peer in peers:
            self.hear(peer, replace(hello(member=peer), incarnation=77 + ord(peer)))
        self.protocol.claims.note_company(0, 0.0)

    def update_of(self, peer: str, exchange: int) -> None:
        """An update of a member that has merged this node's one before."""
        before = max(exchange - 2, -1)
        merged = (exchange - 1,) if exchange else ()
        self.hear_update(peer, exchange, report=Report(closed_through=exchange - 1, merged=merged, confirmed=before, settled=before))

    def wait(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s - TICK_S / 2:
            self.now_s += TICK_S
            self.protocol.tick(self.now_s)

    def one_round(self, honest: str, liar=lambda: None, *, train_s: float = ROUND_S, after_s: float = 0.0) -> float:
        """Train, send, and wait for what comes; returns how long it waited.

        Args:
            honest: members whose updates come so long after this node's own is sent.
            liar: does its work at each tick while this node waits.
            train_s: how long this node trains.
            after_s: how long the others need longer.
        """
        for _ in range(round(train_s / TICK_S)):
            self.wait(TICK_S)
            liar()
        self.post()
        began_s, exchange, sent = self.now_s, self.protocol.edges.exchange, False
        while not self.protocol.pace.is_over(self.now_s) and not self.protocol.claims.is_behind():
            if not sent and self.now_s - began_s >= after_s:
                for name in honest:
                    self.update_of(name, exchange)
                sent = True
                continue
            self.now_s = min(
                self.now_s + TICK_S, self.protocol.deadlines.look_again_s(self.now_s, TICK_S, self.protocol.pace.awaited())
            )  # as the daemon does
            self.protocol.tick(self.now_s)
            liar()
            for name in self.protocol.neighbours:
                self.frames_for(name)
        if not self.protocol.claims.is_behind():
            self.close()
            self.ended = exchange
        return self.now_s - began_s

    def jump(self) -> int:
        target = self.protocol.claims.furthest()
        self.protocol.jump(target, self.now_s)
        self.protocol.begin(target, self.now_s)
        return target


def node_terms(node: Member):
    return next(iter(node.protocol.neighbours.values())).session._terms
