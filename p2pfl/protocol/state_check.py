"""Check at each handshake that no state went back: nothing is averaged between two nodes of which one knows less than it has said."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from p2pfl.protocol.edges import Edges
from p2pfl.protocol.ledger import goes_back
from p2pfl.protocol.neighbour import Neighbour
from p2pfl.protocol.stop_agreement import StopAgreement
from p2pfl.runs.events import EventKind
from p2pfl.wire.messages import NOTHING_REMEMBERED, Goodbye, Hello, Remembered

WITHOUT_ITS_STATE = "it was started anew without its state"

STATE_LOST = "state_lost"
"""Two neighbours do not talk, because one of them knows less of itself than the other one remembers."""


class StateCheck:
    """One node's memory of its neighbours' states, and theirs of its own; *forget* drops what a neighbour sent before it began anew."""

    def __init__(self, edges: Edges, stopping: StopAgreement, *, forget: Callable[[str], None], counts_edges: bool) -> None:
        self._edges, self._stopping, self._forget, self._counts_edges = edges, stopping, forget, counts_edges
        self.own: dict[str, str] = {}
        """Neighbours that remember more of this node than it knows itself, with what they remember: its state went back."""
        self._accepted: dict[str, deque[int]] = {name: deque(maxlen=8) for name in edges.neighbours}
        """By neighbour, incarnations whose state was as it is remembered here: a process does not go back."""
        self._lost_of: dict[str, int] = {}
        """By neighbour, the last incarnation of which it was said that its state went back."""

    def passes(self, neighbour: Neighbour, hello: Hello) -> bool:
        """Whether both ends know of themselves what the other one remembers; if not they do not talk, and nothing is averaged."""
        ledger, edges, name = neighbour.ledger, self._edges, neighbour.name
        here, there = Remembered(anew=edges.anew, report=ledger.report()), Remembered(anew=hello.anew, report=hello.report)
        news = ""
        if goes_back(hello.remembered, here):
            if name not in self.own:
                then, now = self._as_of(hello.remembered, here), self._as_of(here, hello.remembered)
                self.own[name] = f"{name} remembers it {then}, and it is {now}"
                news = f"{edges.me}: its state went back: {self.own[name]}; restore its newest state, or start it with --start-anew"
            self._refuse(neighbour, news)
            return False
        if hello.incarnation in self._accepted[name]:
            return True
        before = ledger.remembered()
        if there.anew <= before.anew and goes_back(before, there):
            if self._lost_of.get(name) != hello.incarnation:
                self._lost_of[name] = hello.incarnation
                neighbour.note_state(f"it was {self._as_of(before, there)}, and now is {self._as_of(there, before)}")
                remedy = "nothing of it is taken in until its state is restored, or it is started with --start-anew"
                news = f"{name}: its state went back: {neighbour.state_lost}; {remedy}"
            self._refuse(neighbour, news)
            return False
        self._accepted[name].append(hello.incarnation)
        if there.anew > before.anew:
            self._begin_anew(neighbour, before, there)
        elif neighbour.state_lost:
            edges.on_event(EventKind.STATE_RESTORED, f"{neighbour.name}: its state is again that of {self._as_of(there)}", neighbour.name)
        neighbour.note_state("")
        return True

    def _begin_anew(self, neighbour: Neighbour, before: Remembered, now: Remembered) -> None:
        """The neighbour has begun without its state, as its administrator has agreed to: what it said before counts no more."""
        neighbour.begin_anew(now.anew)
        self._forget(neighbour.name)
        if before != NOTHING_REMEMBERED:
            states = f"it was {self._as_of(before)}, and now is {self._as_of(now)}"
            self._edges.on_event(EventKind.STARTED_ANEW, f"{neighbour.name}: {WITHOUT_ITS_STATE}: {states}", neighbour.name)

    def _refuse(self, neighbour: Neighbour, news: str) -> None:
        """Talk no more to the neighbour, but to say what is remembered of it: once now, if there is news of it, and with every Hello."""
        if news:
            self._edges.on_event(EventKind.STATE_LOST, news, neighbour.name)
        self._edges.refused[STATE_LOST] += 1
        neighbour.note_missed()
        neighbour.session.refuse()
        if news:
            neighbour.queue(self._stopping.hello(neighbour))
            neighbour.queue(Goodbye(reason=STATE_LOST))

    def _as_of(self, state: Remembered, other: Remembered | None = None) -> str:
        """The place in the run that a node's state belongs to, in words; told apart from another one."""
        report, phases = state.report, self._edges.phases
        if report.closed_through < 0:
            return "at the start"
        if self._counts_edges:
            through = f"after exchange {report.closed_through} over this link"
        else:
            through = f"after round {report.closed_through // phases}"
            through += f" (phase {report.closed_through % phases})" if phases > 1 else ""
        if other is None or other.report.closed_through != report.closed_through:
            return through
        return f"{through} (settled {report.settled}, confirmed {report.confirmed}, started anew {state.anew})"

    def snapshot(self) -> dict[str, Any]:
        """Metadata for a checkpoint."""
        return {STATE_LOST: {name: neighbour.state_lost for name, neighbour in self._edges.neighbours.items() if neighbour.state_lost}}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Take up what `snapshot` gave; an earlier version did not write it."""
        for name, why in metadata.get(STATE_LOST, {}).items():
            self._edges.neighbours[name].note_state(why)
