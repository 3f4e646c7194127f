"""When compiled loops are worth the second that loading them takes, where an experiment does not say whether to take them."""

from __future__ import annotations

from p2pfl.experiment.plan import Plan

_WORTH = 10**9  # numbers
_LARGE = 2000  # parameters


def mixing_is_worth_it(plan: Plan) -> bool:
    """By the numbers that pass over edges in all rounds; the loops that mix give the same bits as torch."""
    return (
        plan.experiment.compiled != "off" and len(plan.topology.senders) * plan.layout.size * plan.experiment.last_possible_round >= _WORTH
    )


def training_is_worth_it(plan: Plan) -> bool:
    """By the parameters that are moved in all nodes' steps: of runs that earlier versions began, which decided so."""
    if plan.experiment.schema != 1 or plan.experiment.compiled != "auto":
        return False
    num_steps = len(plan.names) * plan.recipe.local_steps * plan.experiment.rounds
    return plan.layout.size >= _LARGE and num_steps * plan.layout.size >= _WORTH
