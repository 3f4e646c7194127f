"""What an algorithm is: pure functions of tensors with any number of rows, run unchanged by a daemon (one row) and the simulator (N rows).

One round of a runtime:

    trained = K local steps from state["x"], each with correct(state, gradient taken at estimate(state))
    state = adapt(state, trained)
    for phase in range(phases): state = merge(state, phase, inbox with everybody's outgoing(state, phase))

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from p2pfl.params import Layout

State = dict[str, Tensor]
"""What an algorithm carries from round to round; each tensor's first axis is N. "x" is the vector that the optimiser moves."""

Requirement = Literal[
    "symmetric",
    "doubly stochastic",
    "fixed mean",
    "column stochastic",
    "nonnegative weights",
    "static",
    "reliable",
    "single messages",
    "complete",
    "tree",
    "fixed slots",
    "synchronous",
    "pairwise",
]
"""What an algorithm may ask of graph and links. "fixed mean": mixing leaves a mean of the nodes where it is that somebody asked for, the
plain one (doubly stochastic weights) or the weighted one of `weights: stationary`; "nonnegative weights": no message counts negatively, a
node's own included, for rules that sort or bound single messages; "fixed slots": column k of `Inbox.stack` and of `Context.slots_NK` is the
same neighbour in every round, so that there can be a state for each edge; "column stochastic": the sender splits its mass,
sum_i W_ij = 1; "synchronous": all messages of a merge are of the same round; "pairwise": they are of one neighbour, and nobody else meets
the two in the meantime."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Channel:
    """One kind of message that an algorithm sends in a round."""

    missing: Literal["own", "zero"] = "own"
    """What stands in for a neighbour's message that did not come: "own": its weight stays at home; "zero": nothing, for differences."""

    per_edge: bool = False
    """Whether each neighbour gets a message of its own: `outgoing` then gives (N, K, ...), column k for the neighbour in slot k."""

    model: bool = False
    """Whether it carries the model itself, so that differences between neighbours measure disagreement."""

    encodes: str | None = None
    """The channel in whose place it travels: what `Algorithm.decode` makes that one's next value of. Every receiver holds the value, and
    where one has missed something the runtime sends it whole; an inbox shows the value and never this channel. All channels that encode
    one, and it, are sent in one and the same phase of a round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What a pure step may know about where and when it runs."""

    round: int
    """Counted from 0."""

    local_steps: int
    """K, the steps of this round; 0 in the rounds that only mix."""

    lr: float
    """Learning rate of this round."""

    seed: int
    """The experiment's; with nodes_N and round the key of every draw."""

    nodes_N: Tensor
    """int64, the rows' numbers in the roster."""

    layout: Layout
    """Of the flat parameter vector."""

    slots_NK: Tensor | None = None
    """int64, the roster's numbers of each row's neighbours, in sorted order, -1 in padding; for algorithms that require fixed slots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sender:
    """The neighbour that sent a message, for `Algorithm.as_models`."""

    slot: int
    """Column k of each row's neighbours."""

    num_nodes: int
    """Of the network."""

    num_exchanges: int = 1
    """Exchanges since the last message of it that was taken in: a running sum may have grown in all of them."""


