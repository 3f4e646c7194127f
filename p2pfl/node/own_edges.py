"""One node's edges, as its plan and its timeouts ask for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from p2pfl.experiment.plan import Plan
from p2pfl.node.timeouts import Timeouts
from p2pfl.protocol.agreed_start import AgreedStart
from p2pfl.protocol.allowance import NeighbourAllowance
from p2pfl.protocol.asynchronous import Asynchronous
from p2pfl.protocol.neighbour import Neighbour
from p2pfl.protocol.network_view import NetworkViewAdapter
from p2pfl.protocol.protocol import OnEvent, Protocol
from p2pfl.protocol.round_pace import WINDOW, RoundPace
from p2pfl.topology import steps_from
from p2pfl.topology.links import links_of
from p2pfl.wire.link import LinkSession, Terms
from p2pfl.wire.update import UpdateFormat

AHEAD = 8
"""Exchanges that are kept where the graph is directed or changes: a node may be as far ahead of one that it does not wait for as news need
from that one to it."""


def own_edges(
    plan: Plan,
    me: str,
    terms: Terms,
    incarnation: int,
    formats: Sequence[UpdateFormat],
    timeouts: Timeouts,
    start: AgreedStart,
    view: NetworkViewAdapter | None,
    *,
    start_anew: bool,
    on_event: OnEvent,
) -> Protocol:
    """Make a node's side of all its edges; *start_anew*: it begins without the state that it had."""
    algorithm, pace = plan.recipe.algorithm, plan.experiment.pace
    in_step = pace.name == "synchronous"
    ahead = 1 if plan.schedule.period == 1 and not plan.schedule.directed else AHEAD
    if not in_step:
        ahead = plan.experiment.last_possible_round
    session_with = partial(LinkSession, member=me, terms=terms, incarnation=incarnation, formats=formats, ahead=ahead)
    update_bytes = max((whole or travels).size_bytes for travels in formats for whole in (None, travels.whole))
    neighbours = {
        name: Neighbour(name=name, session=session_with(peer=name), allowance=NeighbourAllowance(update_bytes=update_bytes))
        for name in plan.neighbours(me)
    }
    of_the_network: dict[str, Any] = {}
    if view is not None:
        of_the_network = {"view": view.view, "push_sum": view.push_sum, "prove": view.proof, "waits_for_others": view.waits_for_others}
    return Protocol(
        me=me,
        neighbours=neighbours,
        links=links_of(plan.schedule, plan.names.index(me), splits_mass=algorithm.splits_mass, in_step=in_step),
        newest=Asynchronous(max_age=pace.max_age) if pace.name == "asynchronous" else None,
        meetings=deque() if pace.name == "pairwise" else None,
        phases=algorithm.phases,
        ahead=ahead,
        num_exchanges=plan.experiment.last_possible_round * algorithm.phases,
        anew=int(1000 * time.time()) if start_anew else 0,
        pace=RoundPace(factor=timeouts.deadline_factor, floor_s=timeouts.deadline_floor_s, window=WINDOW),
        on_event=on_event,
        train_exchanges=plan.experiment.rounds * algorithm.phases,
        earliest_stop=plan.stop_rule.earliest(plan.experiment.rounds) if plan.stop_rule else None,
        start=start.agreement,
        starting_exchanges=algorithm.phases * (start.way + 1),
        num_others=len(plan.names) - 1,
        places={name: plan.names.index(name) for name in neighbours},
        steps_to=dict(enumerate(steps_from(plan.topology, plan.names.index(me)).tolist())) if in_step else {},
        stop_rule=plan.stop_rule if in_step else None,
        **of_the_network,
    )
