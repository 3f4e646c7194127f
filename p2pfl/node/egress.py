"""List of all that leaves a site while its node runs: to whom, through whom, in which tensors, and how many bytes a round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from p2pfl.experiment.plan import Plan
from p2pfl.governance.card import Card
from p2pfl.node.egress_ways import EdgeWay, Relayed
from p2pfl.node.mixing import update_formats
from p2pfl.protocol.network_view import ViewPolicy
from p2pfl.transports.relay_words import REQUEST_BYTES
from p2pfl.wire.codec import encode
from p2pfl.wire.messages import MAX_RECORD_BYTES, Hello, Remembered, Report, StopNews
from p2pfl.wire.round_record import MAX_METRICS
from p2pfl.wire.update import DTYPES, UpdateFormat

if TYPE_CHECKING:  # a study without a contract does without analyses
    from p2pfl.node.egress_sums import AnalysisEgress

_LARGEST = 2**53 - 1


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
    travels: tuple[str, ...]
    """Tensors of the model that the channels are made of, with shape and dtype."""
    is_most: bool
    """Whether the graph changes, so that not every neighbour gets an update in every round."""
    stays: tuple[str, ...]
    """Tensors of the model that never leave: frozen, personal, and statistics of layers."""
    messages: tuple[Message, ...]
    ways: tuple[EdgeWay, ...]
    """How the bytes get to each neighbour."""
    relayed: Relayed | None
    """Bytes of others that leave here; None: nothing is relayed."""
    analyses: tuple[AnalysisEgress, ...] = ()
    """Numbers that leave for each analysis of the study, where `p2pfl stats together` runs it."""
    no_updates: str | None = None
    """Reason why no node of this study starts here, so that no update leaves; None: it starts."""

    @property
    def round_bytes(self) -> int:
        """Bytes of updates in a round, to all receivers together, where nothing has to be sent again."""
        return self.update_bytes * len(self.receivers)

    def as_dict(self) -> dict[str, Any]:
        """The list as JSON holds it."""
        return {**asdict(self), "round_bytes": self.round_bytes}


def egress_of(
    plan: Plan,
    card: Card,
    policy: ViewPolicy,
    *,
    heartbeat_s: int,
    ways: Sequence[EdgeWay] = (),
    relayed: Relayed | None = None,
    analyses: Sequence[AnalysisEgress] = (),
) -> Egress:
    """List what leaves the site of a member, whose rows are in the plan."""
    me = plan.names.index(card.name)
    population = plan.population([card.name])
    formats = update_formats(plan.recipe.algorithm, population)
    tensors = [one for phase, each in enumerate(formats) for one in _tensors(phase, each, on_request=False)]
    tensors += [one for phase, each in enumerate(formats) if each.full is not None for one in _tensors(phase, each.full, on_request=True)]
    graph = plan.topology
    receivers = tuple(sorted({plan.names[i] for i in graph.receivers[graph.senders == me]}))
    table = plan.layout.table()
    travels = [f"{row['name']} {row['dtype']} {' x '.join(map(str, row['shape'])) or '1'}" for row in table if row["travels"]]
    stays = [f"{row['name']} ({'personal' if row['trains'] else 'frozen'})" for row in table if not row["travels"]]
    stays += [f"{name} (statistics of a layer)" for name in population.buffers]
    return Egress(
        member=card.name,
        receivers=receivers,
        tensors=tuple(tensors),
        update_bytes=sum(one.encoded_bytes(phase) for phase, one in enumerate(formats)),
        travels=tuple(travels),
        is_most=not plan.schedule.is_steady,
        stays=tuple(stays),
        messages=(*_messages(plan, card, policy, heartbeat_s), *_messages_of_sums(analyses), *_messages_on_the_way(ways)),
        ways=tuple(ways),
        relayed=relayed,
        analyses=tuple(analyses),
    )


def egress_of_sums(
    card: Card, reason: str, *, ways: Sequence[EdgeWay] = (), relayed: Relayed | None = None, analyses: Sequence[AnalysisEgress] = ()
) -> Egress:
    """List what leaves the site of a member that runs analyses and no node, with the reason for the latter."""
    return Egress(
        member=card.name,
        receivers=(),
        tensors=(),
        update_bytes=0,
        travels=(),
        is_most=False,
        stays=(),
        messages=(_card(card), *_messages_of_sums(analyses), *_messages_on_the_way(ways)),
        ways=tuple(ways),
        relayed=relayed,
        analyses=tuple(analyses),
        no_updates=reason,
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
    return [
        _card(card),
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
            most_bytes=_hello_bytes(card.name),
        ),
        Message(
            what="requests and reports",
            to="each neighbour",
            holds="numbers of exchanges: what is missing, what was merged, when to stop",
            when="while a neighbour is waited for, and at the end",
            most_bytes=_hello_bytes(card.name),
        ),
        Message(
            what="sign of life",
            to="each neighbour",
            holds="nothing: an empty frame",
            when=f"every {heartbeat_s} s",
            most_bytes=None,
        ),
        Message(
            what="answer to a doctor",
            to="the neighbour that asked",
            holds="its clock, versions of p2pfl and torch, digests, outputs of the first model on agreed numbers; nothing of its rows",
            when="when a neighbour's doctor asks",
            most_bytes=None,
        ),
    ]


def _card(card: Card) -> Message:
    """List what a card tells, which travels within the study's file."""
    told = ("training rows", card.samples), ("means and deviations of inputs", card.moments)
    on_card = [name for name, known in (*told, ("numbers of frozen rows and patients, with an HMAC of them", card.cohort)) if known]
    return Message(
        what="its card, in the study",
        to="everybody who has the study",
        holds=f"name, addresses, public keys{''.join(f', {name}' for name in on_card)}",
        when="before the start",
        most_bytes=len(card.text.encode()),
    )