class Inbox(Protocol):
    """What the neighbours sent in one phase, as an algorithm sees it. Sums run in sorted node order."""

    def own(self, channel: str) -> Tensor:
        """What this row itself sent, (N, ...)."""
        ...

    def mix(self, channel: str, *, scale_NK: Tensor | float | None = None) -> Tensor:
        """sum_j W_ij m_j with the own row, (N, ...).

        Args:
            channel: its messages.
            scale_NK: what each neighbour's weight is multiplied by, the same at both ends of an edge; the rest of it stays at home.
        """
        ...

    def take_in(self, channel: str, into: Tensor, flows: Iterable[Tensor]) -> Tensor:
        """A rule's own flows, added to *into* (N, ...): what goes over each edge in the order of the slots, (N, ...), 0 where nothing came.

        The other end's flow must be the exact negative. Only a flow that comes in this way, or by `mix`, can be taken back where the other
        end turns out to have missed its message; the channel is one of its messages, with missing="own".
        """
        ...

    def squared_distances(self, channel: str) -> Tensor:
        """Sum over the neighbours that are there of ||m_i - m_j||**2, (N,) float64."""
        ...

    def weighted_squared_distances(self, channel: str) -> Tensor:
        """Sum over the neighbours that are there of w_ij ||m_i - m_j||**2, with the weights and scales of the last `mix`, (N,) float64."""
        ...

    def own_weights(self) -> Tensor:
        """What each row's own message counts for, (N,): W_ii."""
        ...

    def stack(self, channel: str) -> tuple[Tensor, Tensor, Tensor]:
        """Single messages (N, K, ...), their weights (N, K) and which are there (N, K) bool."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """One change that a rule has made of its own accord at one row."""

    row: int
    """Counted from 0 in the state that the rule was given."""

    event: str
    """Kind of the event that tells of it."""

    detail: str
    """A sentence without the round and without a full stop."""


class Algorithm(Protocol):
    """A rule for decentralised learning. Implementations are immutable objects; every method is pure.

    A rule that derives from it explicitly has the gradient as it is, the trained x and x as the estimate unless it says otherwise.
    """

    phases: ClassVar[int]
    """Exchanges in one round."""

    channels: ClassVar[Mapping[str, Channel]]
    """The messages of each exchange, by name."""

    requires: ClassVar[frozenset[Requirement]]
    """What must hold of graph and links; checked before the start."""

    weighs: ClassVar[bool] = True
    """Whether the graph's weights mean anything to it; where not, an experiment that asks for some is refused."""

    reads_once: ClassVar[bool] = False
    """Whether `merge` asks its inbox for each message once, and by `mix` alone: a runtime may then write over what has been read."""

    tells: ClassVar[bool] = False
    """Whether `notices` may have something to tell."""

    def __init_subclass__(cls) -> None:
        """Take nothing for granted of a rule that has a merge of its own."""
        super().__init_subclass__()
        if "merge" in cls.__dict__ and "reads_once" not in cls.__dict__:
            cls.reads_once = False

    @property
    def alone(self) -> Algorithm:
        """The rule for coordinates that are never exchanged, where W = 1: itself, unless it says otherwise."""
        return self

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """The state before the first round."""
        ...

    def correct(self, state: State, gradient_NP: Tensor, ctx: Context) -> Tensor:  # noqa: ARG002
        """What the optimiser is given at one local step."""
        return gradient_NP

    def adapt(self, state: State, trained_NP: Tensor, ctx: Context) -> State:  # noqa: ARG002
        """What the K local steps made of x; not called for a row that did not train."""
        return {**state, "x": trained_NP}

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:
        """What each row sends in one phase, by channel: (N, ...) to all neighbours alike, or (N, K, ...) where the channel is per edge.

        Of a channel that is encoded both the new value and what it is encoded by; `merge` must keep that value for the next `decode`.
        """
        ...

    def decode(self, channel: str, before: Tensor, encoded: Mapping[str, Tensor], ctx: Context) -> Tensor:  # noqa: ARG002
        """A channel's new value from the one before, (..., *), zeros at first, and from the channels that encode it.

        Sender and receivers compute the value by this function alone, so that they hold the same bits. Unless a rule says otherwise what
        travels is added.
        """
        for part in encoded.values():
            before = before + part
        return before

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """The state after an exchange."""
        ...

    def estimate(self, state: State) -> Tensor:
        """The parameters to evaluate and to take gradients at, (N, P)."""
        return state["x"]

    def as_models(
        self,
        state: State,  # noqa: ARG002
        phase: int,  # noqa: ARG002
        message: Mapping[str, Tensor],
        sender: Sender | None,  # noqa: ARG002
        ctx: Context,  # noqa: ARG002
    ) -> list[Tensor]:
        """Vectors of a model's size that one message of a phase comes to, (N, ...) each: their norms are bounded before it is merged.

        A rule whose messages are no models says what they would make of one. An infinite vector says that no honest node sends it.
        Unless a rule says otherwise every floating channel counts as a model.

        Args:
            state: of the receivers, before the merge.
            phase: of the round.
            message: by channel, decoded, (N, ...).
            sender: None for what the rows themselves send, without channels that are per edge.
            ctx: of the round.
        """
        return [tensor for tensor in message.values() if tensor.is_floating_point()]

    def notices(self, before: State, after: State) -> list[Notice]:  # noqa: ARG002
        """Changes that a rule has made of its own accord in a merge, and that the run's events must tell."""
        return []


def flow(weight: Tensor | float, theirs: Tensor, own: Tensor) -> Tensor:
    """What a merge over one edge adds to the own row: w_ij (m_j - m_i).

    The other side computes exactly the negative, bit for bit, so that what one row gains another loses and the mean stands still.
    """
    return weight * (theirs - own)


