"""Evidence against members that have signed different things of one round, kept in the state folder for a later judge.

Each line of evidence.jsonl names the member, the round and the study, and holds both signed records in hexadecimal: anybody with the
study's file can check them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from p2pfl.algorithms import Algorithm
from p2pfl.protocol.equivocation import MOST_EACH, Equivocation
from p2pfl.protocol.network_view import NetworkViewAdapter
from p2pfl.protocol.protocol import Protocol
from p2pfl.runs.events import EventKind
from p2pfl.wire.update import EncodedUpdate, ReceivedUpdate

EVIDENCE = "evidence.jsonl"
_MOST_BYTES = 2**20


class UpdateWitness:
    """Holds updates against the records that their senders sign; only what all neighbours are sent is signed."""

    def __init__(self, algorithm: Algorithm, protocol: Protocol, view: NetworkViewAdapter | None, state: Path, study: str) -> None:
        self._protocol, self._view, self._state, self._study = protocol, view, state, study
        self._is_broadcast = not any(channel.per_edge for channel in algorithm.channels.values())
        self._sent: list[bytes] = []
        self._received: dict[str, list[bytes]] = {}

    def note_sent(self, updates: Mapping[str, EncodedUpdate]) -> None:
        """Let this round's record say what goes to all neighbours alike."""
        number, phase = divmod(self._protocol.edges.exchange, self._protocol.edges.phases)
        if phase == 0:
            self._sent = []
        if self._view is None or not self._is_broadcast or not updates:
            return
        self._sent.append(next(iter(updates.values())).digest)
        if len(self._sent) == self._protocol.edges.phases:
            self._view.note_sent(number, self._sent)

    def note_received(self, received: Mapping[str, ReceivedUpdate]) -> None:
        """Take up the digests of updates that neighbours have sent."""
        if self._view is None or not self._is_broadcast:
            return
        for name, update in received.items():
            number, phase = divmod(update.exchange, self._protocol.edges.phases)
            digests = self._received.setdefault(name, [])
            if phase == 0:
                digests.clear()
            is_full = update.state_digests is not None and update.state_digests[0] is None
            if not update.digest or is_full or len(digests) != phase:
                continue  # it is not what all others got, or not known
            digests.append(update.digest)
            if phase == self._protocol.edges.phases - 1:
                self._view.note_came(name, number, digests)

    def look(self) -> None:
        """Keep what proves that a member says different things to different neighbours, and report it."""
        if self._view is None:
            return
        for name, found in self._view.equivocations():
            if keep_evidence(self._state, self._study, name, found):
                detail = f"{name} has signed two different updates of round {found.round}; both records are kept in {EVIDENCE}"
                self._protocol.edges.on_event(EventKind.EQUIVOCATION, detail, name)
        for name, number in self._view.differing():
            detail = f"{name}: what it sent here in round {number} is not the update that it has signed"
            self._protocol.edges.on_event(EventKind.UPDATE_DIFFERS, detail, name)


def keep_evidence(state: Path, study: str, name: str, found: Equivocation) -> bool:
    """Append a member's equivocation to the file in a state folder, which grows by MOST_EACH lines a member at most.

    Returns:
        Whether it was new: False where there is enough of the member, or the same.
    """
    numbers = evidence_rounds(state).get(name, [])
    if found.round in numbers or len(numbers) >= MOST_EACH:
        return False
    row: dict[str, Any] = {"member": name, "round": found.round, "study": study}
    line = json.dumps(row | {"records": [sealed.hex() for sealed in found.sealed]})
    path = state / EVIDENCE
    with path.open("a", encoding="utf-8") as file:
        path.chmod(0o600)
        file.write(line + "\n")
    return True


def evidence_rounds(state: Path) -> dict[str, list[int]]:
    """Rounds of which there is evidence in a node's file, by member."""
    kept: dict[str, set[int]] = {}
    try:
        with (state / EVIDENCE).open(encoding="utf-8", errors="replace") as file:
            lines = file.read(_MOST_BYTES).splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):  # half a line, of a crash
            row = json.loads(line)
            kept.setdefault(str(row["member"]), set()).add(int(row["round"]))
    return {name: sorted(numbers) for name, numbers in kept.items()}
