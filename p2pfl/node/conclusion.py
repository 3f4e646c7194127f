"""The end of a node's run: settle what is open with the neighbours, write the result, and hear the end of the others."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from p2pfl.evaluation.conclusion import conclude, note_late_departures
from p2pfl.evaluation.cross_site import at_one_site
from p2pfl.evaluation.summary import FinalModels, Outcome
from p2pfl.node.checkpoint import keep
from p2pfl.node.node import Node
from p2pfl.runs.events import Departure, EventKind, event_row
from p2pfl.runs.records import read_run
from p2pfl.transports import RELAYED, RELAYING, LinkCondition

LAST_WORDS_S = 5.0
"""How long a node that has nothing open stays for what others have still to say or to read."""
_LAST_EXCHANGES = 2
"""A neighbour that waits has so many times as long as anybody has for an exchange: whom it waits for may wait himself."""
_SPANS = 5
"""Most spans of rounds without any neighbour that are named."""


async def close(node: Node, reason: str) -> None:
    """Settle with the neighbours, for a while, then write how it went; nothing is written where this node's state went back."""
    protocol, clock, linger_s = node.protocol, node.clock, node.timeouts.linger_s
    protocol.stop(reason, node.exchange)
    await keep(node)
    node.rounds.tell_last()
    stopped_s, waited_s = clock.now_s(), linger_s
    while _is_waiting(node, stopped_s) and not clock.is_stopping:
        waited_s = max(waited_s, math.floor(clock.now_s() - stopped_s))
        unsaid = {name: neighbour.ledger.report() for name, neighbour in protocol.neighbours.items()}
        await keep(node)
        for name, neighbour in protocol.neighbours.items():
            if neighbour.ledger.report() != unsaid[name]:
                neighbour.queue(protocol.stopping.where_it_is(neighbour))
        node.sending.wake()
        lingers_until_s = stopped_s + linger_s
        await clock.wait(lingers_until_s if clock.now_s() < lingers_until_s else math.inf)
    if protocol.states.own:
        return  # somebody has to decide first
    node.mixing.compensate(node.place.round)
    await keep(node)
    if unacknowledged := protocol.unacknowledged():
        waited = f"for which it waited {waited_s:g} s"
        node.log.event(EventKind.UNACKNOWLEDGED, f"ended without the last word of {', '.join(unacknowledged)}, {waited}")
    if alone := await asyncio.to_thread(_rounds_alone, node):
        spans = ", ".join(f"{first} to {last}" for first, last in alone[:_SPANS]) + (", and others" if len(alone) > _SPANS else "")
        node.log.event(EventKind.ROUNDS_ALONE, f"rounds {spans} were made without any neighbour")
    outcome = await asyncio.to_thread(write_result, node, reason)
    node.move(finished=True)
    await keep(node)
    # until everybody's last record is here and passed on, for a moment: a member that has gone for good will not send one
    deadline_s = clock.now_s() + min(linger_s, LAST_WORDS_S)
    while protocol.is_spreading() and clock.now_s() < deadline_s and not clock.is_stopping:
        await clock.wait(deadline_s)
    _note_others(node, outcome)


def _is_waiting(node: Node, since_s: float) -> bool:
    """Whether a node that has stopped still waits for a neighbour to settle.

    One that is there may be in its last exchange, and wait in it for somebody who is slow: it has as long as that can take.
    """
    protocol, now_s = node.protocol, node.clock.now_s()
    unacknowledged = protocol.unacknowledged()
    if now_s < since_s + node.timeouts.linger_s:
        return bool(unacknowledged)
    is_there = [node.transport.link(name).state == LinkCondition.UP and not protocol.neighbours[name].missed for name in unacknowledged]
    return any(is_there) and now_s < _last_exchange_ends_s(node, since_s)


def _last_exchange_ends_s(node: Node, since_s: float) -> float:
    """Until when others that are there can be in their last exchange, where this node has left it at some time."""
    return since_s + max(node.timeouts.linger_s, _LAST_EXCHANGES * node.protocol.deadlines.allowance_s())


async def part(node: Node) -> None:
    """Keep the links for a moment after the last word: a connection that ends takes with it what the other end has not read.

    Neighbours with which nothing is open are about to end as well, and say so.
    """
    clock = node.clock
    deadline_s = clock.now_s() + min(node.timeouts.linger_s, LAST_WORDS_S)
    while _awaits_last_words(node) and clock.now_s() < deadline_s and not clock.is_stopping:
        await clock.wait(deadline_s)


def _awaits_last_words(node: Node) -> bool:
    """Whether a neighbour that is there, and has nothing open with a node, has not said its last word."""
    protocol = node.protocol
    if not protocol.pace.balances:
        return False  # others may have many rounds to go
    open_with = protocol.unacknowledged()
    present = [name for name, neighbour in protocol.neighbours.items() if neighbour.session.is_open and not neighbour.left]
    return any(name not in open_with and node.transport.link(name).state == LinkCondition.UP for name in present)


