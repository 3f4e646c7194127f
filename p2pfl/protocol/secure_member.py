"""One member's part in secure sums: sessions one after the other, and in each the sums that nobody holds a total of.

A session ends when a member is away, with its name, or when parts of a sum do not fit. The next one has the same set and goes on at the
first sum without a total: totals that a member holds are final and are fetched. There is no input or output here: messages and moments come
in, and messages for neighbours come out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import ArrayLike

from p2pfl.errors import BadMessage, some
from p2pfl.privacy.fixed_point import Limbs
from p2pfl.protocol.early_messages import EarlyMessages
from p2pfl.protocol.held_totals import final_totals
from p2pfl.protocol.paced_answers import PacedAnswers
from p2pfl.protocol.secure_session import SecureSession
from p2pfl.protocol.secure_sum import SecureSum, SessionVoid, check_planned
from p2pfl.protocol.secure_tree import sum_tree
from p2pfl.protocol.sent_sums import SumStore, note_before_sending, note_heard_sets
from p2pfl.protocol.set_consent import SetConsent
from p2pfl.protocol.signed_history import SignedHistory, check_not_blocked
from p2pfl.protocol.sum_terms import SumTerms
from p2pfl.wire.secure_messages import (
    HELD_BEFORE,
    HeldTotals,
    LastSignedRequest,
    MaskedSubtotal,
    Message,
    Opening,
    SessionEnd,
    SessionMessage,
    SignedTotal,
    Statement,
    SumMessage,
    Total,
    message_key,
    sentence,
    sign,
)

Outgoing = list[tuple[int, Message]]
"""Messages with the neighbours that they are for, in their order."""


class SecureMember:
    """Sessions and sums of one node.

    Args:
        terms: the plan and who takes part.
        neighbours: of each member in the study's graph, by places in the roster.
        me: place of this node.
        signing: its identity.
        store: what its site remembers of sums and sessions.
        totals: confirmed totals that this node has kept, by their sum ids.
        patience_s: after this time without a word a member is away.
        consents: of members that may be in a smaller atom.
    """

    def __init__(
        self,
        terms: SumTerms,
        neighbours: Sequence[Collection[int]],
        me: int,
        signing: Ed25519PrivateKey,
        store: SumStore,
        *,
        patience_s: float,
        totals: Mapping[str, Limbs] | None = None,
        consents: Collection[SetConsent] = (),
    ) -> None:
        self.terms, self._me, self._signing, self._store = terms, me, signing, store
        self._neighbours = sorted(neighbours[me])
        self._tree = sum_tree(neighbours, terms.participants, terms.names)
        self._patience_s, self._consents = patience_s, consents
        self.totals: dict[str, Limbs] = dict(totals or {})
        """Confirmed totals by their sum ids; they are final."""
        self.session: SecureSession | None = None
        self.ended: SessionEnd | None = None
        """Why the last session ended before its plan; None while one goes on."""
        self.history = SignedHistory(terms.study, me, store)
        """The newest that members have signed, and whether this node was restored from a backup."""
        self._opened_s = 0.0
        self._heard_s: dict[int, float] = {}
        self._sum: SecureSum | None = None
        self._held: dict[int, HeldTotals] = {}
        self._final: dict[str, bytes] | None = None
        """HMACs of totals that were held before the session, by sum id; None until all have said what they hold."""
        self._flooded: dict[tuple[str, int, int], Statement] = {}
        self._early = EarlyMessages(len(terms.names))
        self._past: set[bytes] = set()
        self._answers = PacedAnswers(self.history)
        self._outgoing: Outgoing = []

    @property
    def is_ready(self) -> bool:
        """Whether the next sum may begin: the session is open, and the sum before is confirmed."""
        is_open = self.session is not None and not self.session.is_over and self._final is not None
        return is_open and (self._sum is None or self._sum.is_confirmed)

    @property
    def waits_for(self) -> list[int]:
        """Members from which this node needs something to go on."""
        if self.session is None or self.session.is_over:
            return []
        if self.session.transcript is None:
            return [*self.session.missing]
        if self._final is None:
            return [each for each in self.terms.participants if each not in self._held]
        return list(self._sum.waits_for) if self._sum is not None else []

    def ask_neighbours(self) -> Outgoing:
        """Ask all neighbours, at the start of the node, for the newest that it has signed itself."""
        return [(neighbour, LastSignedRequest(member=self._me)) for neighbour in self._neighbours]

    def open(self, now_s: float) -> Outgoing:
        """Open the next session; a running one ends. A member that takes no part is let in by the openings of others."""
        if self._me not in self.terms.participants:
            return []
        known = max(self.history.last_session(), self.session.number if self.session is not None else 0)
        self._begin_session(SecureSession(self.terms, known + 1, self._me, self._signing), now_s)
        return self._taken()

    def contribute(self, position: int, parameters: Any, values: ArrayLike, now_s: float) -> Outgoing:
        """Give this site's numbers to a sum, or none where its total is held already and only has to be waited for.

        Where that fails nothing has been sent, and others wait for this node: the caller lets it `leave` the session.

        Args:
            position: of the sum in the plan; it only grows.
            parameters: on which the statistic depends beside the rows.
            values: of the planned shape.
            now_s: on the caller's clock.

        Raises:
            ConfigError: a number is beyond its bound, or this site has sent something else before.
            StoreError: the disk failed.
        """
        if not self.is_ready or self.session is None or self._final is None:
            raise ValueError("no sum can begin now")
        sum_id, planned = self.terms.sum_id(position, parameters), self.terms.sums[position]
        if sum_id in self.totals or sum_id in self._final:
            return []
        form = planned.number_format
        form.check(values, planned.bound, len(self.terms.participants), statistic=planned.statistic)
        check_not_blocked(self._store, self.terms, position)
        integers = form.encode(values)
        note_before_sending(self._store, self.terms, position, parameters, integers, consents=self._consents)
        self._start_sum(position, sum_id)
        self._guarded(lambda sum_: sum_.contribute(integers))
        self._replay(now_s)
        return self._taken()

    def receive(self, sender: int, message: Message, now_s: float) -> Outgoing:
        """Take a message from a neighbour; messages for others come out.

        Raises:
            BadMessage: it is not one that may count; the reason says why, and nothing has changed.
        """
        self._heard_s[sender] = now_s
        try:
            self._dispatch(sender, message, now_s)
        finally:
            self._finish_sum(now_s)
            self._answer_due(now_s)
        return self._taken()

    def note_heard(self, member: int, now_s: float) -> None:
        """Note that a neighbour is there, as its heartbeats tell."""
        self._heard_s[member] = now_s

    def look(self, now_s: float) -> Outgoing:
        """Give answers that are owed, and end the session where a member is away for longer than this node's patience, with its name."""
        self._answer_due(now_s)
        session = self.session
        if session is None or session.is_over:
            return self._taken()
        if session.transcript is None:
            away = [each for each in session.missing if now_s - self._opened_s > self._patience_s]
        else:
            near = self._tree.neighbours(self._me) if self._me in self._tree.members else ()
            away = [each for each in near if now_s - max(self._heard_s.get(each, 0.0), self._opened_s) > self._patience_s]
        if away:
            self._end(f"{some([self.terms.names[each] for each in away])}: away", tuple(away))
        return self._taken()

    def leave(self, reason: str, names: tuple[int, ...] | None = None) -> Outgoing:
        """End the session because this node cannot go on with it; *names* are the members at fault, None: this one."""
        self._end(reason, (self._me,) if names is None else names)
        return self._taken()

    def outstanding(self, neighbour: int) -> list[Message]:
        """Everything that a neighbour may have missed, to be sent again when its link is back."""
        if self.session is None or self.session.is_over:
            return [] if self.ended is None else [self.ended]
        found: list[Message] = [*self.session.openings.values(), *self._flooded.values()]
        if neighbour in self._tree.neighbours(self._me):
            found += [self._final_total(sum_id) for sum_id in sorted(self._final or {}) if sum_id in self.totals]
        return found + (self._sum.outstanding(neighbour) if self._sum is not None else [])

    # ---- messages

    def _dispatch(self, sender: int, message: Message, now_s: float) -> None:
        match message:
            case LastSignedRequest():
                self._answers.ask(sender, message.member)
            case Opening():
                self._take_opening(sender, message, now_s)
            case SessionEnd():
                self._take_end(sender, message)
            case SignedTotal() if message.member == self._me and self._is_news_of_mine(message):
                pass
            case _:
                self._take_in_session(sender, message, now_s)

    def _take_in_session(self, sender: int, message: SessionMessage, now_s: float) -> None:
        if message.transcript in self._past or self._flooded.get(message_key(sender, message)) == message:
            return  # late, or come by another way before, when its signature was checked
        check_planned(message, self.terms)
        is_array = isinstance(message, (MaskedSubtotal, Total))
        if is_array and (self._me not in self._tree.members or sender not in self._tree.neighbours(self._me)):
            raise BadMessage(f"member {sender} is no neighbour in the tree of the sum", reason="wrong_place")
        session = self.session
        if session is None or session.is_over or session.transcript is None:
            self._early.keep(sender, message)
            return
        if message.transcript != session.transcript:
            raise BadMessage("a message of another session", reason="wrong_transcript")
        if isinstance(message, (MaskedSubtotal, Total)):
            self._take_array(sender, message)
            return
        session.check_signed(message)
        if self._pass_on(sender, message):
            if isinstance(message, HeldTotals):
                self._take_held(message, now_s)
            elif self._me in self._tree.members:
                self._take_of_sum(sender, message)

    def _take_array(self, sender: int, message: MaskedSubtotal | Total) -> None:
        if isinstance(message, Total) and message.position == HELD_BEFORE:
            if self._final is None:
                self._early.keep(sender, message)
            else:
                self._take_final(sender, message)
            return
        self._take_of_sum(sender, message)

    def _take_of_sum(self, sender: int, message: SumMessage) -> None:
        at = self._sum.position if self._sum is not None else HELD_BEFORE
        if message.position < at:
            return  # late: that sum is confirmed
        if message.position > at:
            if self._me in self.terms.participants or self._final is None:
                self._early.keep(sender, message)
                return
            # whoever is further has what this node signed of the sum before
            self._start_sum(message.position, message.sum_id)
        if isinstance(message, (MaskedSubtotal, Total)):
            self._guarded(lambda sum_: sum_.take_array(sender, message))
        else:
            self._guarded(lambda sum_: sum_.take_signed(message))

    def _take_opening(self, sender: int, opening: Opening, now_s: float) -> None:
        session = self.session
        number = session.number if session is not None else 0
        if opening.member == self._me and (session is None or opening != session.openings.get(self._me)):
            self._take_own_opening(opening)
        elif session is None or opening.session > number:
            other = SecureSession(self.terms, opening.session, self._me, self._signing)
            other.take(opening)  # refused before anything has changed
            if opening.session <= self._store.last_session(self.terms.study) and self._me in self.terms.participants:
                self._queue_all([*self.open(now_s)])
                return
            self._begin_session(other, now_s)
            self._pass_opening(sender, opening, now_s)
        elif opening.session < number:
            session.check_signed(opening)
            self._answers.ask(sender, opening.member, None)
        else:
            try:
                is_new = session.take(opening)
            except BadMessage as error:
                if error.reason != "second_opening":
                    raise
                self._answers.ask(sender, opening.member)
                self._end(f"{self.terms.names[opening.member]}: it has opened this session twice", (opening.member,))
                return
            if is_new:
                self._pass_opening(sender, opening, now_s)

    def _answer_due(self, now_s: float) -> None:
        openings = self.session.openings.values() if self.session is not None else ()
        self._queue_all(self._answers.take_due(now_s, openings))

    def _pass_opening(self, sender: int, opening: Opening, now_s: float) -> None:
        self.history.note(opening)
        self._queue_all([(neighbour, opening) for neighbour in self._neighbours if neighbour != sender])
        assert self.session is not None
        if self.session.transcript is not None:
            if self._me in self.terms.participants:
                macs = tuple(sorted((sum_id, self.session.mac(sum_id, total)) for sum_id, total in self.totals.items()))
                mine = sign(HeldTotals(member=self._me, transcript=self.session.transcript, macs=macs), self._signing)
                self._pass_on(self._me, mine)
                self._take_held(mine, now_s)
            else:
                note_heard_sets(self._store, self.terms)
            self._replay(now_s)

    def _take_own_opening(self, opening: Opening) -> None:
        """Look at an opening under this node's own name that it does not know: its files may come from a backup."""
        SecureSession(self.terms, opening.session, HELD_BEFORE, self._signing).check_signed(opening)
        current = self.session.openings.get(self._me) if self.session is not None else None
        if self.history.take_own_opening(opening, current) and self.session is not None and not self.session.is_over:
            self._end(f"{self.terms.names[self._me]}: restored from a backup", (self._me,))

    def _is_news_of_mine(self, message: SignedTotal) -> bool:
        """Take a total that this node has signed and does not know of; whether it is one."""
        if (self.session is not None and self.session.transcript == message.transcript) or message.transcript in self._past:
            return False
        SecureSession(self.terms, 0, HELD_BEFORE, self._signing).check_signed(message)
        self.history.take_own_total(message)
        return True

    def _take_end(self, sender: int, message: SessionEnd) -> None:
        session = self.session
        if session is None or session.is_over or message.session != session.number or message.study != self.terms.study:
            return
        session.check_signed(message)
        self._queue_all([(neighbour, message) for neighbour in self._neighbours if neighbour != sender])
        self.ended = message
        self._forget()

    def _take_held(self, message: HeldTotals, now_s: float) -> None:
        if message.member not in self.terms.participants:
            raise BadMessage(f"member {message.member} has no part in the sums", reason="wrong_place")
        self._held[message.member] = message
        if len(self._held) < len(self.terms.participants) or self._final is not None:
            return
        try:
            self._final = final_totals(self.terms, self._held)
        except SessionVoid as void:
            self._end(void.reason, void.members)
            return
        for sum_id in sorted(self._final.keys() & self.totals.keys()):  # whoever lacks it passes it on to others that do
            lacking = [each for each in self._tree.neighbours(self._me) if each not in self._held or not self._held[each].has(sum_id)]
            self._queue_all([(each, self._final_total(sum_id)) for each in lacking])
        self._replay(now_s)

    def _take_final(self, sender: int, message: Total) -> None:
        """Take a total that was held before the session, and pass it on along the tree."""
        assert self.session is not None and self._final is not None  # noqa: PT018
        if message.sum_id not in self._final:
            raise BadMessage("a total that nobody has said to hold", reason="wrong_place")
        if self.session.mac(message.sum_id, message.limbs) != self._final[message.sum_id]:
            raise BadMessage("a total that is not the one that its holder has signed", reason="differs")
        if message.sum_id in self.totals:
            return
        self.totals[message.sum_id] = message.limbs
        self._queue_all([(neighbour, message) for neighbour in self._tree.neighbours(self._me) if neighbour != sender])

    # ---- sessions and sums

    def _begin_session(self, session: SecureSession, now_s: float) -> None:
        if self.session is not None:
            self._forget()
        if self._me in self.terms.participants:
            self._store.append_session(self.terms.study, session.number)  # before the opening leaves
        self.session, self.ended, self._opened_s, self._final, self._sum = session, None, now_s, None, None
        self._held, self._flooded = {}, {}
        self._early.forget(self._past)
        if (own := session.openings.get(self._me)) is not None:
            self.history.note(own)
            self._queue_all([(each, own) for each in self._neighbours])

    def _start_sum(self, position: int, sum_id: str) -> None:
        before = self._sum.position if self._sum is not None else HELD_BEFORE
        self._flooded = {key: message for key, message in self._flooded.items() if key[2] >= before or key[2] == HELD_BEFORE}
        assert self.session is not None
        arguments = self.session, self._tree, self._me, position, sum_id, self._signing
        self._sum = SecureSum(*arguments, send=lambda *each: self._outgoing.append(each), flood=lambda said: self._pass_on(self._me, said))

    def _guarded(self, step: Callable[[SecureSum], None]) -> None:
        """Do something with the sum; where parts do not fit the session ends with the names."""
        try:
            assert self._sum is not None
            step(self._sum)
        except SessionVoid as void:
            self._end(void.reason, void.members)

    def _finish_sum(self, now_s: float) -> None:
        if self._sum is not None and self._sum.is_confirmed and self._sum.sum_id not in self.totals:
            assert self._sum.total is not None
            self.totals[self._sum.sum_id] = self._sum.total
            self._replay(now_s)

    def _replay(self, now_s: float) -> None:
        """Take up what came too early; what is still too early is kept, what is refused is left out."""
        for sender, message in self._early.take_all():
            try:
                if message_key(sender, message) in self._flooded and not isinstance(message, HeldTotals):
                    self._take_of_sum(sender, message)  # it has been passed on
                else:
                    self._take_in_session(sender, message, now_s)
            except BadMessage:
                continue
        self._finish_sum(now_s)

    def _end(self, reason: str, names: tuple[int, ...]) -> None:
        if self.session is None or self.session.is_over:
            return
        head = {"member": self._me, "study": self.terms.study, "session": self.session.number}
        self.ended = message = sign(SessionEnd(**head, reason=sentence(reason), names=names), self._signing)  # type: ignore[arg-type]
        self._queue_all([(neighbour, message) for neighbour in self._neighbours])
        self._forget()

    def _forget(self) -> None:
        assert self.session is not None
        if self.session.transcript is not None:
            self._past.add(self.session.transcript)
        self.session.erase()

    # ---- sending

    def _pass_on(self, sender: int, message: Statement) -> bool:
        """Pass a flooded message on to the other neighbours; whether it is new."""
        key = message_key(sender, message)
        if key in self._flooded:
            if self._flooded[key].signed_content() != message.signed_content():
                raise BadMessage(f"{self.terms.names[message.member]} says two things of one sum", reason="differs")
            return False
        self._flooded[key] = message
        if isinstance(message, SignedTotal):
            self.history.note(message)
        self._queue_all([(neighbour, message) for neighbour in self._neighbours if neighbour != sender])
        return True

    def _final_total(self, sum_id: str) -> Total:
        assert self.session is not None and self.session.transcript is not None  # noqa: PT018
        return Total(transcript=self.session.transcript, sum_id=sum_id, position=HELD_BEFORE, limbs=self.totals[sum_id])

    def _queue_all(self, messages: Outgoing) -> None:
        self._outgoing += messages

    def _taken(self) -> Outgoing:
        taken, self._outgoing = self._outgoing, []
        return taken
