"""When compiled loops are worth the second that loading them takes; below that a run is over sooner without."""

from __future__ import annotations

from p2pfl.plan import Plan

_WORTH = 10**9  # numbers
_LARGE = 2000  # parameters; smaller models are trained as fast by torch, thousands of them at once


def mixing_is_worth_it(plan: Plan) -> bool:
    """By the numbers that pass over edges in all rounds."""
    return len(plan.topology.senders) * plan.layout.size * plan.experiment.last_possible_round >= _WORTH


def training_is_worth_it(plan: Plan) -> bool:
    """By the parameters that are moved in all nodes' steps."""
    num_steps = len(plan.names) * plan.recipe.local_steps * plan.experiment.rounds
    return plan.layout.size >= _LARGE and num_steps * plan.layout.size >= _WORTH
