"""Updates of one node on their way: what was sent, what of it is sent again and from where on, and the values that updates lead to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from p2pfl.errors import BadMessage, StoreError
from p2pfl.paces.base import Pace
from p2pfl.params import tensor_over
from p2pfl.protocol.deadlines import STALL_S
from p2pfl.protocol.edges import Edges
from p2pfl.protocol.neighbour import Neighbour, SendUpdate
from p2pfl.protocol.stop_agreement import StopAgreement
from p2pfl.runs.events import EventKind
from p2pfl.wire.codec import Frame
from p2pfl.wire.messages import NOTHING_SAID, ResendRequest, Sent, StateDigests
from p2pfl.wire.update import EncodedUpdate, FullUpdate, ReceivedUpdate, UpdateFormat

RESEND_AFTER_S = 0.25
"""A neighbour that asks more often than this gets one answer."""

LOST_AGAIN_S = 10.0
"""A lost part is asked for again after so long where what lies behind it still comes: the request was lost with a connection."""

_NEVER_S = float("-inf")
_ALL = "*"
"""In place of a receiver's name in a checkpoint: all got the same."""

_Sent = TypeVar("_Sent", EncodedUpdate, FullUpdate)


@dataclass(frozen=True, kw_only=True, slots=True)
class SentUpdates:
    """Updates that this node has sent in one exchange, for neighbours that ask again."""

    updates: Mapping[str, EncodedUpdate]
    """By receiver."""
    consensus_counter: int
    """The one that went with them."""
    full: Mapping[str, FullUpdate] = field(default_factory=dict)
    """By receiver, where the updates continue what was sent before."""
    state_digest: bytes | None = None
    """Digest of the values that they lead to."""


@dataclass(slots=True)
class _Receiver:
    """Updates that one neighbour has been sent; kinds are (exchange, whether it is the full one)."""

    sending: tuple[int, bool] | None = None
    """Going out just now."""
    handed: set[tuple[int, bool]] = field(default_factory=set)
    """Gone out to their end, to the process of its last handshake."""
    sent_once: set[tuple[int, bool]] = field(default_factory=set)
    """Begun at least once: again is a repetition."""
    asked_from: tuple[int, bool, int] | None = None
    """The kind and the byte from which it was last asked for what is known to be lost."""
    asked_s: float = _NEVER_S
    """When that was."""
    last_resent_s: float = _NEVER_S
    full_resent_s: dict[int, float] = field(default_factory=dict)
    """When a full update was last sent, by exchange."""
    lacks: int | None = None
    """The exchange whose update continues values that are not here."""


