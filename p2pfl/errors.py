"""Errors of this package, sorted by who is at fault and what to do about it."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Sequence
from typing import Final

_STEERS = "\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f"
"""Control characters of both sets, marks and overrides of direction, separators of lines, and what has no width."""

_UNSAFE: Final = re.compile(f"[{_STEERS}]")
UNSAFE_OR_BREAK: Final = re.compile(f"[\t\n{_STEERS}]")

_ALL_SHOWN_UP_TO = 20
_MOST_SHOWN = 10  # findings, where there are more than can be read at once
_MOST_NAMES = 8


def visible(text: str) -> str:
    r"""Escape everything in a text that steers a terminal, as in \u001b; line ends and tabs stay.

    The escapes are those of JSON.
    """
    return _UNSAFE.sub(_escape, text)


def on_one_line(text: str) -> str:
    r"""Escape a text as `visible` does, and put it on one line: a line end becomes \u000a."""
    return UNSAFE_OR_BREAK.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"  # noqa: PLR2004


def summed_up(findings: Sequence[str]) -> list[str]:
    """Shorten a list of more than twenty findings to the first ten and how many more there are."""
    shown = findings if len(findings) <= _ALL_SHOWN_UP_TO else findings[:_MOST_SHOWN]
    return [*shown, *([f"and {len(findings) - len(shown):,} more"] if len(shown) < len(findings) else [])]


def some(names: Sequence[str]) -> str:
    """List names in one text, or the first eight and how many there are."""
    return ", ".join(names[:_MOST_NAMES]) + (f", ... ({len(names)} in all)" if len(names) > _MOST_NAMES else "")


class P2PFLError(Exception):
    """The root of all errors that this package raises on purpose.

    A caller's wrong argument is a plain ValueError and not part of it.
    """


class ConfigError(P2PFLError):
    """The user wrote something that cannot be: fix the named keys in the file or the command-line option that is the place.

    A finding is one sentence on one fault, with the key, the value given and what is allowed.
    """

    def __init__(self, findings: str | Sequence[str], place: str | None = None) -> None:
        self.findings = (findings,) if isinstance(findings, str) else tuple(findings)
        self.place = place
        shown_place = on_one_line(place or "")
        lines = [f"{shown_place}:" if len(self.findings) > 1 else f"{shown_place}: {on_one_line(self.findings[0])}"] if place else []
        if not place or len(self.findings) > 1:
            indent = "  " if place else ""
            lines += [indent + on_one_line(finding) for finding in summed_up(self.findings)]
        super().__init__("\n".join(lines))


class ConflictError(ConfigError):
    """Values that are right one by one and wrong together: change one of them."""


class TaskNotAllowed(ConfigError):
    """A file asks for task code that nobody has allowed here: allow it, or leave it."""


class TopologyError(ConfigError):
    """The graph is not one that gossip can run on."""


class DataError(ConfigError):
    """A site's data are missing or not as the task needs them."""


class ValidationRowsError(DataError):
    """A site has too few training rows for validation rows to be taken out of them."""


class MissingExtraError(ConfigError):
    """An optional dependency is not installed; the message names the extra."""


class TaskError(P2PFLError):
    """A user's task code failed while it ran: mend the task. What it raised is the `__cause__`.

    The fault says what it raised or returned, and what it was given: shapes, never values. The function is "model", "loss",
    "metric 'auroc'", "prepare" or "probabilities"; task and function are None where the caller knows them and adds them.
    """

    def __init__(
        self, fault: str, *, task: str | None = None, function: str | None = None, site: str | None = None, round: int | None = None
    ) -> None:
        self.fault = fault
        self.task, self.function, self.site, self.round = task, function, site, round
        known = {f"task {task!r}": task, str(function): function, f"site {site!r}": site, f"round {round}": round}
        where = ", ".join(text for text, value in known.items() if value is not None)
        super().__init__(f"{where}: {fault}" if where else fault)


class TransportError(P2PFLError):
    """The network failed: retry."""


class MembersMissing(P2PFLError):
    """Fewer members than agreed were there in time, and nobody has trained: see to those that are named, then start again."""


class Paused(KeyboardInterrupt):
    """A signal has ended a run before its end, and its state is kept; *go_on* says how it goes on, as half a sentence."""

    def __init__(self, go_on: str, by: signal.Signals = signal.SIGINT) -> None:
        self.go_on, self.by = go_on, by
        super().__init__(f"paused by {by.name}; {go_on}")


class StoreError(P2PFLError):
    """The disk failed or holds something unreadable: stop before more is lost."""


class DiskFull(StoreError):
    """The disk has no room: make some; what could not be written can be tried again."""


def store_error(place: object, error: OSError) -> StoreError:
    """The error for a file that could not be written, because the disk is full or for another reason."""
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
    return kind(f"{place}: cannot be written: {error.strerror or error}")


class QueueFull(TransportError):
    """The link is up and has no room now: the message can be offered again."""


class PeerError(P2PFLError):
    """A neighbour broke the protocol: drop the neighbour's message, never the node.

    The refusal is counted under its reason, such as "wrong_study"; the detail says what came and what was expected, never a weight.
    """

    reason = "bad_message"

    def __init__(self, detail: str, reason: str | None = None) -> None:
        if reason is not None:
            self.reason = reason
        super().__init__(f"{self.reason}: {detail}")


class BadMessage(PeerError):
    """A message is none of this protocol, or not one that may count."""


class StaleRound(PeerError):
    """A message of a round that is over, or so far ahead that it cannot be used yet."""

    reason = "stale_round"


class Unauthorized(PeerError):
    """The sender may not say this here: not in the roster, another study, another model."""

    reason = "unauthorized"