def _messages_of_sums(analyses: Sequence[AnalysisEgress]) -> Iterator[Message]:
    """List what leaves beside the numbers while analyses run; nothing where the study lists none."""
    if analyses:
        yield Message(
            what="openings and digests of secure sums, signed",
            to="all members, passed on by neighbours",
            holds="digests of the study and of the planned sums, a fresh public key, a random number, keyed digests of totals, "
            "or that this site gives no numbers",
            when="while p2pfl stats together runs",
            most_bytes=None,
        )


def _messages_on_the_way(ways: Sequence[EdgeWay]) -> Iterator[Message]:
    """List what those get who carry this site's bytes, beside these bytes."""
    when = "whenever a connection is made"
    for proxy in sorted({way.proxy for way in ways if way.proxy is not None}):
        yield Message(
            what="request to the proxy",
            to=proxy,
            holds="host and port of the neighbour, relay or broker; user and password where site.yaml has them",
            when=when,
            most_bytes=None,
        )
    for relay in sorted({way.relay for way in ways if way.relay is not None}):
        yield Message(
            what="request to the relay",
            to=relay,
            holds="public keys of this site and of the neighbour, a random number, a proof that the key is this site's",
            when=when,
            most_bytes=REQUEST_BYTES,
        )
    for broker in sorted({way.broker for way in ways if way.broker is not None}):
        yield Message(
            what="login at the broker",
            to=broker,
            holds="a random name; user and password where site.yaml has them; topics under the study's digest, without a member's name; "
            "a last will, which tells a neighbour that this site is gone",
            when=when,
            most_bytes=None,
        )


def _hello_bytes(name: str) -> int:
    """Size of the longest Hello that a node which keeps the rules sends."""
    report = Report(closed_through=_LARGEST, merged=(_LARGEST - 2, _LARGEST - 1, _LARGEST), confirmed=_LARGEST - 3, settled=_LARGEST)
    digests = dict.fromkeys(("study", "layout", "start"), bytes(32))
    largest = Hello(
        member=name,
        **digests,
        incarnation=2**63 - 1,
        echo=2**63 - 1,
        is_open=True,
        anew=_LARGEST,
        remembered=Remembered(anew=_LARGEST, report=report),
        exchange=_LARGEST,
        report=report,
        stop=StopNews(agreed_for=_LARGEST, stop_round=_LARGEST),
    )
    return len(encode(largest)[0])