@dataclass(kw_only=True)
class SlotInbox:
    """An inbox over neighbour slots in sorted node order; subclassed by nobody: a runtime hands it a function that finds a slot's messages.

    The same arithmetic in the same order serves one row and N rows, which is what makes a daemon's weights equal a simulator's.
    """

    channels: Mapping[str, Channel]
    sent: Mapping[str, Tensor]
    """The own rows' messages, (N, ...)."""

    weights_NK: Tensor
    """Of the messages' dtype; column k belongs to each row's k-th neighbour in sorted order; 0 in padding."""

    present_NK: Tensor
    """bool: whose message came. Padding is False."""

    slot: SlotMessages
    """Finds the k-th neighbours' messages."""

    self_weights_N: Tensor | None = None
    """What the own message counts for; None: what the neighbours' weights leave of 1."""

    returns: Mapping[str, Tensor] = field(default_factory=dict)
    """What earlier flows have to be taken back, (N, ...), by channel; empty for most rounds."""

    flows: dict[tuple[int, int], dict[str, Tensor]] | None = None
    """Takes what came into each row from each slot, by (row, slot) and channel, for a ledger; None: nobody asks."""

    asked_NK: Tensor | None = None
    """bool: whose flows are taken; None: all."""

    writes_over: bool = False
    """Whether a message may be written over when it has been mixed: its flow then takes its place, and no more memory. Only where each is
    asked for once; see Algorithm.reads_once."""

    _squared: dict[str, Tensor] = field(default_factory=dict)
    _apart: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    _weighted: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_one_row(
        cls,
        channels: Mapping[str, Channel],
        sent: Mapping[str, Tensor],
        slots: Sequence[str],
        messages: Mapping[str, Mapping[str, Tensor]],
        weights: Mapping[str, float],
        *,
        self_weight: float,
        dtype: torch.dtype,
        returns: Mapping[str, Tensor] | None = None,
        flows: dict[tuple[int, int], dict[str, Tensor]] | None = None,
        writes_over: bool = False,
    ) -> SlotInbox:
        """The inbox of one node.

        Args:
            channels: of the algorithm.
            sent: its own messages, (1, ...).
            slots: its neighbours' names, sorted.
            messages: what came, by neighbour and channel, without the row's axis.
            weights: w_ij by neighbour; nobody else counts.
            self_weight: what the own message counts for.
            dtype: of the model.
            returns: as the attribute.
            flows: as the attribute.
            writes_over: as the attribute.
        """

        def slot(channel: str, k: int, rows: Tensor | None) -> Tensor:  # noqa: ARG001  # one row: all or none
            return messages[slots[k]][channel].unsqueeze(0)

        return cls(
            channels=channels,
            sent=dict(sent),
            weights_NK=torch.tensor([[weights.get(name, 0.0) for name in slots]], dtype=torch.float64).to(dtype),
            self_weights_N=torch.tensor([self_weight], dtype=torch.float64).to(dtype),
            present_NK=torch.tensor([[name in messages for name in slots]], dtype=torch.bool),
            slot=slot,
            returns=returns or {},
            flows=flows,
            writes_over=writes_over,
        )

    def own(self, channel: str) -> Tensor:
        """What this row itself sent, (N, ...)."""
        return self.sent[channel]

    def mix(self, channel: str, *, scale_NK: Tensor | float | None = None) -> Tensor:
        """sum_j W_ij m_j with the own row; a missing neighbour's weight stays at home or counts as nothing, as the channel says."""
        own = self.sent[channel]
        keeps_mean = self.channels[channel].missing == "own"
        weights_NK = self.weights_NK if scale_NK is None else self.weights_NK * scale_NK
        total = own.clone() if keeps_mean else _column(self.own_weights(), own) * own
        squared_N = torch.zeros(own.shape[0], dtype=torch.float64, device=own.device)
        weighted_N = torch.zeros_like(squared_N)
        by_slot = self._apart[channel] = {}
        for k in range(weights_NK.shape[1]):
            rows = self._rows(k)
            if rows is None:
                theirs, weight = self.slot(channel, k, None), _column(weights_NK[:, k], own)
                difference = theirs.sub_(own) if self.writes_over and keeps_mean else theirs - own
                squared_N += (apart_N := _squared_norms(difference))
                by_slot[k] = apart_N
                weighted_N += weights_NK[:, k] * apart_N
                added = difference.mul_(weight) if keeps_mean else weight * theirs  # bit for bit what `flow` gives
                total += added
            elif len(rows):
                theirs, weight = self.slot(channel, k, rows), _column(weights_NK[rows, k], own)
                added = flow(weight, theirs, own[rows]) if keeps_mean else weight * theirs
                total[rows] += added
                squared_N[rows] += (apart_N := _squared_norms(theirs - own[rows]))
                weighted_N[rows] += weights_NK[rows, k] * apart_N
            else:
                continue
            if keeps_mean:
                self._note(channel, k, rows, added)
        self._squared[channel], self._weighted[channel] = squared_N, weighted_N
        if channel in self.returns:
            total += self.returns[channel]
        return total

    def take_in(self, channel: str, into: Tensor, flows: Iterable[Tensor]) -> Tensor:
        """*into* with each slot's flow and with what earlier ones have to be taken back."""
        total = into.clone()
        for k, added in enumerate(flows):
            total += added
            self._note(channel, k, None, added)
        if channel in self.returns:
            total += self.returns[channel]
        return total

    def own_weights(self) -> Tensor:
        """What each row's own message counts for, (N,)."""
        return self.self_weights_N if self.self_weights_N is not None else 1 - self.weights_NK.sum(dim=-1)

    def stack(self, channel: str) -> tuple[Tensor, Tensor, Tensor]:
        """Single messages (N, K, ...), zeros where none came, with weights and presence."""
        own = self.sent[channel]
        num_slots = self.weights_NK.shape[1]
        stacked = own.new_zeros((own.shape[0], num_slots, *own.shape[2 if self.channels[channel].per_edge else 1 :]))
        for k in range(num_slots):
            rows = self._rows(k)
            if rows is None:
                stacked[:, k] = self.slot(channel, k, None)
            elif len(rows):
                stacked[rows, k] = self.slot(channel, k, rows)
        return stacked, self.weights_NK, self.present_NK

    def squared_distances(self, channel: str) -> Tensor:
        """Sum over the neighbours that are there of ||m_i - m_j||**2, (N,) float64; a by-product of `mix`."""
        if channel not in self._squared:
            self.mix(channel)
        return self._squared[channel]

    def distances(self, channel: str) -> dict[int, float]:
        """||m_i - m_j|| of one row to each neighbour that is there, by slot; a by-product of `mix`, empty where there was none."""
        return {k: math.sqrt(apart_N.item()) for k, apart_N in self._apart.get(channel, {}).items()}

    def weighted_squared_distances(self, channel: str) -> Tensor:
        """Sum over the neighbours that are there of w_ij ||m_i - m_j||**2, (N,) float64; a by-product of the last `mix`."""
        return self._weighted[channel]

    def _note(self, channel: str, k: int, rows: Tensor | None, added: Tensor) -> None:
        if self.flows is None:
            return
        if self.asked_NK is None:
            for place, row in enumerate(range(len(added)) if rows is None else rows.tolist()):
                self.flows.setdefault((row, k), {})[channel] = added[place]
            return
        asked = self.asked_NK[:, k] if rows is None else self.asked_NK[rows, k]
        for place in asked.nonzero().squeeze(-1).tolist():
            row = place if rows is None else int(rows[place])
            self.flows.setdefault((row, k), {})[channel] = added[place].clone()  # not a view: the others' are not to be kept

    def _rows(self, k: int) -> Tensor | None:
        """The rows whose k-th neighbour's message is there; None for all of them."""
        present_N = self.present_NK[:, k]
        return None if bool(present_N.all()) else present_N.nonzero().squeeze(-1)


