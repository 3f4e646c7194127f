"""List of all that leaves a site while its node runs: to whom, in which tensors, and how many bytes a round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from p2pfl.experiment.plan import Plan
from p2pfl.governance.card import Card
from p2pfl.node.mixing import update_formats
from p2pfl.protocol.network_view import ViewPolicy
from p2pfl.wire.messages import MAX_RECORD_BYTES
from p2pfl.wire.round_record import MAX_METRICS
from p2pfl.wire.update import DTYPES, UpdateFormat

HELLO_BYTES = 600
"""Size of a Hello with long names and numbers, about."""
HEARTBEAT_BYTES = 1
"""A sign of life is one empty frame; libzmq and CURVE add what they add to every frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One channel of an update, which goes to each neighbour named beside it."""

    phase: int
    channel: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    on_request: bool
    """Whether it goes only to a neighbour that has missed something, in the place of the phase's others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """Something that leaves the site beside the updates."""

    what: str
    to: str
    holds: str
    """Contents in words: names of fields, and where a number of patients is among them."""
    when: str
    most_bytes: int | None
    """The most that it can have; None: it depends on the network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Egress:
    """Everything that leaves one site."""

    member: str
    receivers: tuple[str, ...]
    """Neighbours that get its updates."""
    tensors: tuple[Tensor, ...]
    update_bytes: int
    """One round's updates for one neighbour as they travel, with their headers."""
    stays: tuple[str, ...]
    """Tensors of the model that never leave: frozen, personal, and statistics of layers."""
    messages: tuple[Message, ...]

    @property
    def round_bytes(self) -> int:
        """Bytes of updates in a round, to all receivers together, where nothing has to be sent again."""
        return self.update_bytes * len(self.receivers)

    def as_dict(self) -> dict[str, Any]:
        """The list as JSON holds it."""
        return {**asdict(self), "round_bytes": self.round_bytes}


def egress_of(plan: Plan, card: Card, policy: ViewPolicy, *, heartbeat_s: int) -> Egress:
    """List what leaves the site of a member, whose rows are in the plan."""
    me = plan.names.index(card.name)
    population = plan.population([card.name])
    formats = update_formats(plan.recipe.algorithm, population)
    tensors = [one for phase, each in enumerate(formats) for one in _tensors(phase, each, on_request=False)]
    tensors += [one for phase, each in enumerate(formats) if each.full is not None for one in _tensors(phase, each.full, on_request=True)]
    graph = plan.topology
    receivers = tuple(sorted({plan.names[i] for i in graph.receivers[graph.senders == me]}))
    table = plan.layout.table()
    stays = [f"{row['name']} ({'personal' if row['trains'] else 'frozen'})" for row in table if not row["travels"]]
    stays += [f"{name} (statistics of a layer)" for name in population.buffers]
    return Egress(
        member=card.name,
        receivers=receivers,
        tensors=tuple(tensors),
        update_bytes=sum(one.encoded_bytes(phase) for phase, one in enumerate(formats)),
        stays=tuple(stays),
        messages=tuple(_messages(plan, card, policy, heartbeat_s)),
    )


def _tensors(phase: int, update: UpdateFormat, *, on_request: bool) -> list[Tensor]:
    return [
        Tensor(
            phase=phase,
            channel=name,
            dtype=dtype,
            shape=tuple(shape),
            size_bytes=math.prod(shape) * DTYPES[dtype].itemsize,
            on_request=on_request,
        )
        for name, dtype, shape in update.channels
    ]


def _messages(plan: Plan, card: Card, policy: ViewPolicy, heartbeat_s: int) -> Sequence[Message]:
    counts: Mapping[str, str] = {
        "exact": "how many rows it has",
        "tens": "how many rows it has, rounded down to tens",
        "withheld": "not how many rows it has",
    }
    metrics = ", ".join(sorted(plan.task.metrics)[:MAX_METRICS]) or "none"
    said = f"loss, and metrics on its own test rows ({metrics})" if policy.metrics else "neither losses nor metrics"
    cap = "" if policy.bytes_per_s is None else f", at most {policy.bytes_per_s:,.0f} bytes a second with those of others"
    on_card = [name for name, known in (("training rows", card.samples), ("means and deviations of inputs", card.moments)) if known]
    return [
        Message(
            what="its card, in the study",
            to="everybody who has the study",
            holds=f"name, addresses, public keys{''.join(f', {name}' for name in on_card)}",
            when="before the start",
            most_bytes=len(card.text.encode()),
        ),
        Message(
            what="round record, signed",
            to="all members, passed on by neighbours",
            holds=f"round, distance to neighbours' models, norm, who was skipped, seconds, bytes, a digest of the update; {said}; "
            f"{counts[policy.counts]}",
            when=f"once a round{cap}",
            most_bytes=MAX_RECORD_BYTES,
        ),
        Message(
            what="ready record, signed",
            to="all members, passed on by neighbours",
            holds="which of its links are up, and with whom it has started",
            when="before the start, whenever a link comes or goes",
            most_bytes=None,
        ),
        Message(
            what="handshake",
            to="each neighbour",
            holds="name, digests of study, layout and first parameters, a random number, what was merged of the neighbour's updates",
            when="twice a second until a link is open",
            most_bytes=HELLO_BYTES,
        ),
        Message(
            what="requests and reports",
            to="each neighbour",
            holds="numbers of exchanges: what is missing, what was merged, when to stop",
            when="while a neighbour is waited for, and at the end",
            most_bytes=HELLO_BYTES,
        ),
        Message(
            what="sign of life",
            to="each neighbour",
            holds="nothing",
            when=f"every {heartbeat_s} s",
            most_bytes=HEARTBEAT_BYTES,
        ),
        Message(
            what="answer to a doctor",
            to="the neighbour that asked",
            holds="its clock, versions of p2pfl and torch, digests, outputs of the first model on agreed numbers; nothing of its rows",
            when="when a neighbour's doctor asks",
            most_bytes=None,
        ),
    ]
