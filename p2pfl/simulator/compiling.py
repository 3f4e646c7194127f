"""The choice of compiled loops where an experiment leaves it open: loading them takes a second."""

from __future__ import annotations

from p2pfl.experiment.plan import Plan

_WORTH = 10**9  # numbers
_LARGE = 2000  # parameters


def mixing_is_worth_it(plan: Plan) -> bool:
    """Whether compiled mixing is faster, by the numbers that pass over edges in all rounds; it gives the same bits as torch."""
    return (
        plan.experiment.compiled != "off" and len(plan.topology.senders) * plan.layout.size * plan.experiment.last_possible_round >= _WORTH
    )


def training_is_worth_it(plan: Plan) -> bool:
    """Whether compiled training is faster, by the parameters of all steps of a run that an earlier version began."""
    if plan.experiment.schema != 1 or plan.experiment.compiled != "auto":
        return False
    num_steps = len(plan.names) * plan.recipe.local_steps * plan.experiment.rounds
    return plan.layout.size >= _LARGE and num_steps * plan.layout.size >= _WORTH