def over_an_edge(
    channels: Mapping[str, Channel], sent: Mapping[str, Tensor], *, whole: bool = False, row: int = 0, slot: int = 0
) -> dict[str, Tensor]:
    """What of a phase's `outgoing` travels from one row to its neighbour in one slot, by channel in the order of the names.

    Args:
        channels: the algorithm's.
        sent: of all rows.
        whole: the values themselves instead of what encodes them.
        row: of the sender.
        slot: of the receiver, for channels that are per edge.
    """
    encoded = {channels[name].encodes for name in sent}
    travels = {name: channels[name].encodes is None if whole else name not in encoded for name in sent}
    return {name: sent[name][row, slot] if channels[name].per_edge else sent[name][row] for name in sorted(sent) if travels[name]}


class SlotMessages(Protocol):
    """How a runtime finds messages."""

    def __call__(self, channel: str, k: int, rows: Tensor | None) -> Tensor:
        """The k-th neighbours' messages of the given rows (None: of all), (len(rows), ...)."""
        ...


def _squared_norms(difference: Tensor) -> Tensor:
    norms_N: Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=-1)
    return norms_N.double().square()


def _column(values_N: Tensor, like: Tensor) -> Tensor:
    """(N,) shaped so that it multiplies (N, ...) row by row."""
    return values_N.reshape(-1, *[1] * (like.dim() - 1))
