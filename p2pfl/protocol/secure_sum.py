"""One secure sum at one member of the tree: masked arrays go up, the total comes down, and all sign what they hold.

A participant adds its masked array to what its children send, a member that takes no part only passes on. Each array carries the session's
transcript, the sum's id and its position. The sum is confirmed when all members of the tree have signed the same total, and in a checked
sum when nobody has altered it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pfl.errors import BadMessage, P2PFLError, some
from p2pfl.privacy.fixed_point import Limbs, added
from p2pfl.protocol.secure_session import SecureSession
from p2pfl.protocol.secure_tree import SumTree
from p2pfl.protocol.sum_check import alterations, array_digest, coefficients, combination
from p2pfl.protocol.sum_terms import SumTerms
from p2pfl.wire.secure_messages import (
    HELD_BEFORE,
    CheckValue,
    HeldTotals,
    MaskedDigest,
    MaskedSubtotal,
    Message,
    SessionMessage,
    SignedTotal,
    Total,
    sign,
)

V = TypeVar("V")


class SessionVoid(P2PFLError):
    """Totals or parts of a sum do not fit: the session has ended, and the members between which it happened are named."""

    def __init__(self, reason: str, members: tuple[int, ...]) -> None:
        self.reason, self.members = reason, members
        super().__init__(reason)


def check_planned(message: SessionMessage, terms: SumTerms) -> None:
    """Refuse a message of a sum that is not planned, or an array of another shape, before it is kept for later.

    Raises:
        BadMessage: it is one; reason "wrong_sum" or "wrong_shape".
    """
    if isinstance(message, HeldTotals):
        return
    is_held = isinstance(message, Total) and message.position == HELD_BEFORE
    if not (is_held or 0 <= message.position < len(terms.sums)):
        raise BadMessage(f"a sum at position {message.position}, which is not planned", reason="wrong_sum")
    if isinstance(message, (MaskedSubtotal, Total)):
        sums = terms.sums if is_held else terms.sums[message.position : message.position + 1]
        if message.limbs.shape not in [(*each.shape, each.number_format.num_limbs) for each in sums]:
            raise BadMessage(f"an array of shape {message.limbs.shape}, which is not planned", reason="wrong_shape")


class SecureSum:
    """One sum of a session at one member of its tree.

    Args:
        session: an open one.
        tree: of the sum; this node is in it.
        me: this node's place in the roster.
        position: of the sum in the plan.
        sum_id: of the sum, with its parameters.
        signing: this node's identity.
        send: puts an array on its way to a neighbour.
        flood: puts a signed message on its way to all members.
    """

    def __init__(
        self,
        session: SecureSession,
        tree: SumTree,
        me: int,
        position: int,
        sum_id: str,
        signing: Ed25519PrivateKey,
        *,
        send: Callable[[int, Message], None],
        flood: Callable[[MaskedDigest | SignedTotal | CheckValue], object],
    ) -> None:
        if session.transcript is None:
            raise ValueError("the session is not open")
        self._session, self._tree, self._me, self._signing, self._send, self._flood = session, tree, me, signing, send, flood
        self.position, self.sum_id = position, sum_id
        self.total: Limbs | None = None
        """(..., L) once it is here; it counts when it is confirmed."""
        self.is_confirmed = False
        self._transcript = session.transcript
        self._planned = session.terms.sums[position]
        self._shape = (*self._planned.shape, self._planned.number_format.num_limbs)
        self._masked: Limbs | None = None
        self._subtotals: dict[int, Limbs] = {}
        self._sent: Limbs | None = None
        """Subtotal that has gone to the parent."""
        self._total_ahead: Limbs | None = None
        """Total that came before the parts of it, to a member that only passes on."""
        self._digests: dict[int, bytes] = {}
        self._macs: dict[int, bytes] = {}
        self._values: dict[int, CheckValue] = {}

    @property
    def waits_for(self) -> tuple[int, ...]:
        """Neighbours in the tree from which an array is to come."""
        if self.total is not None:
            return ()
        missing = tuple(child for child in self._tree.children(self._me) if child not in self._subtotals)
        return missing or ((self._tree.parents[self._me],) if self._sent is not None else ())

    def contribute(self, integers: Limbs) -> None:
        """Mask this participant's integers, (..., L), and send them as soon as the tree allows it.

        The caller has written down that it sends them (`note_before_sending`).
        """
        if integers.shape != self._shape:
            raise ValueError(f"{self._planned.statistic}: integers of shape {integers.shape} where {self._shape} is planned")
        self._masked = added(integers, self._session.mask(self.sum_id, self.position, self._shape))
        if self._session.terms.check:
            digest = array_digest(self._masked)
            head = {"member": self._me, "transcript": self._transcript, "sum_id": self.sum_id, "position": self.position}
            self._flood(sign(MaskedDigest(**head, digest=digest), self._signing))  # type: ignore[arg-type]
            self._digests[self._me] = digest
        self.go_on()

    def take_array(self, sender: int, message: MaskedSubtotal | Total) -> None:
        """Take an array from a neighbour in the tree; one that has come before is ignored.

        Raises:
            BadMessage: it is not of this sum, not from its place in the tree, of another shape or not the one that came before.
            SessionVoid: the total cannot be one of values within their bounds.
        """
        self._check_head(message)
        limbs = message.limbs
        if limbs.shape != self._shape or limbs.dtype != np.uint64:
            raise BadMessage(f"an array of shape {limbs.shape} where {self._shape} is planned", reason="wrong_shape")
        if isinstance(message, MaskedSubtotal):
            if sender not in self._tree.children(self._me):
                raise BadMessage(f"{self._name(sender)} is no child in the tree of this sum", reason="wrong_place")
            self._take_once(self._subtotals, sender, limbs, is_equal=np.array_equal)
            self.go_on()
            return
        if self._tree.parents.get(self._me) != sender:
            raise BadMessage(f"{self._name(sender)} is not the parent in the tree of this sum", reason="wrong_place")
        if self._sent is None and self._me not in self._tree.participants:  # started again: its children's parts come again, too
            self._total_ahead = limbs
            return
        if self._sent is None:
            raise BadMessage(f"{self._name(sender)} has a total to which this node has not added", reason="wrong_place")
        if self.total is None:
            self._take_total(limbs)
        elif not np.array_equal(self.total, limbs):
            raise BadMessage(f"{self._name(sender)} sends a second total of one sum", reason="differs")

    def take_signed(self, message: MaskedDigest | SignedTotal | CheckValue) -> None:
        """Take a statement whose signature has been checked; one that has come before is ignored.

        Raises:
            BadMessage: it is not of this sum, or its member has said something else before.
            SessionVoid: it shows that members hold different totals, or that somebody has altered the sum.
        """
        self._check_head(message)
        allowed = self._session.terms.participants if isinstance(message, MaskedDigest) else self._tree.members
        if message.member not in allowed:
            raise BadMessage(f"{self._name(message.member)} has no part in this sum", reason="wrong_place")
        if isinstance(message, MaskedDigest):
            self._take_once(self._digests, message.member, message.digest)
            self.go_on()
        elif isinstance(message, SignedTotal):
            if message.participants != self._session.terms.participants:
                raise BadMessage(f"{self._name(message.member)} signs a total over another set", reason="wrong_participants")
            self._take_once(self._macs, message.member, message.mac)
            self._compare_totals()
        else:
            self._take_once(self._values, message.member, message)
            self._compare_values()

    def go_on(self) -> None:
        """Send the subtotal when all parts of it are here, and in a checked sum when all have committed themselves."""
        is_participant = self._me in self._tree.participants
        if self._sent is not None or (is_participant and self._masked is None):
            return
        if self._session.terms.check and len(self._digests) < len(self._tree.participants):
            return
        children = self._tree.children(self._me)
        if any(child not in self._subtotals for child in children):
            return
        parts = [self._subtotals[child] for child in children]
        self._sent = self._subtotal(parts if self._masked is None else [self._masked, *parts])
        if self._me == self._tree.root:
            self._take_total(self._sent)
        else:
            self._send(self._tree.parents[self._me], MaskedSubtotal(**self._head(), limbs=self._sent))  # type: ignore[arg-type]
            if self._total_ahead is not None:
                self._take_total(self._total_ahead)

    def outstanding(self, neighbour: int) -> list[Message]:
        """Arrays that a neighbour may have missed, to be sent again when its link is back: the same bytes."""
        found: list[Message] = []
        if self._sent is not None and self._tree.parents.get(self._me) == neighbour:
            found.append(MaskedSubtotal(**self._head(), limbs=self._sent))  # type: ignore[arg-type]
        if self.total is not None and neighbour in self._tree.children(self._me):
            found.append(Total(**self._head(), limbs=self.total))  # type: ignore[arg-type]
        return found

    def _subtotal(self, parts: list[Limbs]) -> Limbs:
        return reduce(added, parts)

    def _take_total(self, limbs: Limbs) -> None:
        terms, form = self._session.terms, self._planned.number_format
        largest = len(terms.participants) * (self._planned.bound + 2.0 ** -(form.fraction_bits + 1))
        if (np.abs(form.decode(limbs)) > largest * (1 + 2.0**-50)).any():
            raise SessionVoid(f"{self._planned.statistic}: the total is beyond what the sites agreed; a part was lost or altered", ())
        self.total = limbs
        for child in self._tree.children(self._me):
            self._send(child, Total(**self._head(), limbs=limbs))  # type: ignore[arg-type]
        mac = self._macs[self._me] = self._session.mac(self.sum_id, limbs)
        statement = SignedTotal(**self._head(), member=self._me, participants=terms.participants, mac=mac)  # type: ignore[arg-type]
        self._flood(sign(statement, self._signing))
        self._compare_totals()

    def _compare_totals(self) -> None:
        for child, parent in self._tree.parents.items():
            if child in self._macs and parent in self._macs and self._macs[child] != self._macs[parent]:
                named = f"{self._name(parent)} and {self._name(child)}"
                raise SessionVoid(f"{self._planned.statistic}: {named} hold different totals", (parent, child))
        if len(self._macs) < len(self._tree.members) or self.total is None or self.is_confirmed:
            return
        if not self._session.terms.check:
            self.is_confirmed = True
            return
        if self._me not in self._values:
            weights = self._coefficients()
            assert self._sent is not None
            value = CheckValue(
                **self._head(),  # type: ignore[arg-type]
                member=self._me,
                own=combination(weights, self._masked) if self._masked is not None else 0,
                received=tuple((child, combination(weights, array)) for child, array in sorted(self._subtotals.items())),
                sent=combination(weights, self._sent),
            )
            self._values[self._me] = value
            self._flood(sign(value, self._signing))
            self._compare_values()

    def _compare_values(self) -> None:
        if len(self._values) < len(self._tree.members) or self.total is None or self._me not in self._values:
            return
        found = alterations(self._tree, self._values, combination(self._coefficients(), self.total))
        if found:
            members = tuple(dict.fromkeys(member for each in found for member in each.members))
            named = "; ".join(" or ".join(self._name(member) for member in each.members) for each in found)
            raise SessionVoid(f"{self._planned.statistic}: {named} altered or dropped a part of it", members)
        self.is_confirmed = True

    def _coefficients(self) -> Limbs:
        assert self.total is not None
        return coefficients(self._transcript, self._digests, self.total)

    def _head(self) -> dict[str, object]:
        return {"transcript": self._transcript, "sum_id": self.sum_id, "position": self.position}

    def _check_head(self, message: MaskedSubtotal | Total | MaskedDigest | SignedTotal | CheckValue) -> None:
        if message.transcript != self._transcript:
            raise BadMessage("a message of another session", reason="wrong_transcript")
        if (message.sum_id, message.position) != (self.sum_id, self.position):
            raise BadMessage(f"a message of another sum, at position {message.position}", reason="wrong_sum")

    def _take_once(self, known: dict[int, V], member: int, value: V, *, is_equal: Callable[[V, V], bool] = lambda a, b: a == b) -> None:
        if not is_equal(known.setdefault(member, value), value):
            raise BadMessage(f"{self._name(member)} says two things of one sum", reason="differs")

    def _name(self, member: int) -> str:
        names = self._session.terms.names
        return some([names[member]]) if 0 <= member < len(names) else f"member {member}"
