"""Terms of secure sums that all members agree on beforehand: which sums, over whom, within which bounds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from p2pfl.errors import ConfigError
from p2pfl.governance.encoding import canonical
from p2pfl.privacy.planned_sum import PlannedSum
from p2pfl.wire.secure_messages import MOST_PARTICIPANTS, MOST_SUMS

FEWEST_PARTICIPANTS: Final = 3
"""With two, each knows the other's value from the sum and its own."""

CHECKED_BITS: Final = 128
"""Numbers of a checked sum have so many bits, so that an alteration does not pass by chance."""


@dataclass(frozen=True, kw_only=True)
class SumTerms:
    """A plan of sums over one set of participants.

    Raises:
        ConfigError: the set is too small or too large, a bound does not fit, or a sum cannot be checked; all faults at once.
    """

    study: str
    """Digest of the study, 64 hex digits."""
    sums: tuple[PlannedSum, ...]
    """In the order in which they are asked."""
    participants: tuple[int, ...]
    """Places in the roster, ascending."""
    names: tuple[str, ...]
    """Names of all members, in the roster's order."""
    identities: tuple[str, ...]
    """Public Ed25519 keys of all members, hex, in the roster's order."""
    min_participants: int = FEWEST_PARTICIPANTS
    """No sum over fewer members is given."""
    curious: int = 1
    """How many members may put together what they know."""
    check: bool = False
    """Whether a member that alters a sum is found."""
    agreement: str = ""
    """Digest of what members agree on beside the sums, such as a data contract; empty where there is nothing."""

    def __post_init__(self) -> None:
        if list(self.participants) != sorted(set(self.participants)) or not set(self.participants) <= set(range(len(self.names))):
            raise ValueError("participants are places in the roster, each once, ascending")
        findings = list(self._findings())
        if findings:
            raise ConfigError(findings)

    def _findings(self) -> list[str]:
        num = len(self.participants)
        fewest = max(FEWEST_PARTICIPANTS, self.curious + 2, self.min_participants)
        found = []
        if num < fewest:
            found.append(
                f"a secure sum over {num} participants: expected at least {fewest}, so that the sum is not one member's value"
                f" to {self.curious} curious ones"
            )
        if num > MOST_PARTICIPANTS:
            found.append(f"a secure sum over {num} participants: at most {MOST_PARTICIPANTS} can take part")
        if len(self.sums) > MOST_SUMS:
            found.append(f"a plan of {len(self.sums)} sums: at most {MOST_SUMS} fit into one; make several studies of it")
        for planned in self.sums:
            if not planned.bound < planned.number_format.largest(max(num, 1)):
                found.append(f"{planned.statistic}: numbers up to {planned.bound:g} from {num} sites do not fit in its number format")
            if self.check and planned.number_format.bits != CHECKED_BITS:
                found.append(f"{planned.statistic}: a checked sum needs numbers of {CHECKED_BITS} bits")
        return found

    @cached_property
    def plan(self) -> str:
        """Digest of the sums, in their order, of how they are guarded, and of the agreement where there is one; 64 hex digits."""
        formats = [(each, each.number_format) for each in self.sums]
        sums = [[each.statistic, list(each.shape), form.bits, form.fraction_bits, each.bound] for each, form in formats]
        agreed = [self.agreement] if self.agreement else []
        return hashlib.sha256(canonical(["p2pfl sum plan 1", sums, self.min_participants, self.curious, self.check, *agreed])).hexdigest()

    @cached_property
    def participant_identities(self) -> frozenset[str]:
        """Public keys of the participants: they are the same members in another study."""
        return frozenset(self.identities[each] for each in self.participants)

    def question_id(self, position: int) -> str:
        """Digest of a statistic whatever its parameters are, the same in every study; 64 hex digits."""
        return hashlib.sha256(canonical(["p2pfl question 1", self.sums[position].statistic])).hexdigest()

    def statistic_id(self, position: int, parameters: Any) -> str:
        """Digest of a statistic with its parameters, the same in every study; 64 hex digits."""
        return hashlib.sha256(canonical(["p2pfl statistic 1", self.sums[position].statistic, parameters])).hexdigest()

    def sum_id(self, position: int, parameters: Any) -> str:
        """Digest of one sum of this study; 64 hex digits.

        Args:
            position: of the sum in the plan.
            parameters: numbers and texts on which the statistic depends beside the rows, such as coefficients that earlier totals gave.
        """
        return hashlib.sha256(canonical(["p2pfl sum 1", self.study, position, self.statistic_id(position, parameters)])).hexdigest()
