"""Files that a node writes at the end of its run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from p2pfl.evaluation.conclusion import conclude, note_late_departures
from p2pfl.evaluation.cross_site import at_one_site
from p2pfl.evaluation.outcome import FinalModels, Outcome
from p2pfl.experiment.plan import Plan
from p2pfl.governance.result_contract import Difference
from p2pfl.node.mixing import Mixing
from p2pfl.node.run_log import RunLog
from p2pfl.node.seconds import RunSeconds
from p2pfl.node.sending import Sending
from p2pfl.protocol.agreed_start import AgreedStart
from p2pfl.protocol.network_view import NetworkViewAdapter
from p2pfl.protocol.protocol import Protocol
from p2pfl.runs.departures import Departure
from p2pfl.runs.events import EventKind, event_row
from p2pfl.runs.records import read_run
from p2pfl.training import Population

_SPANS = 5
"""Most spans of rounds without any neighbour that are named."""


class NodeConclusion:
    """Result and departures of one node's run; *accepted* are differences from the study's result contract."""

    def __init__(
        self,
        plan: Plan,
        me: str,
        population: Population,
        protocol: Protocol,
        mixing: Mixing,
        agreed: AgreedStart,
        view: NetworkViewAdapter | None,
        run_log: RunLog,
        sending: Sending,
        seconds: RunSeconds,
        accepted: Sequence[Difference],
    ) -> None:
        self._plan, self._me, self._population, self._protocol, self._mixing, self._agreed = plan, me, population, protocol, mixing, agreed
        self._view, self._log, self._sending, self._seconds, self._accepted = view, run_log, sending, seconds, accepted
        self._outcome: Outcome | None = None

    def note_differences(self) -> None:
        """Put on record what this site has accepted, once."""
        noted = self._noted_differences()
        for difference in self._accepted:
            if (detail := f"{difference.kind}: {difference.detail}") not in noted:
                self._log.event(EventKind.DIFFERENCE_ACCEPTED, detail)

    def outcome(self, reason: str) -> str:
        """Name the end of this node, where the network stopped for a reason."""
        return "diverged" if self._population.all_diverged else reason

    def write(self, reason: str, rounds: int) -> None:
        """Write models, figures and summary.

        Args:
            reason: why the network stopped.
            rounds: how many this node has made.
        """
        population = self._population
        self._outcome = self._conclude(
            self.outcome(reason),
            rounds,
            metrics={self._me: population.evaluate()[0]},
            models=FinalModels(names=[self._me], x_NP=population.estimate(), buffers=population.buffers, population=population),
            book=lambda _: self._seconds.total(),
            has_agreed=self._protocol.edges.closing == "converged",
            started_without=self._agreed.missing,
            cross_site=at_one_site(self._plan, population, self._me, self._mixing.release_last_heard(), self._log.event),
            more=self._accepted_rows(),
        )

    def write_without_result(self, reason: str, rounds: int) -> None:
        """Write the summary of a run that somebody has to decide on: the models here are not its result."""
        self._conclude(reason, rounds, more=self._accepted_rows())

    def write_without_start(self, why: str) -> None:
        """Write the summary of a start without enough members; a later start waits anew."""
        self._log.folder.append_event(event_row(EventKind.NOT_STARTED, 0, self._me, why))  # whoever catches it logs it
        departures = [Departure(kind="members_missing", detail=f"{self._me}: {why}")]
        self._conclude("members_missing", 0, departures=departures)

    async def note_end(self, linger_s: float) -> None:
        """Record neighbours without a last word, and rounds without any neighbour."""
        if unacknowledged := self._protocol.unacknowledged():
            waited = f"for which it waited {linger_s:g} s"
            self._log.event(EventKind.UNACKNOWLEDGED, f"ended without the last word of {', '.join(unacknowledged)}, {waited}")
        if alone := await asyncio.to_thread(self._rounds_alone):
            spans = ", ".join(f"{first} to {last}" for first, last in alone[:_SPANS]) + (", and others" if len(alone) > _SPANS else "")
            self._log.event(EventKind.ROUNDS_ALONE, f"rounds {spans} were made without any neighbour")

    def note_others(self, rounds: int) -> None:
        """Record members that have not ended with the others, and add them to the summary.

        Args:
            rounds: how many this node has made.
        """
        if self._view is None or self._outcome is None:
            return
        folder = self._log.folder
        self._view.take_note(folder)
        company = self._agreed.company or list(self._plan.names)
        if unended := self._view.unended(rounds, company, self._protocol.edges.ahead):
            sees_most = self._view.sees_most_end(company)
            for name, number in unended.items():
                last = "no round of it was heard of" if number is None else f"last heard of in round {number} of {rounds}"
                if sees_most:
                    self._log.event(EventKind.GONE, f"{name}: {last}")
                else:  # the others may have ended while this node was away
                    self._log.event(EventKind.END_UNKNOWN, f"how {name} ended is not known here: {last}")
            self._log.say_rest()
            note_late_departures(self._plan, folder, self._outcome)

    def _conclude(self, reason: str, rounds: int, **known: Any) -> Outcome:
        """Write what is known at the end; by default the models here are no result."""
        self._log.say_rest()
        without_result: dict[str, Any] = {"metrics": {self._me: {}}, "models": None, "book": lambda _: self._seconds.spent}
        outcome = Outcome(
            scope="node",
            engine="daemons",
            rounds=rounds,
            stop_reason=reason,
            bytes_sent=self._sending.bytes_sent,
            row_by_row=self._population.row_by_row,
            **{**without_result, **known},
        )
        conclude(self._plan, self._log.folder, outcome)
        return outcome

    def _rounds_alone(self) -> list[tuple[int, int]]:
        """First and last of training rounds in a row in which no neighbour came, of those that had started; where everybody waits for all.

        One round by itself is no such span: messages are late now and then, and some nodes have one neighbour only.
        """
        company = self._agreed.company
        if not self._protocol.pace.in_step or not self._plan.schedule.is_steady:
            return []
        expected = {name for name in self._protocol.neighbours if company is None or name in company}
        rows = read_run(self._log.folder.path, experiment=self._plan.experiment.as_dict()).nodes if expected else []
        spans: list[tuple[int, int]] = []
        for number in sorted({row["round"] for row in rows if row["kind"] == "train" and expected <= set(row["skipped"])}):
            if spans and number == spans[-1][1] + 1:
                spans[-1] = (spans[-1][0], number)
            else:
                spans.append((number, number))
        return [(first, last) for first, last in spans if first < last]

    def _noted_differences(self) -> list[str]:
        return [str(event["detail"]) for event in self._log.folder.events() if event["event"] == EventKind.DIFFERENCE_ACCEPTED]

    def _accepted_rows(self) -> dict[str, Any]:
        """The summary's part on differences from the result contract, of all starts."""
        noted = [*self._noted_differences(), *(f"{found.kind}: {found.detail}" for found in self._accepted)]
        split = (text.partition(": ") for text in dict.fromkeys(noted))
        rows = [{"node": self._me, "kind": kind, "detail": detail} for kind, _, detail in split]
        return {"accepted_differences": rows} if rows else {}
