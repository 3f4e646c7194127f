"""One node's edges, as its plan and its timeouts ask for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from p2pfl.experiment.plan import Plan
from p2pfl.node.clock import Timeouts
from p2pfl.protocol.agreed_start import AgreedStart
from p2pfl.protocol.allowance import NeighbourAllowance
from p2pfl.protocol.deadlines import WINDOW, Deadlines, RoundDurations
from p2pfl.protocol.edges import Edges, OnEvent
from p2pfl.protocol.neighbour import Neighbour, Others
from p2pfl.protocol.network_view import NetworkViewAdapter
from p2pfl.protocol.probes import Probes
from p2pfl.protocol.protocol import Protocol
from p2pfl.topology import steps_from
from p2pfl.topology.schedule import neighbourhoods_of
from p2pfl.wire.link import LinkSession, Terms
from p2pfl.wire.update import MakeRoom, UpdateFormat, largest_update_bytes

AHEAD = 8
"""Exchanges that are kept where the graph is directed or changes: a node may be as far ahead of one that it does not wait for as news need
from that one to it."""


def exchanges_ahead(plan: Plan) -> int:
    """Count the exchanges that a neighbour may be ahead and is heard."""
    if not plan.experiment.pace.kind.in_step:
        return plan.experiment.last_possible_round
    return 1 if plan.schedule.is_steady else AHEAD


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
    make_room: MakeRoom,
    make_early_room: MakeRoom,
    on_event: OnEvent,
    probes: Probes | None = None,
) -> Protocol:
    """Make a node's side of all its edges; *start_anew*: it begins without the state that it had."""
    algorithm, pace = plan.recipe.algorithm, plan.experiment.pace
    in_step = pace.kind.in_step
    ahead = exchanges_ahead(plan)
    session_with = partial(
        LinkSession,
        member=me,
        terms=terms,
        incarnation=incarnation,
        formats=formats,
        ahead=ahead,
        make_room=make_room,
        make_early_room=make_early_room if in_step else None,  # else every number is above the one that was merged last
    )
    neighbours = {
        name: Neighbour(
            name=name, session=session_with(peer=name), allowance=NeighbourAllowance(update_bytes=largest_update_bytes(formats))
        )
        for name in plan.neighbours(me)
    }
    edges = Edges(
        me=me,
        neighbours=neighbours,
        neighbourhoods=neighbourhoods_of(plan.schedule, plan.names.index(me), splits_mass=algorithm.splits_mass, in_step=in_step),
        on_event=on_event,
        phases=algorithm.phases,
        ahead=ahead,
        anew=int(1000 * time.time()) if start_anew else 0,
    )
    deadlines = Deadlines(
        edges,
        RoundDurations(factor=timeouts.deadline_factor, floor_s=timeouts.deadline_floor_s, window=WINDOW),
        starting_exchanges=algorithm.phases * (start.way + 1),
        **({} if view is None else {"waits_for_others": view.waits_for_others, "was_held_up": view.was_held_up}),
    )
    others = Others(
        neighbours,
        num_others=len(plan.names) - 1,
        places={name: plan.names.index(name) for name in neighbours},
        steps_to=dict(enumerate(steps_from(plan.topology, plan.names.index(me)).tolist())) if in_step else {},
        view=view.view if view is not None else None,
        prove=view.proof if view is not None else lambda: None,
    )
    return Protocol(
        edges,
        deadlines,
        pace=pace.name,
        max_age=pace.max_age,
        others=others,
        num_exchanges=plan.experiment.last_possible_round * algorithm.phases,
        stop_rule=plan.stop_rule if in_step else None,
        earliest_stop=plan.stop_rule.earliest(plan.experiment.rounds) if plan.stop_rule else None,
        push_sum=view.push_sum if view is not None else None,
        start=start.agreement,
        probes=probes,
    )
