"""The newest that members have signed, and whether this node's own files know of it: a restored backup does not.

A node asks its neighbours at its start for its own last opening and total. If they know of a session that its store does not know, its
files were restored from a backup, and it cannot know what it has sent since. It takes part from the next sum on.
"""

from __future__ import annotations

from p2pfl.errors import ConfigError
from p2pfl.protocol.sent_sums import SumStore
from p2pfl.protocol.sum_terms import SumTerms
from p2pfl.wire.secure_messages import Message, Opening, SignedTotal


class SignedHistory:
    """One node's memory of the newest opening and total of each member.

    Args:
        study: digest of the study, 64 hex digits.
        me: place of this node.
        store: what its site remembers of sums and sessions.
    """

    def __init__(self, study: str, me: int, store: SumStore) -> None:
        self._study, self._me, self._store = study, me, store
        self._openings: dict[int, Opening] = {}
        self._totals: dict[int, SignedTotal] = {}
        self.is_restored = False
        """Whether a neighbour knows of a session of this node that its own store does not know."""

    def note(self, message: Opening | SignedTotal) -> None:
        """Remember a message whose signature has been checked."""
        if isinstance(message, SignedTotal):
            self._totals[message.member] = message
        elif message.member not in self._openings or message.session >= self._openings[message.member].session:
            self._openings[message.member] = message

    def answer(self, member: int) -> list[Message]:
        """The newest opening and total that a member has signed, as far as they are known."""
        found = self._openings.get(member), self._totals.get(member)
        return [each for each in found if each is not None]

    def messages(self) -> list[Opening | SignedTotal]:
        """All that is remembered, to be kept in a file and noted again after a restart."""
        return [*self._openings.values(), *self._totals.values()]

    def last_session(self) -> int:
        """Number of the newest session that this node has opened, as far as anybody knows; 0 where there is none."""
        opening = self._openings.get(self._me)
        return max(self._store.last_session(self._study), opening.session if opening is not None else 0)

    def take_own_opening(self, opening: Opening, current: Opening | None) -> bool:
        """Take an opening under this node's own signature that a neighbour has; whether it shows that this node's files are old.

        Args:
            opening: with a checked signature.
            current: of this node's session; None where it has none.
        """
        if opening.study != self._study:
            return False
        is_unknown = opening.session > self._store.last_session(self._study)
        is_another = current is not None and opening.session == current.session and opening.signed_content() != current.signed_content()
        if not (is_unknown or is_another):
            return False
        self.note(opening)
        self.is_restored = True
        self._block(0)
        if self._me in self._totals:
            self._block(self._totals[self._me].position + 1)
        return True

    def take_own_total(self, message: SignedTotal) -> None:
        """Take a total under this node's own signature, of a session of an earlier process."""
        known = self._totals.get(self._me)
        if known is None or message.position > known.position:
            self._totals[self._me] = message
        if self.is_restored:
            self._block(message.position + 1)

    def _block(self, position: int) -> None:
        if position > self._store.blocked_until(self._study):
            self._store.append_block(self._study, position)


def check_not_blocked(store: SumStore, terms: SumTerms, position: int) -> None:
    """Raise a ConfigError where this site may have sent into a sum what it does not know of."""
    blocked = store.blocked_until(terms.study)
    if position <= blocked:
        raise ConfigError(
            f"{terms.sums[position].statistic}: this site was restored from a backup and cannot know what it has sent into it;"
            f" it takes part from sum {blocked + 2} of the plan on"
        )
