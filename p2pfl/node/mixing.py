"""A row's tensors as updates for its neighbours, and the neighbours' updates as a merge.

Shapes: one row, K neighbour slots, P parameters.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from p2pfl.algorithms import Algorithm, Inbox, over_an_edge
from p2pfl.algorithms.guard import DistanceWatch, norm_of
from p2pfl.algorithms.stopping import StopRule
from p2pfl.errors import BadMessage
from p2pfl.evaluation.cross_site import measures_neighbours
from p2pfl.experiment.plan import Plan
from p2pfl.node.clock import LoopClock
from p2pfl.node.spill import UpdateRoom
from p2pfl.node.workplace import Workplace
from p2pfl.params import tensor_over
from p2pfl.protocol.edges import Compensation, DueMerge, Flow
from p2pfl.protocol.protocol import Protocol
from p2pfl.runs.events import EventKind
from p2pfl.training import Population
from p2pfl.wire.messages import NOTHING_SAID
from p2pfl.wire.update import Arrays, EncodedUpdate, FullUpdate, ReceivedUpdate, UpdateFormat, next_state_digest

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class RoundStatistics:
    """Distances and absences that the exchanges of one round have shown so far."""

    squared: float | None = None
    """sum_j ||x_i - x_j||**2 over the neighbours that came, of the model's channel; None where no models were compared."""

    met: float = 0.0
    """Squared distance that the stop rule tests: `squared`, or where the graph changes a bound from the last rounds."""

    norm: float | None = None
    """||x_i||; None where no model was sent."""

    skipped: set[str] = field(default_factory=set)

    lateness: dict[str, float] | None = None
    """Seconds by which the updates of neighbours came later than the own one was sent, of all exchanges so far; None: not all are known."""

    def note_lateness(self, phase: int, found: Mapping[str, float]) -> None:
        """Add the lateness of an exchange; a neighbour counts that has come to all of them."""
        if phase == 0:
            self.lateness = dict(found)
        elif self.lateness is not None:
            self.lateness = {name: late + found[name] for name, late in self.lateness.items() if name in found}


def update_formats(algorithm: Algorithm, population: Population) -> list[UpdateFormat]:
    """Formats of the updates by phase; the population is at its start."""
    channels = algorithm.channels
    sent = [population.outgoing(0, phase, local_steps=0) for phase in range(algorithm.phases)]
    return [UpdateFormat.of(over_an_edge(channels, each), over_an_edge(channels, each, whole=True)) for each in sent]


