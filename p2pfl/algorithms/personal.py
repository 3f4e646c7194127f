"""Rules in which some coordinates take no part: these stay at their node, where the mixing matrix is the identity.

Shapes: N rows, P parameters, S of them shared, L = P - S of them personal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from p2pfl.algorithms.base import Algorithm, Context, Notice, Sender, State
from p2pfl.algorithms.inbox import Inbox, InboxFactory
from p2pfl.params import Layout, taken

_PERSONAL = "personal "  # before the names of what the rule keeps for the personal coordinates


class PartlyShared(Algorithm):
    """A rule that exchanges some coordinates, and goes on by itself, with W = 1, on those that are personal.

    The rule runs on two vectors: on the shared coordinates with what the neighbours send, and on the personal ones as at a node without
    neighbours. So every message, and all that is measured of messages, is of the shared coordinates only.

    Args:
        rule: for the shared coordinates.
        layout: with at least one personal tensor and one that is shared.
    """

    def __init__(self, rule: Algorithm, layout: Layout) -> None:
        self.rule, self._alone = rule, rule.alone
        self.phases, self.channels = rule.phases, rule.channels  # type: ignore[misc]  # declared of classes, here of one object
        self.requires, self.uses_weights, self.reads_once = rule.requires, rule.uses_weights, rule.reads_once  # type: ignore[misc]  # likewise
        self.has_notices = rule.has_notices  # type: ignore[misc]  # likewise
        self._shared, self._shared_places = layout.part(personal=False)
        self._own, self._own_places = layout.part(personal=True)

    @property
    def resets_optimizer(self) -> bool:
        """Whether the optimiser's state is all zeros at the start of each round."""
        return self.rule.resets_optimizer

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Start the shared and the personal part."""
        (x_NS, x_NL), (ctx_shared, ctx_own) = self._halves(x_NP), self._contexts(ctx)
        return self._joined(x_NP, self.rule.init(x_NS, ctx_shared), self._alone.init(x_NL, ctx_own))

    def correct(self, state: State, gradient_NP: Tensor, ctx: Context) -> Tensor:
        """Correct the gradient by each part's own state."""
        (shared, own), (ctx_shared, ctx_own) = self._parts(state), self._contexts(ctx)
        g_NS, g_NL = self._halves(gradient_NP)
        return self._whole(gradient_NP, self.rule.correct(shared, g_NS, ctx_shared), self._alone.correct(own, g_NL, ctx_own))

    def adapt(self, state: State, trained_NP: Tensor, ctx: Context) -> State:
        """Take in what the local steps made of both parts."""
        (shared, own), (ctx_shared, ctx_own) = self._parts(state), self._contexts(ctx)
        x_NS, x_NL = self._halves(trained_NP)
        return self._joined(state["x"], self.rule.adapt(shared, x_NS, ctx_shared), self._alone.adapt(own, x_NL, ctx_own))

    def outgoing(self, state: State, phase: int, ctx: Context) -> dict[str, Tensor]:
        """Send what the rule sends of the shared coordinates."""
        return self.rule.outgoing(self._parts(state)[0], phase, self._contexts(ctx)[0])

    def decode(self, channel: str, before: Tensor, encoded: Mapping[str, Tensor], ctx: Context) -> Tensor:
        """Decode a message of shared coordinates."""
        return self.rule.decode(channel, before, encoded, self._contexts(ctx)[0])

    def merge(self, state: State, phase: int, inbox: Inbox, ctx: Context) -> State:
        """Merge the shared coordinates with what came, and the personal ones with nothing."""
        (shared, own), (ctx_shared, ctx_own) = self._parts(state), self._contexts(ctx)
        x_NP = state["x"]
        shared = self.rule.merge(shared, phase, inbox, ctx_shared)
        if phase < self._alone.phases:
            sent = self._alone.outgoing(own, phase, ctx_own)
            empty = InboxFactory(channels=self._alone.channels).without_messages(sent, 0, x_NP.dtype)
            own = self._alone.merge(own, phase, empty, ctx_own)
        return self._joined(x_NP, shared, own)

    def as_models(self, state: State, phase: int, message: Mapping[str, Tensor], sender: Sender | None, ctx: Context) -> list[Tensor]:
        """Say what a message makes of the shared coordinates."""
        return self.rule.as_models(self._parts(state)[0], phase, message, sender, self._contexts(ctx)[0])

    def estimate(self, state: State) -> Tensor:
        """Join both parts' parameters to evaluate."""
        shared, own = self._parts(state)
        return self._whole(state["x"], self.rule.estimate(shared), self._alone.estimate(own))

    def notices(self, before: State, after: State) -> list[Notice]:
        """Tell what the rule has changed of its own accord on the shared coordinates."""
        return self.rule.notices(before, after)

    def apply_stale_update(self, now: State, start: State, trained: State) -> State:
        """Add what training made of `start` to what x has become meanwhile."""
        return self.rule.apply_stale_update(now, start, trained)

    def _contexts(self, ctx: Context) -> tuple[Context, Context]:
        """The contexts of the shared and of the personal coordinates."""
        return replace(ctx, layout=self._shared), replace(ctx, layout=self._own, slots_NK=None)

    def _halves(self, v_NP: Tensor) -> tuple[Tensor, Tensor]:
        """The shared and the personal coordinates, (N, S) and (N, L)."""
        return taken(v_NP, self._shared_places), taken(v_NP, self._own_places)

    def _whole(self, like_NP: Tensor, shared_NS: Tensor, own_NL: Tensor) -> Tensor:
        """Both parts in their places, as a new vector."""
        whole_NP = torch.empty_like(like_NP)
        _put(whole_NP, self._shared_places, shared_NS)
        _put(whole_NP, self._own_places, own_NL)
        return whole_NP

    def _parts(self, state: State) -> tuple[State, State]:
        """The states of the rule on the shared and on the personal coordinates."""
        shared = {name: tensor for name, tensor in state.items() if not name.startswith(_PERSONAL)}
        own = {name.removeprefix(_PERSONAL): tensor for name, tensor in state.items() if name.startswith(_PERSONAL)}
        x_NS, x_NL = self._halves(state["x"])
        return shared | {"x": x_NS}, own | {"x": x_NL}

    def _joined(self, like_NP: Tensor, shared: State, own: State) -> State:
        """One state of both."""
        joined = {"x": self._whole(like_NP, shared["x"], own["x"])}
        joined |= {name: _apart(tensor, like_NP) for name, tensor in shared.items() if name != "x"}
        return joined | {_PERSONAL + name: _apart(tensor, like_NP) for name, tensor in own.items() if name != "x"}


def _put(whole_NP: Tensor, places: Sequence[slice], part: Tensor) -> None:
    start = 0
    for place in places:
        width = place.stop - place.start
        whole_NP[..., place] = part[..., start : start + width]
        start += width


def _apart(tensor: Tensor, like_NP: Tensor) -> Tensor:
    """The tensor, copied where it is a part of the whole vector: a view would keep that, and change with it."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() == like_NP.untyped_storage().data_ptr() else tensor
