"""The interface of algorithms: pure functions of tensors with any number of rows, the same in a daemon (one) and the simulator (N).

One round of a runtime:

    trained = K local steps from state["x"], each with correct(state, gradient taken at estimate(state))
    state = adapt(state, trained)
    for phase in range(phases): state = merge(state, phase, inbox with everybody's outgoing(state, phase))

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from p2pfl.algorithms.inbox import Channel, Inbox
from p2pfl.params import Layout

State = dict[str, Tensor]
"""Tensors that an algorithm carries from round to round; each one's first axis is N. "x" is the vector that the optimiser moves."""

LocalChange = Literal["gradient", "state", "estimate"]

PLAIN_STEPS: frozenset[LocalChange] = frozenset()
"""Local changes of a rule whose local steps are the optimiser's alone."""

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
"""Conditions that an algorithm may require of the graph. "fixed mean": mixing leaves a mean of the nodes where it is that somebody asked
for, the plain one (doubly stochastic weights) or the weighted one of `weights: stationary`; "nonnegative weights": no message counts
negatively, a node's own included, for rules that sort or bound single messages; "fixed slots": column k of `Inbox.stack` and of
`Context.slots_NK` is the same neighbour in every round, so that there can be a state for each edge; "column stochastic": the sender
splits its mass, sum_i W_ij = 1; "synchronous": all messages of a merge are of the same round; "pairwise": they are of one neighbour, and
nobody else meets the two in the meantime."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Facts that a pure step may know about where and when it runs."""

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
    """Layout of the flat parameter vector."""

    slots_NK: Tensor | None = None
    """int64, the roster's numbers of each row's neighbours, in sorted order, -1 in padding; for algorithms that require fixed slots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sender:
    """The neighbour that sent a message, for `Algorithm.as_models`."""

    slot: int
    """Column k of each row's neighbours."""

    num_nodes: int
    """Number of nodes in the network."""

    num_exchanges: int = 1
    """Exchanges since the last message of it that was taken in: a running sum may have grown in all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """One change that a rule has made of its own accord at one row."""

    row: int
    """Counted from 0 in the state that the rule was given."""

    event: str
    """Kind of the event that tells of it."""

    detail: str
    """A sentence without the round and without a full stop."""


Parts = dict[str, Tensor]
"""Arrays that travel in a vector's place, by name; each tensor has the vector's leading axes first."""


@runtime_checkable
class Compressor(Protocol):
    """A rule C for sending less than a vector v. Implementations are immutable objects; the methods are pure.

    E ||C(v) - v||**2 <= (1 - omega) ||v||**2, where C(v) is `decompress` of what `compress` gives: the sender takes that as well. The
    arrays' shapes and dtypes follow from the layout and the model's dtype alone, so that an update's size is known before it is sent.
    Whatever bits a neighbour sends for integers, `decompress` gives finite numbers and raises nothing.
    """

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Exactly the arrays that travel for v (..., P), whose first axis is ctx.nodes_N's; by names of `quantizers.PART_NAMES`."""
        ...

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """C(v), (..., P) of the given dtype, from arrays of any leading axes and of any sender."""
        ...

    def omega(self, layout: Layout) -> float:
        """The fraction of ||v||**2 that C keeps: guaranteed, or expected where the class says so."""
        ...


class Algorithm(Protocol):
    """A rule for decentralised learning. Implementations are immutable objects; every method is pure.

    A rule that derives from it explicitly has the gradient as it is, the trained x and x as the estimate unless it says otherwise.
    """

    phases: ClassVar[int] = 1
    """Exchanges in one round."""

    channels: ClassVar[Mapping[str, Channel]]
    """The messages of each exchange, by name."""

    requires: ClassVar[frozenset[Requirement]]
    """Conditions on graph and pace, checked before the start."""

    uses_weights: ClassVar[bool] = True
    """Whether the graph's weights mean anything to it; where not, an experiment that asks for some is refused."""

    local_changes: ClassVar[frozenset[LocalChange]] = frozenset({"gradient", "state", "estimate"})
    """The methods that make a local step more than the optimiser's step on x: "gradient" for `correct`, "state" for `adapt`, "estimate".
    Backends for plain SGD serve rules without any."""

    plain_gossip: ClassVar[bool] = False
    """Whether its state is x alone and its round has one exchange, x <- W x: a runtime may then mix all rows in place."""

    reads_once: ClassVar[bool] = False
    """Whether `merge` asks its inbox for each message once, and by `mix` alone: a runtime may then write over what has been read."""

    has_notices: ClassVar[bool] = False
    """Whether `notices` may return anything."""

    def __init_subclass__(cls) -> None:
        """Withdraw each inherited declaration that a method of the class's own may have made untrue."""
        super().__init_subclass__()
        for declaration, methods in _RESTS_ON.items():
            if declaration not in cls.__dict__ and not methods.isdisjoint(cls.__dict__):
                setattr(cls, declaration, getattr(Algorithm, declaration))

    @property
    def resets_optimizer(self) -> bool:
        """Whether the optimiser's state is all zeros at the start of each round."""
        return False

    @property
    def splits_mass(self) -> bool:
        """Whether a sender keeps what it does not give away, 1 - sum_i w_ij, and not a receiver what it does not take in."""
        return "column stochastic" in self.requires

    @property
    def model_channel(self) -> str | None:
        """The channel that carries the model itself; None: no message tells how far neighbours disagree."""
        return next((name for name, channel in self.channels.items() if channel.model), None)

    def with_compressor(self, compressor: Compressor) -> Algorithm | None:
        """The rule with this compressor on what it sends; None: it takes none."""
        return None

    @property
    def alone(self) -> Algorithm:
        """The rule for coordinates that are never exchanged, where W = 1: itself, unless it says otherwise."""
        return self

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """The state before the first round."""
        ...

    def correct(self, state: State, gradient_NP: Tensor, ctx: Context) -> Tensor:
        """Correct the gradient that the optimiser is given at one local step."""
        return gradient_NP

    def adapt(self, state: State, trained_NP: Tensor, ctx: Context) -> State:
        """Take in the x that the K local steps made; not called for a row that did not train."""
        return {**state, "x": trained_NP}

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:
        """Messages of each row in one phase, by channel: (N, ...) to all neighbours alike, or (N, K, ...) where the channel is per edge.

        Of a channel that is encoded both the new value and what it is encoded by; `merge` must keep that value for the next `decode`.
        """
        ...

    def decode(self, channel: str, before: Tensor, encoded: Mapping[str, Tensor], ctx: Context) -> Tensor:
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

    def as_models(self, state: State, phase: int, message: Mapping[str, Tensor], sender: Sender | None, ctx: Context) -> list[Tensor]:
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

    def apply_stale_update(self, now: State, start: State, trained: State) -> State:
        """The state after training from `start` where merges have made `now` of that meanwhile: x + (x' - start), for pairwise rules."""
        return {**trained, "x": now["x"] + (trained["x"] - start["x"])}

    def notices(self, before: State, after: State) -> list[Notice]:
        """Changes that a rule has made of its own accord in a merge, and that the run's events must tell."""
        return []


_RESTS_ON: Final = {
    "local_changes": {"correct", "adapt", "estimate"},
    "plain_gossip": {"phases", "channels", "init", "outgoing", "merge"},
    "reads_once": {"merge"},
}
"""The members of a rule that each declaration is about."""