class Mixing:
    """Exchanges of one row with its neighbours, in tensors, at the exchange of its edges; each merge changes its population."""

    def __init__(
        self,
        plan: Plan,
        population: Population,
        protocol: Protocol,
        formats: Sequence[UpdateFormat],
        clock: LoopClock,
        work: Workplace,
        room: UpdateRoom,
    ) -> None:
        self._plan, self._population, self._protocol, self._formats, self._clock = plan, population, protocol, formats, clock
        self._work, self._room = work, room
        self._algorithm = algorithm = plan.recipe.algorithm
        self._encoded = {channel.encodes for channel in algorithm.channels.values() if channel.encodes is not None}
        self.model_channel = algorithm.model_channel
        self.statistics = RoundStatistics()
        """Distances and absences of the round that the row is in."""
        self.own_test_holds = True
        """Whether the models of the neighbours that came to the last round were as close as the stop rule asks."""
        self.merged: list[list[Any]] | None = None
        """Neighbour, exchange and age of each update of the last merge, where nodes do not go in step."""
        self._last_heard: dict[str, Tensor] = {}
        """The neighbours' models of the last round."""
        self._taken_in: dict[str, int] = {}
        """By neighbour, the last exchange that was merged since this process began."""
        self._distances = {name: DistanceWatch() for name in protocol.neighbours}
        self._bound = plan.time_varying_bound([protocol.edges.me])
        self._sent_P: Tensor | None = None  # the model of the last round, where the graph changes
        self._is_exact = True
        """Whether every message came; where not, and the algorithm needs them all, that has been said."""

    def begin_round(self) -> None:
        """Forget the statistics of the last round."""
        self.statistics = RoundStatistics()

    def interrupt(self) -> None:
        """Compare nothing across a gap in the rounds, of whose models nothing is known."""
        self.own_test_holds = False
        if self._bound is not None:
            self._bound.forget()
        for watch in self._distances.values():
            watch.interrupt()

    def release_last_heard(self) -> dict[str, Tensor]:
        """Return the neighbours' models of the last round, and keep them no longer."""
        heard, self._last_heard = self._last_heard, {}
        return heard

    # ---- out

    def pack(self, outgoing: Mapping[str, Tensor], phase: int) -> tuple[dict[str, EncodedUpdate], dict[str, FullUpdate], bytes | None]:
        """Encode a phase's tensors.

        Returns:
            Updates by receiver; where they continue what was sent before, also full updates and the state digest of what both lead to.
        """
        exchange, update_format = self._protocol.edges.exchange, self._formats[phase]
        full_format = update_format.full
        updates = self._to_receivers(outgoing, lambda arrays: update_format.pack(exchange, arrays))
        if full_format is None:
            return updates, {}, None
        after, different = self._protocol.values.own.get(phase, NOTHING_SAID), {id(encoded): encoded for encoded in updates.values()}
        digest = next_state_digest(after, different.values())
        marked = {key: replace(encoded, state_digests=(after, digest)) for key, encoded in different.items()}
        full = self._to_receivers(outgoing, lambda arrays: FullUpdate(full_format, exchange, arrays, digest), whole=True)
        return {to: marked[id(encoded)] for to, encoded in updates.items()}, full, digest

    def _to_receivers(self, outgoing: Mapping[str, Tensor], make: Callable[[Arrays], T], *, whole: bool = False) -> dict[str, T]:
        """Make something of each receiver's arrays; one thing for all of them where no channel is per edge."""
        channels, receivers = self._algorithm.channels, self._protocol.edges.neighbourhood.receivers

        def made(slot: int) -> T:
            return make({name: array_of(m) for name, m in over_an_edge(channels, outgoing, whole=whole, slot=slot).items()})

        if any(channels[name].per_edge for name in outgoing):
            return {to: made(k) for k, to in enumerate(self._protocol.neighbours) if to in receivers}
        return dict.fromkeys(sorted(receivers), made(0))

    # ---- in

    async def merge(self, due: DueMerge, outgoing: Mapping[str, Tensor], number: int, phase: int, *, local_steps: int) -> None:
        """Merge what came to this exchange, and add to the round's statistics what it shows."""
        protocol, statistics, came = self._protocol, self.statistics, due.came
        messages = await self._work.do("unpack", self._unpack, due, outgoing, number, phase, local_steps)
        taken = {name: message for name, message in messages.items() if not isinstance(message, BadMessage)}
        is_last = number in (protocol.stopping.stop_round, self._plan.experiment.last_possible_round - 1)
        if self.model_channel is not None and is_last and measures_neighbours(self._plan, self._population):
            heard = {name: m[self.model_channel] for name, m in taken.items() if self.model_channel in m}
            self._last_heard = await asyncio.to_thread(self._room.copy, heard)  # flows take the places of what came
        inbox = self._inbox(due, outgoing, {name: message for name, message in taken.items() if name in due.admitted})
        before, ctx = self._population.state, self._population.context(number, local_steps=local_steps)
        merged = await self._work.do("merge", self._algorithm.merge, before, phase, inbox, ctx)
        for name, received in came.items():
            message = messages[name]
            values = message if isinstance(message, BadMessage) else {of: message[of] for of in self._encoded & message.keys()}
            protocol.hold(name, received, values)
        if not protocol.pace.balances:
            self.merged = [[name, held.number, held.age] for name, held in due.admitted.items() if name in taken]
        flows = self._flows(inbox)
        if self.model_channel is not None and self.model_channel in outgoing:
            squared, sent_P = float(inbox.squared_distances(self.model_channel)[0]), outgoing[self.model_channel][0]
            statistics.squared = squared if inbox.present_NK.any() else None
            statistics.norm = float(torch.linalg.vector_norm(sent_P).double())
            statistics.met = self._tested(squared, sent_P)
        if all(is_finite(tensor) for tensor in merged.values()):
            self._population.replace_state(merged, number)
            protocol.values.advance()
            self._look_at_distances(inbox, outgoing, came)
            self._taken_in |= {name: came[name].exchange for name in flows}
            for notice in self._algorithm.notices(before, merged) if self._algorithm.has_notices else []:
                log.warning("round %d: %s", number, notice.detail)
                protocol.edges.on_event(notice.event, f"round {number}: {notice.detail}")
        else:
            protocol.edges.on_event(EventKind.OVERFLOW, f"round {number}: the sum of what came is not finite; nothing of it was taken in")
            flows = {}
            protocol.edges.put_back(due.compensations)
        statistics.skipped.update(protocol.close(flows, self._clock.now_s()))
        if self._is_exact and statistics.skipped and "reliable" in self._algorithm.requires:
            self._is_exact = False
            rule = f"algorithm {self._plan.experiment.algorithm.name} is exact where every message comes, and is not from here on"
            protocol.edges.on_event(EventKind.INEXACT, f"round {number}: without {', '.join(sorted(statistics.skipped))}; {rule}")

    def compensate(self, number: int) -> None:
        """Roll back what no neighbour has matched, without merging anything new; values that neighbours hold as well stay."""
        protocol, dtype = self._protocol, self._plan.layout.dtype
        num_slots = len(protocol.neighbours)
        if not protocol.edges.compensations:
            return
        held = {name: values for name, values in self._population.state.items() if name in self._encoded}
        for phase in range(self._algorithm.phases):
            sent = self._population.outgoing(number, phase, local_steps=0)
            compensation = _negated(protocol.edges.take_compensations(sent.keys()))
            inbox = self._plan.recipe.inboxes.without_messages(sent, num_slots, dtype, compensation)
            self._population.merge(number, phase, inbox, local_steps=0)
        self._population.replace_state({**self._population.state, **held})

    def _unpack(
        self, due: DueMerge, outgoing: Mapping[str, Tensor], number: int, phase: int, local_steps: int
    ) -> dict[str, dict[str, Tensor] | BadMessage]:
        """Messages as the algorithm sees them, by sender: values in place of what encodes them; or why one is refused."""
        channels, ctx = self._algorithm.channels, self._population.context(number, local_steps=local_steps)
        values = over_an_edge(channels, outgoing, whole=True)
        messages: dict[str, dict[str, Tensor] | BadMessage] = {}
        if not due.came:
            return messages
        guard, state, slots = self._plan.guard, self._population.state, list(self._protocol.neighbours)
        diverged = local_steps > 0 and bool(self._population.diverged)
        for name, received in due.came.items():
            message = {channel: tensor_over(array) for channel, array in received.arrays.items()}
            for of in (self._encoded & values.keys()) - message.keys():
                parts = {channel: message.pop(channel)[None] for channel in list(message) if channels[channel].encodes == of}
                before = due.values[name].get(of, torch.zeros_like(values[of]))
                message[of] = self._algorithm.decode(of, before[None], parts, ctx)[0]
            if not all(is_finite(message[of]) for of in self._encoded & message.keys()):
                messages[name] = BadMessage("an update that leads to NaN or an infinity", reason="not_finite")
                continue
            num_exchanges = max(1, received.exchange - self._taken_in.get(name, -1))
            norm = guard.norm(state, phase, message, ctx, slot=slots.index(name), num_exchanges=num_exchanges, norms=received.norms)
            messages[name] = guard.refusal(norm, state, phase, outgoing, ctx, diverged=diverged) or message
        return messages

    def _inbox(self, due: DueMerge, outgoing: Mapping[str, Tensor], messages: Mapping[str, Mapping[str, Tensor]]) -> Inbox:
        """Messages of this exchange with their weights, in the roster's order."""
        protocol, mixing_row = self._protocol, due.neighbourhood
        ages = {name: due.admitted[name].age for name in messages}
        return self._plan.recipe.inboxes.for_node(
            outgoing,
            list(protocol.neighbours),
            messages,
            mixing_row.weights if protocol.pace.balances else self._plan.weights_by_age(mixing_row.weights, ages),
            self_weight=mixing_row.self_weight,
            dtype=self._plan.layout.dtype,
            compensation=_negated(due.compensations),
            flows={},
            # what came is this exchange's alone, but for the newest updates, which are merged again
            writes_over=self._algorithm.reads_once and protocol.pace.balances,
        )

    def _flows(self, inbox: Inbox) -> dict[str, Flow]:
        """Flows of a merge, by neighbour."""
        assert inbox.flows is not None
        present = [(k, name) for k, name in enumerate(self._protocol.neighbours) if inbox.present_NK[0, k]]
        return {name: Flow(exchange=self._protocol.edges.exchange, amounts=inbox.flows.get((0, k), {})) for k, name in present}

    def _look_at_distances(self, inbox: Inbox, outgoing: Mapping[str, Tensor], came: Mapping[str, ReceivedUpdate]) -> None:
        """Report models that are suddenly far away, where models can be compared one by one."""
        channel = self.model_channel or next(iter(self._encoded), None)
        if channel is None or channel not in outgoing:
            return
        distances, own_norm = inbox.distances(channel), self.statistics.norm if channel == self.model_channel else None
        for slot, (name, neighbour) in enumerate(self._protocol.neighbours.items()):
            watch = self._distances[name]
            if slot in distances:
                if self._taken_in.get(name) == came[name].exchange:
                    continue  # the newest one, merged again
                own_norm = norm_of(outgoing[channel]) if own_norm is None else own_norm
                report = watch.look(distances[slot], own_norm, neighbour.handshakes)
                if report is not None:
                    self._protocol.edges.on_event(EventKind.FAR_UPDATE, f"{name}: {report}", name)
            elif name in self._protocol.edges.neighbourhood.weights and name not in came:
                watch.interrupt()

    def _tested(self, squared: float, sent_P: Tensor) -> float:
        """Squared distance for the stop rule."""
        if self._bound is None:
            return squared
        moved = float(torch.linalg.vector_norm(sent_P - self._sent_P).double()) if self._sent_P is not None else 0.0
        self._sent_P = sent_P.clone()
        return float(self._bound.bound(np.array([squared]), np.array([moved]))[0])

    def passes(self, rule: StopRule) -> bool:
        """Tell whether the round that the row is in counts towards the agreement to stop."""
        seen = self.statistics
        passed_N = rule.passes(np.array([seen.met]), np.array([(seen.norm or 0.0) ** 2]))
        if seen.squared is not None and math.isfinite(seen.met):  # it is not known yet where nobody came or the graph changes
            self.own_test_holds = bool(passed_N[0])
        return bool(passed_N[0]) and not seen.skipped

    # ---- checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        return {} if self._sent_P is None else {"last_sent": self._sent_P}

    def metadata(self) -> dict[str, Any]:
        """Numbers for a checkpoint."""
        of = self.statistics
        return {
            "meetings": self._bound.metadata() if self._bound else None,
            "seen": {"squared": of.squared, "met": of.met, "norm": of.norm, "skipped": sorted(of.skipped)},
        }

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Take up what `tensors` and `metadata` gave."""
        if self._bound is not None:
            self._bound.restore(metadata["meetings"])
            self._sent_P = tensors.get("last_sent")
        seen = metadata["seen"]
        self.statistics = RoundStatistics(**{**seen, "skipped": set(seen["skipped"])})


def is_finite(tensor: Tensor) -> bool:
    """Tell whether every number is finite; they are not looked at one by one where their sum says so."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _negated(unmatched: list[Compensation]) -> dict[str, Tensor]:
    """Sum of the negatives of some flows, by channel."""
    total: dict[str, Tensor] = {}
    for _, flow in unmatched:
        for channel, amount in flow.amounts.items():
            total[channel] = total[channel] - amount[None] if channel in total else -amount[None]
    return total


def array_of(tensor: Tensor) -> np.ndarray:
    """View of a tensor as an array, without a copy where it lies in one piece on the CPU."""
    return tensor.detach().cpu().contiguous().numpy()