class Transfers:
    """One node's updates on their way, in both directions."""

    def __init__(self, edges: Edges, pace: Pace, stopping: StopAgreement) -> None:
        self._edges, self._pace, self._stopping = edges, pace, stopping
        self.sent: dict[int, SentUpdates] = {}
        """By exchange, this one and the last ones."""
        self.receivers = {name: _Receiver() for name in edges.neighbours}

    # ---- received

    def release(self, *names: str) -> None:
        """Let go of some neighbours' updates that no merge needs any more: each is as large as a model."""
        for name in names:
            self._edges.neighbours[name].session.release(self._pace.needed(name))

    def drop(self, name: str) -> None:
        """Drop a neighbour's update of this merge."""
        self._pace.drop(name)
        self.release(name)

    def forget(self, name: str) -> None:
        """Drop all updates of a neighbour."""
        self._pace.forget(name)
        self.release(name)

    def refuse(self, name: str, error: BadMessage) -> None:
        """Refuse a neighbour's update of this merge."""
        self._edges.refuse(self._edges.neighbours[name], error)
        if not self._pace.balances:  # it would be merged again
            self.drop(name)

    # ---- sending

    def send(self, updates: Mapping[str, EncodedUpdate], full: Mapping[str, FullUpdate], state_digest: bytes | None) -> None:
        """Send this exchange's updates, by receiver."""
        if not self._pace.balances:
            self.sent.clear()  # nobody asks for what is not the newest
        exchange, counter = self._edges.exchange, self._stopping.consensus_counter
        self.sent[exchange] = SentUpdates(updates=updates, consensus_counter=counter, full=full, state_digest=state_digest)
        for name, neighbour in self._edges.neighbours.items():
            if neighbour.session.is_open and name in updates:
                neighbour.queue(SendUpdate(exchange=exchange, again=False))

    def send_over_edge(self, name: str, update: EncodedUpdate) -> None:
        """Send an update of one edge's own number; what the neighbour has closed it needs no more."""
        heard = self._edges.neighbours[name].ledger.heard
        known = -1 if heard is None else heard.closed_through
        kept = {e: {to: each for to, each in sent.updates.items() if to != name or e > known} for e, sent in self.sent.items()}
        kept[update.exchange] = {**kept.get(update.exchange, {}), name: update}
        self.sent = {e: SentUpdates(updates=updates, consensus_counter=0) for e, updates in kept.items() if updates}
        self._edges.neighbours[name].queue(SendUpdate(exchange=update.exchange, again=False))

    def forget_sent(self) -> None:
        """Let go of what was sent in exchanges before this one and nobody can ask for any more: each update is as large as a model."""
        here, ahead = self._edges.exchange, self._edges.ahead
        self.sent = {
            e: sent
            for e, sent in self.sent.items()
            if e >= here or (e >= here - ahead and any(self.is_of_use(e, self._edges.neighbours[name]) for name in sent.updates))
        }

    def is_of_use(self, exchange: int, neighbour: Neighbour) -> bool:
        """Whether a neighbour may still merge an update that is on its way.

        It may not where the exchange is past here, or where its own report has closed it. Where nodes go on with the newest it always
        may, or a slow link would bring nothing.
        """
        heard = neighbour.ledger.heard
        return not self._pace.balances or (exchange in self.sent and (heard is None or heard.closed_through < exchange))

    def prepare(self, name: str, item: SendUpdate) -> None:
        """Copy and digest what `frames_of` will need of a full update; as long as that takes, in any thread."""
        sent = self.sent.get(item.exchange)
        if item.full and sent is not None and name in sent.full:
            _ = sent.full[name].encoded

    def frames_of(self, neighbour: Neighbour, item: SendUpdate) -> Iterable[list[Frame]]:
        """Make the messages of an update for one neighbour, with the newest report; none where the exchange is past."""
        sent, receiver = self.sent.get(item.exchange), self.receivers[neighbour.name]
        if sent is None or neighbour.name not in (sent.full if item.full else sent.updates):
            return ()
        kind = item.exchange, item.full
        receiver.sent_once = {each for each in receiver.sent_once if each[0] in self.sent} | {kind}
        receiver.handed = {each for each in receiver.handed if each[0] in self.sent} - {kind}
        encoded = sent.full[neighbour.name].encoded if item.full else sent.updates[neighbour.name]
        return encoded.messages(neighbour.ledger.report(), self._stopping.news(sent.consensus_counter), item.offset)

    def note_sending(self, name: str, item: SendUpdate | None) -> None:
        """Note which update is going out to a neighbour just now; None: none."""
        self.receivers[name].sending = None if item is None else (item.exchange, item.full)

    def note_handed_over(self, name: str, item: SendUpdate) -> None:
        """Note that all of an update is with the link: what comes later over it comes behind the update."""
        self.receivers[name].handed.add((item.exchange, item.full))

    # ---- sending again

    def begin_again(self, neighbour: Neighbour, now_s: float) -> bool:
        """Begin anew with a neighbour whose process has been restarted; returns False where it was sent everything just now."""
        receiver = self.receivers[neighbour.name]
        receiver.handed.clear()  # its memory of them has gone
        if now_s - receiver.last_resent_s < RESEND_AFTER_S:
            return False  # it asks for what it lacks
        receiver.last_resent_s = now_s
        return True

    def send_again(self, neighbour: Neighbour, exchange: int) -> None:
        """Send a neighbour all that it may have lost, from an exchange on."""
        sent_once = self.receivers[neighbour.name].sent_once
        for number in sorted(self.sent):
            in_reach = not self._pace.in_step or number >= exchange
            if in_reach and neighbour.name in self.sent[number].updates:
                neighbour.queue(SendUpdate(exchange=number, again=(number, False) in sent_once))

    def answer(self, neighbour: Neighbour, request: ResendRequest, now_s: float) -> None:
        """Send what is missing of an update; nothing of one that is over there, or that is queued or on its way."""
        sent, receiver = self.sent.get(request.exchange), self.receivers[neighbour.name]
        if sent is None or neighbour.name not in sent.updates:
            neighbour.queue(self._stopping.where_it_is(neighbour))
            return
        exchange, full = kind = request.exchange, request.whole and neighbour.name in sent.full
        if not self.is_of_use(exchange, neighbour):
            return
        if not request.lost and (receiver.sending == kind or neighbour.waiting_update(exchange, full=full) is not None):
            return
        if not request.lost and kind in receiver.handed:
            neighbour.queue(Sent(exchange=exchange, whole=full))
            return
        receiver.full_resent_s = {e: s for e, s in receiver.full_resent_s.items() if e in self.sent}
        if now_s - (receiver.full_resent_s.get(exchange, _NEVER_S) if full else receiver.last_resent_s) < RESEND_AFTER_S:
            return
        if full:
            receiver.full_resent_s[exchange] = now_s
        else:
            receiver.last_resent_s = now_s
        # a full update is packed when its turn comes, so here nothing is known of its digest
        encoded = None if full else sent.updates[neighbour.name]
        offset = request.offset if encoded is not None and encoded.can_go_on(request.offset, request.digest) else 0
        neighbour.queue(SendUpdate(exchange=exchange, again=not full or kind in receiver.sent_once, full=full, offset=offset))

    # ---- asking again

    def ask(self, neighbour: Neighbour, exchange: int) -> None:
        """Ask for an update that is not known to be lost."""
        full = self.receivers[neighbour.name].lacks == exchange
        neighbour.queue(neighbour.session.resend_request(exchange, full=full, lost=False))

    def ask_for_full(self, neighbour: Neighbour, exchange: int) -> None:
        """Ask for the full update of an exchange, from now on: the other one continues values that are not here."""
        self.receivers[neighbour.name].lacks = exchange
        self.ask(neighbour, exchange)

    def hear_sent(self, neighbour: Neighbour, message: Sent, now_s: float) -> None:
        """Ask for what is missing of an update that has gone out before a message."""
        if not neighbour.session.has(message.exchange, full=message.whole):
            self.receivers[neighbour.name].asked_from = None  # a repeated answer shows that the last request was lost
            self.ask_for_lost(neighbour, message.exchange, now_s, full=message.whole)

    def ask_for_lost(self, neighbour: Neighbour, exchange: int, now_s: float, *, full: bool) -> None:
        """Ask for an update of which a part is known to be lost: seldom for the same place, as the request may be lost, too."""
        receiver, first = self.receivers[neighbour.name], self._pace.expected_from(neighbour.name)
        if self._edges.closing is not None or not first <= exchange <= first + self._edges.ahead:
            return
        request = neighbour.session.resend_request(exchange, full=full, lost=True)
        if receiver.asked_from != (exchange, full, request.offset) or now_s - receiver.asked_s >= LOST_AGAIN_S:
            receiver.asked_from, receiver.asked_s = (exchange, full, request.offset), now_s
            neighbour.queue(request)

    def ask_again(self, now_s: float) -> None:
        """Ask for updates that have not come."""
        if self._edges.closing is not None:
            return
        for name, number in self._pace.missing():
            neighbour = self._edges.neighbours[name]
            is_flowing = neighbour.is_flowing(number, now_s, STALL_S)
            if self._pace.counts_edges:
                if neighbour.is_time_to_ask(now_s) and self._offer_again(neighbour, number) and not is_flowing:
                    self.ask(neighbour, number)
            elif neighbour.session.is_open and number in self.sent and not is_flowing and neighbour.is_time_to_ask(now_s):
                self.ask(neighbour, number)

    def _offer_again(self, neighbour: Neighbour, number: int) -> bool:
        """Send a request once more that was lost, or whose answer was; returns False where it is still on its way."""
        receiver, kind = self.receivers[neighbour.name], (number, False)
        if receiver.sending == kind or neighbour.waiting_update(number, full=False) is not None:
            return False
        neighbour.queue(Sent(exchange=number, whole=False) if kind in receiver.handed else SendUpdate(exchange=number, again=True))
        return True

    # ---- checkpoints

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Metadata and tensors for a checkpoint; requests over one edge are asked anew."""
        metadata: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for exchange, sent in self.sent.items() if not self._pace.counts_edges else ():
            digests = next((each.state_digests for each in sent.updates.values()), None)
            metadata[str(exchange)] = {
                "agreed_for": sent.consensus_counter,
                "marks": digests and [digest and digest.hex() for digest in digests],
            }
            for to, encoded in _by_receiver(sent.updates).items():
                tensors[f"sent/{exchange}/{to}"] = tensor_over(np.frombuffer(encoded.payload, dtype=np.uint8))
            for to, full in _by_receiver(sent.full).items():
                tensors |= {f"whole/{exchange}/{to}/{channel}": torch.from_numpy(array) for channel, array in full.arrays.items()}
        return {"sent": metadata}, tensors

    def restore(self, metadata: Mapping[str, Any], tree: Mapping[str, Any], formats: Sequence[UpdateFormat], place: Path) -> None:
        """Take up what `snapshot` gave; raises StoreError where what was sent is damaged."""
        for exchange, saved in metadata["sent"].items():
            number, update_format = int(exchange), formats[int(exchange) % self._edges.phases]
            after, digest = [each and bytes.fromhex(each) for each in saved["marks"] or (None, None)]
            digests = None if digest is None else (after, digest)
            receivers = sorted(self._edges.neighbourhoods(number // self._edges.phases).receivers)
            updates = {
                to: _restored(update_format, number, payload, digests, place)
                for to, payload in tree.get("sent", {}).get(exchange, {}).items()
            }
            full = {}
            if update_format.full is not None and digest is not None:
                for to, tensors in tree.get("whole", {}).get(exchange, {}).items():
                    arrays = {channel: tensor.numpy() for channel, tensor in tensors.items()}
                    full[to] = FullUpdate(update_format.full, number, arrays, digest)
            self.sent[number] = SentUpdates(
                updates=_to_each(receivers, updates),
                full=_to_each(receivers, full),
                consensus_counter=saved["agreed_for"],
                state_digest=digest,
            )


class EncodedValues:
    """Values and their state digests on both sides of a node's edges; an update counts where it continues the values that are here."""

    def __init__(self, edges: Edges, transfers: Transfers) -> None:
        self._edges, self._transfers = edges, transfers
        self.own: dict[int, bytes] = {}
        """State digest of this node's own values, by phase."""
        self.values: dict[str, dict[str, Any]] = {name: {} for name in edges.neighbours}
        """By neighbour and channel, as far as its updates have led here; zeros where there is none."""
        self.digests: dict[str, dict[int, bytes]] = {name: {} for name in edges.neighbours}
        """State digest of these values, by neighbour and phase."""
        self.resynchronised = 0
        """How often a neighbour's full update came, because something before it is not here."""

    def continues(self, neighbour: Neighbour, exchange: int, digests: StateDigests | None) -> bool:
        """Whether the values are here that an update with these digests continues; if not they are asked for."""
        held = self.digests[neighbour.name].get(exchange % self._edges.phases, NOTHING_SAID)
        if digests is None or digests[0] in (None, held):
            return True
        neighbour.note_return()
        self._transfers.ask_for_full(neighbour, exchange)
        return False

    def hold(self, name: str, received: ReceivedUpdate, values: Mapping[str, Any] | BadMessage) -> None:
        """Keep what a neighbour's update leads to, or refuse it, so that its next one will not continue what is here."""
        if isinstance(values, BadMessage):
            self._transfers.refuse(name, values)
        elif received.state_digests is not None:
            self.values[name].update(values)
            after, self.digests[name][received.exchange % self._edges.phases] = received.state_digests
            if after is None:
                self.resynchronised += 1
                self._edges.on_event(EventKind.RESYNCHRONISED, f"{name} at exchange {received.exchange}", name)

    def advance(self) -> None:
        """Take up what was sent in this exchange into this node's own values: its next update continues it."""
        sent = self._transfers.sent.get(self._edges.exchange)
        if sent is not None and sent.state_digest is not None:
            self.own[self._edges.exchange % self._edges.phases] = sent.state_digest

    def forget(self, name: str) -> None:
        """Drop the values and updates of a neighbour that has begun without its state."""
        self.values[name].clear()
        self.digests[name].clear()
        self._transfers.forget(name)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Metadata and tensors for a checkpoint."""
        tensors = {f"value/{name}/{channel}": value for name, values in self.values.items() for channel, value in values.items()}
        return {"marks": _in_hex(self.own), "held": {name: _in_hex(digests) for name, digests in self.digests.items()}}, tensors

    def restore(self, metadata: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
        """Take up what `snapshot` gave."""
        self.own = _from_hex(metadata["marks"])
        for name in self.values:
            self.values[name], self.digests[name] = dict(tree.get("value", {}).get(name, {})), _from_hex(metadata["held"][name])


def _restored(
    update_format: UpdateFormat, exchange: int, payload: torch.Tensor, digests: StateDigests | None, place: Path
) -> EncodedUpdate:
    """Encode an update again from its bytes."""
    try:
        return update_format.pack(exchange, update_format.unpack(payload.numpy())[0], digests)
    except BadMessage as error:
        raise StoreError(f"{place}: what this node sent in exchange {exchange} is damaged: {error}") from error


def _by_receiver(sent: Mapping[str, _Sent]) -> Mapping[str, _Sent]:
    """One for each receiver, or one for all of them where they got the same."""
    different = {id(each): each for each in sent.values()}
    return {_ALL: next(iter(different.values()))} if len(different) == 1 else sent


def _to_each(receivers: Sequence[str], sent: Mapping[str, _Sent]) -> Mapping[str, _Sent]:
    """Undo `_by_receiver`."""
    return dict.fromkeys(receivers, sent[_ALL]) if _ALL in sent else sent


def _in_hex(digests: Mapping[int, bytes]) -> dict[str, str]:
    return {str(phase): digest.hex() for phase, digest in digests.items()}


def _from_hex(digests: Mapping[str, str]) -> dict[int, bytes]:
    return {int(phase): bytes.fromhex(digest) for phase, digest in digests.items()}
