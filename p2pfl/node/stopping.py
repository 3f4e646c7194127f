"""The end of the rounds, as the network agrees on it and as this node's own test sees it."""

from __future__ import annotations

import math

import numpy as np

from p2pfl.algorithms.stopping import NEVER
from p2pfl.experiment.plan import Plan
from p2pfl.node.mixing import RoundStatistics
from p2pfl.protocol.protocol import Protocol
from p2pfl.runs.events import EventKind


def left_out(number: int, target: int, training_rounds: int) -> str:
    """Say which rounds a jump from one round to another leaves untrained: the target only mixes."""
    where, first, last = f"from round {number} to round {target}", number + 1, min(target, training_rounds - 1)
    if first > last:
        return f"{where}; all that were left out only mix"
    return f"{where}; " + (f"round {first} was not trained" if first == last else f"rounds {first} to {last} were not trained")


class Stopping:
    """Runs the stop rule on this node's rounds."""

    def __init__(self, plan: Plan, protocol: Protocol) -> None:
        self._plan, self._protocol = plan, protocol
        self._own_test_holds = True
        """Whether the models of the neighbours that came to the last round were as close as the stop rule asks."""

    def note_jump(self) -> None:
        """Rounds were left out: nothing is known of their models."""
        self._own_test_holds = False

    def is_over(self, number: int) -> bool:
        """Tell whether the network has stopped before a round."""
        return self._protocol.stopping.stop_round is not None and number > self._protocol.stopping.stop_round

    def agree(self, number: int, seen: RoundStatistics, heard: list[int]) -> None:
        """Count a round towards the agreement to stop; *heard* are the neighbours' consensus counters."""
        rule, protocol = self._plan.stop_rule, self._protocol
        if rule is None or number < self._plan.experiment.rounds:
            return
        passed_N = rule.passes(np.array([seen.met]), np.array([(seen.norm or 0.0) ** 2]))
        if seen.squared is not None and math.isfinite(seen.met):  # it is not known yet where nobody came or the graph changes
            self._own_test_holds = bool(passed_N[0])
        passed_N &= not seen.skipped
        agreed_NK = np.array([heard], dtype=np.int64).reshape(1, -1)
        stops_NK = np.full_like(agreed_NK, NEVER)  # the protocol has looked at what was said of stopping
        agreed_N = rule.consensus_counter(passed_N, np.array([protocol.stopping.consensus_counter]), agreed_NK)
        own = NEVER if protocol.stopping.stop_round is None else protocol.stopping.stop_round
        stop = int(rule.stop_round(number, agreed_N, np.array([own]), stops_NK)[0])
        protocol.stopping.agree(number, int(agreed_N[0]), None if stop == NEVER else stop)

    def reason(self, number: int) -> str:
        """Say why the rounds before this one were the last: "converged", "rounds" or "paused"."""
        stop_round, on_event = self._protocol.stopping.stop_round, self._protocol.edges.on_event
        if stop_round is None or number <= stop_round:
            return "paused" if number < self._plan.experiment.last_possible_round else "rounds"
        if number > stop_round + 1:
            on_event(EventKind.STOPPED_LATE, f"the network stopped after round {stop_round}, this node after {number - 1}")
        if self._own_test_holds:
            return "converged"
        me = self._protocol.edges.me
        on_event(EventKind.HURRIED, f"{me}: the network stopped after round {stop_round}, and its own test did not pass in its last round")
        return "rounds"