async def relay_on(node: Node) -> None:
    """Stay for others' links that this node relays: their ends have their last rounds or words still to say.

    A link that has just ended may be on its way back.
    """
    clock, transport = node.clock, node.transport
    relayed_s = began_s = clock.now_s()
    until_s = _last_exchange_ends_s(node, began_s) if transport.counters[RELAYED] else began_s
    while clock.now_s() < min(until_s, relayed_s + LAST_WORDS_S) and not clock.is_stopping:
        if transport.counters[RELAYING]:
            relayed_s = clock.now_s()
        await clock.wait(relayed_s + LAST_WORDS_S)


def outcome_of(node: Node, reason: str) -> str:
    """Name the end of a node, where the network stopped for a reason."""
    return "diverged" if node.population.all_diverged else reason


def write_result(node: Node, reason: str) -> Outcome:
    """Write models, figures and summary of a node, where the network stopped for a reason."""
    population = node.population
    return _conclude(
        node,
        outcome_of(node, reason),
        metrics={node.me: population.evaluate()[0]},
        models=FinalModels(names=[node.me], x_NP=population.estimate(), buffers=population.buffers, population=population),
        book=lambda _: node.seconds.total(),
        has_agreed=node.protocol.edges.closing == "converged",
        started_without=node.agreed.missing,
        cross_site=at_one_site(node.plan, population, node.me, node.mixing.release_last_heard(), node.log.event),
        more=_accepted_rows(node),
    )


def write_without_result(node: Node, reason: str) -> None:
    """Write the summary of a run that somebody has to decide on: the models here are not its result."""
    _conclude(node, reason, more=_accepted_rows(node))


def write_without_start(node: Node, why: str) -> None:
    """Write the summary of a start without enough members; a later start waits anew."""
    node.log.folder.append_event(event_row(EventKind.NOT_STARTED, 0, node.me, why))  # whoever catches it logs it
    _conclude(node, "members_missing", departures=[Departure(kind="members_missing", detail=f"{node.me}: {why}")])


def note_differences(node: Node) -> None:
    """Put on record what a site has accepted, once."""
    noted = _noted_differences(node)
    for detail in node.accepted_differences:
        if detail not in noted:
            node.log.event(EventKind.DIFFERENCE_ACCEPTED, detail)


def _conclude(node: Node, reason: str, **known: Any) -> Outcome:
    """Write what is known at the end; by default the models here are no result."""
    node.log.say_rest()
    without_result: dict[str, Any] = {"metrics": {node.me: {}}, "models": None, "book": lambda _: node.seconds.spent}
    outcome = Outcome(
        scope="node",
        engine="daemons",
        rounds=node.place.round,
        stop_reason=reason,
        bytes_sent=node.sending.bytes_sent,
        row_by_row=node.population.row_by_row,
        **{**without_result, **known},
    )
    conclude(node.plan, node.log.folder, outcome)
    return outcome


def _note_others(node: Node, outcome: Outcome) -> None:
    """Record members that have not ended with the others, and add them to the summary."""
    view, rounds = node.view, node.place.round
    if view is None:
        return
    view.take_note(node.log.folder)
    company = node.agreed.company or list(node.plan.names)
    if unended := view.unended(rounds, company, node.protocol.edges.ahead):
        sees_most = view.sees_most_end(company)
        for name, number in unended.items():
            last = "no round of it was heard of" if number is None else f"last heard of in round {number} of {rounds}"
            if sees_most:
                node.log.event(EventKind.GONE, f"{name}: {last}")
            else:  # the others may have ended while this node was away
                node.log.event(EventKind.END_UNKNOWN, f"how {name} ended is not known here: {last}")
        node.log.say_rest()
        note_late_departures(node.plan, node.log.folder, outcome)


def _rounds_alone(node: Node) -> list[tuple[int, int]]:
    """First and last of training rounds in a row in which no neighbour came, of those that had started; where everybody waits for all.

    One round by itself is no such span: messages are late now and then, and some nodes have one neighbour only.
    """
    company = node.agreed.company
    if not node.protocol.pace.in_step or not node.plan.schedule.is_steady:
        return []
    expected = {name for name in node.protocol.neighbours if company is None or name in company}
    rows = read_run(node.log.folder.path, experiment=node.plan.experiment.as_dict()).nodes if expected else []
    spans: list[tuple[int, int]] = []
    for number in sorted({row["round"] for row in rows if row["kind"] == "train" and expected <= set(row["skipped"])}):
        if spans and number == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return [(first, last) for first, last in spans if first < last]


def _noted_differences(node: Node) -> list[str]:
    return [str(event["detail"]) for event in node.log.folder.events() if event["event"] == EventKind.DIFFERENCE_ACCEPTED]


def _accepted_rows(node: Node) -> dict[str, Any]:
    """The summary's part on differences from the result contract, of all starts."""
    split = (text.partition(": ") for text in dict.fromkeys([*_noted_differences(node), *node.accepted_differences]))
    rows = [{"node": node.me, "kind": kind, "detail": detail} for kind, _, detail in split]
    return {"accepted_differences": rows} if rows else {}
