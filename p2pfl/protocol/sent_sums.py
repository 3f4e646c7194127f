"""Memory of what a site has sent into sums: written before the first masked byte leaves, and held against every later request.

A sum counts as released once a masked value was sent, because whoever holds the total can say that the attempt failed. From then on a site
sends into this sum only the same integers over the same set of members, whatever has been restored from whatever backup.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from p2pfl.errors import ConfigError
from p2pfl.governance.encoding import canonical
from p2pfl.privacy.fixed_point import Limbs
from p2pfl.protocol.released_sets import check_sets, fewest_in_atom
from p2pfl.protocol.set_consent import SetConsent, consenting_members
from p2pfl.protocol.sum_terms import SumTerms


@dataclass(frozen=True, kw_only=True, slots=True)
class SentSum:
    """One sum into which a site has begun to send."""

    sum_id: str
    statistic_id: str
    """A question has one of these in all studies."""
    participants: frozenset[str]
    """Identities, which are the same in every study."""
    plan: str
    """Digest of the plan, 64 hex digits."""
    integers: bytes
    """HMAC-SHA256 of the site's integers under a key that never leaves it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeardSet:
    """A set over which others have been asked a statistic, in a session in which this site took no part."""

    question_id: str
    """Digest of the statistic whatever its parameters are: which ones were asked is not known here."""
    participants: frozenset[str]
    """Identities, which are the same in every study."""


class SumStore(Protocol):
    """A site's memory of its sums and sessions, over all studies; it only grows."""

    @property
    def key(self) -> bytes:
        """The site's own secret for `SentSum.integers`."""
        ...

    def sent(self) -> Sequence[SentSum]:
        """All sums into which this site has sent, the oldest first."""
        ...

    def append_sent(self, entry: SentSum) -> None:
        """Write an entry so that it is there after a loss of power, before this returns; StoreError where that fails."""
        ...

    def heard(self) -> Sequence[HeardSet]:
        """All sets of others that this site has heard of."""
        ...

    def append_heard(self, entry: HeardSet) -> None:
        """Write a set of others so that it is there after a loss of power; StoreError where that fails."""
        ...

    def last_session(self, study: str) -> int:
        """Number of the last session of a study that this site has opened; 0 where there is none."""
        ...

    def append_session(self, study: str, number: int) -> None:
        """Write that a session is opened so that it is there after a loss of power; StoreError where that fails."""
        ...

    def blocked_until(self, study: str) -> int:
        """Position of the last sum of a study into which this site may not send, because a backup was restored; -1 where there is none."""
        ...

    def append_block(self, study: str, position: int) -> None:
        """Write that nothing may be sent up to a position; StoreError where that fails."""
        ...


def note_heard_sets(store: SumStore, terms: SumTerms) -> None:
    """Write down that a session of others has opened: all sums of its plan count as released over its set.

    A site that is asked later over another set would otherwise not know of totals that, with the new one, tell a sum over few members.

    Raises:
        StoreError: the disk failed.
    """
    known = set(store.heard())
    for position in range(len(terms.sums)):
        entry = HeardSet(question_id=terms.question_id(position), participants=terms.participant_identities)
        if entry not in known:
            store.append_heard(entry)
            known.add(entry)


def note_before_sending(
    store: SumStore, terms: SumTerms, position: int, parameters: Any, integers: Limbs, *, consents: Collection[SetConsent] = ()
) -> None:
    """Write down a sum before its first masked byte leaves; nothing is written where it is the same as before.

    Args:
        store: of this site.
        terms: of the sum.
        position: of the sum in the plan.
        parameters: on which the statistic depends beside the rows.
        integers: of this site, (..., L).
        consents: of members that may be in a smaller atom.

    Raises:
        ConfigError: this site has sent other integers into the sum, or over another set; or the statistic over sets that, with this
            one, would tell a sum over few members; or a consent is not signed. The error names the members; nothing may be sent.
        StoreError: the disk failed.
    """
    sum_id, statistic = terms.sum_id(position, parameters), terms.sums[position].statistic
    names: Mapping[str, str] = dict(zip(terms.identities, terms.names, strict=True))
    new = SentSum(
        sum_id=sum_id,
        statistic_id=terms.statistic_id(position, parameters),
        participants=terms.participant_identities,
        plan=terms.plan,
        integers=hmac.digest(store.key, canonical([sum_id, list(integers.shape)]) + integers.astype("<u8").tobytes(), "sha256"),
    )
    entries = store.sent()
    for entry in entries:
        if entry.sum_id != sum_id:
            continue
        if entry.participants != new.participants:
            differing = sorted(names.get(each, each[:16]) for each in entry.participants ^ new.participants)
            raise ConfigError(f"{statistic}: this site has sent it over another set of members; {', '.join(differing)} make the difference")
        if entry.plan != new.plan:
            raise ConfigError(f"{statistic}: this site has sent it under another plan; go on with that plan, or ask in another study")
        if not hmac.compare_digest(entry.integers, new.integers):
            raise ConfigError(
                f"{statistic}: this site has sent other numbers into it; restore the rows of that time, or ask anew in another study"
            )
        return
    released = [entry.participants for entry in entries if entry.statistic_id == new.statistic_id]
    released += [entry.participants for entry in store.heard() if entry.question_id == terms.question_id(position)]
    consenting = consenting_members(consents, terms.question_id(position), new.participants)
    fewest = fewest_in_atom(terms.min_participants, terms.curious)
    check_sets(statistic, new.participants, released, fewest=fewest, consenting=consenting, names=names)
    store.append_sent(new)
