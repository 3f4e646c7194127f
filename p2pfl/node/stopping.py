"""The end of the rounds, as the network agrees on it and as this node's own test sees it."""

from __future__ import annotations

import numpy as np

from p2pfl.algorithms.stopping import NEVER
from p2pfl.node.node import Node
from p2pfl.runs.events import EventKind


def left_out(number: int, target: int, training_rounds: int) -> str:
    """Say which rounds a jump from one round to another leaves untrained: the target only mixes."""
    where, first, last = f"from round {number} to round {target}", number + 1, min(target, training_rounds - 1)
    if first > last:
        return f"{where}; all that were left out only mix"
    return f"{where}; " + (f"round {first} was not trained" if first == last else f"rounds {first} to {last} were not trained")


def is_over(node: Node) -> bool:
    """Tell whether the network has stopped before the round that a node is in."""
    stop_round = node.protocol.stopping.stop_round
    return stop_round is not None and node.place.round > stop_round


def agree(node: Node, heard: list[int]) -> None:
    """Count a node's round towards the agreement to stop; *heard* are the neighbours' consensus counters."""
    rule, stopping, number = node.plan.stop_rule, node.protocol.stopping, node.place.round
    if rule is None or number < node.plan.experiment.rounds:
        return
    agreed_NK = np.array([heard], dtype=np.int64).reshape(1, -1)
    stops_NK = np.full_like(agreed_NK, NEVER)  # the protocol has looked at what was said of stopping
    agreed_N = rule.consensus_counter(np.array([node.mixing.passes(rule)]), np.array([stopping.consensus_counter]), agreed_NK)
    own = NEVER if stopping.stop_round is None else stopping.stop_round
    stop = int(rule.stop_round(number, agreed_N, np.array([own]), stops_NK)[0])
    stopping.agree(number, int(agreed_N[0]), None if stop == NEVER else stop)


def stop_reason(node: Node) -> str:
    """Say why the rounds before a node's were the last: "converged", "rounds" or "paused"."""
    stop_round, number = node.protocol.stopping.stop_round, node.place.round
    if stop_round is None or number <= stop_round:
        return "paused" if number < node.plan.experiment.last_possible_round else "rounds"
    if number > stop_round + 1:
        node.log.event(EventKind.STOPPED_LATE, f"the network stopped after round {stop_round}, this node after {number - 1}")
    if node.mixing.own_test_holds:
        return "converged"
    detail = f"{node.me}: the network stopped after round {stop_round}, and its own test did not pass in its last round"
    node.log.event(EventKind.HURRIED, detail)
    return "rounds"
