"""Steps of a round that every pace shares: training, evaluation, the row and the checkpoint."""

from __future__ import annotations

from typing import Any

from p2pfl.evaluation.results import write_models
from p2pfl.node.checkpoint import keep
from p2pfl.node.mixing import RoundStatistics
from p2pfl.node.node import Node
from p2pfl.runs.events import EventKind
from p2pfl.runs.rows import NodeRow, kind_of_round
from p2pfl.training.freed_memory import return_freed_memory

TRIM_FROM_BYTES = 8 * 2**20
"""Size of a model from which on freed memory is given back after training; it takes less than a millisecond."""

_DIGITS = 6  # of a second: more say nothing


async def train(node: Node, local_steps: int) -> None:
    """Take the local steps of a node's round, if there are any."""
    population, clock = node.population, node.clock
    began_s, number = clock.now_s(), node.place.round
    if not local_steps or not population.trains:
        node.move(loss=None)
        if not population.trains:  # rehearsals of pure averaging, too, take their time
            await _rest(node, began_s)
        return
    loss = float((await node.work.do("train", population.train, number))[0])
    if node.plan.layout.size_bytes >= TRIM_FROM_BYTES:
        return_freed_memory()  # of gradients, before anything else comes in
    await _rest(node, began_s)
    node.spend("train", began_s)
    if population.diverged:
        detail = f"round {number}: training became non-finite and was rolled back; lower optimizer.lr or set clip_norm"
        node.log.event(EventKind.DIVERGED, detail)
    if population.without_loss:
        node.log.event(EventKind.NO_LOSS, f"round {number}")
    node.move(loss=loss)


async def _rest(node: Node, began_s: float) -> None:
    """Wait until a round has taken as long as the site asks for."""
    clock = node.clock
    while clock.now_s() < (until_s := began_s + node.timeouts.round_at_least_s) and not clock.is_stopping:
        await clock.wait(until_s)


async def end_round(node: Node, seen: RoundStatistics, merged: list[Any] | None) -> None:
    """Evaluate and record the round before a node's place, and write a checkpoint; *merged* has updates that nodes out of step took in."""
    number, stopping = node.place.round - 1, node.protocol.stopping
    metrics = await _evaluate(node, number)
    node.rounds.record(
        NodeRow(
            round=number,
            node=node.me,
            kind=kind_of_round(number, node.plan.experiment.rounds),
            loss=node.place.loss,
            disagreement=None if seen.squared is None else seen.squared / 2,
            norm=seen.norm,
            skipped=sorted(seen.skipped),
            agreed_for=stopping.consensus_counter,
            stop_round=stopping.stop_round,
            bytes_sent=node.sending.take_bytes(),
            seconds=node.seconds.end_round(),
            merged=merged,
            metrics=metrics,
            sending_s=node.sending.take_seconds(),
            lateness={name: round(late, _DIGITS) for name, late in seen.lateness.items()} if seen.lateness else None,
        )
    )
    node.sending.wake()
    await keep(node)


async def _evaluate(node: Node, number: int) -> dict[str, float] | None:
    experiment, population, metrics = node.plan.experiment, node.population, None
    began_s = node.clock.now_s()
    is_last = number + 1 >= experiment.last_possible_round or node.protocol.stopping.stop_round == number
    if (number + 1) % experiment.evaluate_every == 0 or is_last:
        metrics = (await node.work.do("evaluate", population.evaluate))[0]
    if experiment.save_models_every and (number + 1) % experiment.save_models_every == 0:
        names, x_NP = (node.me,), population.estimate()
        await node.log.write(write_models, node.log.folder.path, names, x_NP, node.plan.layout, population.buffers, number)
    node.spend("evaluate", began_s)
    return metrics
