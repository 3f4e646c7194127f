"""Count the memory of a node's exchanges, by taking a few rounds of them with a model that is small and of the same proportions.

What a rule makes for a moment, in a merge or in a compressor, is its own affair; so all tensors are counted that torch makes on the way.
The way is that of `mixing.Mixing`: flows take the places of what came where the rule allows it, and what a rule keeps from round to round
stays. Every tensor as large as a model grows with it, so the sizes that are found are multiplied.

Shapes: one row, K neighbour slots, P parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from p2pfl.algorithms import Algorithm, Context, Guard, PartlyShared, over_an_edge
from p2pfl.experiment.plan import Plan
from p2pfl.params import Layout, TensorSpec

_MOST_NUMBERS = 2**19
"""Numbers of the small model, at most: a moment's work, and large enough that what does not grow with a model is of no account."""

_ROUNDS = 3  # in the last two all that a rule keeps is there
_MATRIX_AXES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeMemory:
    """Bytes of the state of a rule and of all that lies beside it, at the moment when there is most."""

    training_bytes: int
    """While local steps are taken, without what these need themselves."""
    adapting_bytes: int
    """While the rule takes in what local steps have made, this included; without the optimiser's state."""
    estimate_bytes: int
    """The parameters at which gradients are taken, where these are other tensors than the state's."""
    mixing_bytes: int
    """While tensors are packed, unpacked and merged."""
    received_bytes: int
    """One neighbour's update."""


class _LiveBytes(TorchFunctionMode):
    """Counts the bytes of tensors that are made inside of it and are still there, and the most since the last `begin`."""

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        self._seen: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, and count what it has made."""
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return found

    def begin(self) -> None:
        """Forget the most that there was."""
        self.peak_bytes = self.now_bytes

    def elsewhere(self, tensor: Tensor) -> Tensor:
        """Count a tensor no more: it lies in a file."""
        self.now_bytes -= tensor.untyped_storage().nbytes()
        weakref.finalize(tensor.untyped_storage(), self._add, tensor.untyped_storage().nbytes())
        return tensor

    def _count(self, storage: Any, size_bytes: int) -> None:
        key = storage._cdata  # noqa: SLF001  # the place of the storage, which has no other name
        if key in self._seen:
            return
        self._seen.add(key)
        weakref.finalize(storage, self._forget, key, size_bytes)
        self._add(size_bytes)

    def _forget(self, key: int, size_bytes: int) -> None:
        self._seen.discard(key)
        self._add(-size_bytes)

    def _add(self, size_bytes: int) -> None:
        self.now_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)


def exchange_memory(plan: Plan, num_neighbours: int, *, in_files: bool) -> ExchangeMemory:
    """Count what the exchanges of a node with so many neighbours take; *in_files*: received updates, and flows in their places, do not."""
    algorithm, layout = _small(plan.recipe.algorithm, plan.layout)
    found = _Exchanges(plan, algorithm, layout, num_neighbours, in_files=in_files).run()
    times = plan.layout.size / layout.size
    return ExchangeMemory(**{name: round(getattr(found, name) * times) for name in ExchangeMemory.__dataclass_fields__})


class _Exchanges:
    """The exchanges of one row with neighbours that send what it sends itself."""

    def __init__(self, plan: Plan, algorithm: Algorithm, layout: Layout, num_neighbours: int, *, in_files: bool) -> None:
        self._plan, self._algorithm, self._in_files = plan, algorithm, in_files
        self._names = [f"{k:06}" for k in range(num_neighbours)]
        self._balances = plan.experiment.pace.kind.balances
        self._guard = Guard(algorithm=algorithm, layout=layout, first_norm=1.0, num_nodes=len(plan.names))
        self._live = _LiveBytes()
        self._ctx = Context(
            round=0,
            local_steps=max(1, plan.recipe.local_steps),
            lr=0.01,
            seed=0,
            nodes_N=torch.tensor([0]),
            layout=layout,
            slots_NK=torch.arange(1, num_neighbours + 1)[None] if "fixed slots" in algorithm.requires else None,
        )
        self._open: list[Any] = [None] * num_neighbours
        """By neighbour, what lies in its place: the flow that may have to be rolled back, and as much more as its next update takes."""
        self._values: list[dict[str, Tensor]] = [{} for _ in range(num_neighbours)]
        """By neighbour, the values that its updates have led to."""
        self._posted: list[Tensor] = []

    def run(self) -> ExchangeMemory:
        """Take the rounds, and say what there was at most in the last ones."""
        live, algorithm, generator = self._live, self._algorithm, torch.Generator().manual_seed(0)
        training = adapting = estimate = mixing = received = 0
        with torch.no_grad(), live:
            state = algorithm.init(torch.randn(1, self._ctx.layout.size, generator=generator, dtype=self._ctx.layout.dtype), self._ctx)
            for number in range(_ROUNDS):
                ctx = replace(self._ctx, round=number)
                training, now_bytes = max(training, live.now_bytes), live.now_bytes
                here = algorithm.estimate(state)
                estimate = max(estimate, live.now_bytes - now_bytes)
                del here
                moved = state["x"] * 0.99
                live.begin()
                state = algorithm.adapt(state, moved, ctx)
                del moved
                adapting = max(adapting, live.peak_bytes)
                for phase in range(algorithm.phases):
                    live.begin()
                    state, update_bytes = self._exchange(state, phase, ctx)
                    mixing, received = max(mixing, live.peak_bytes), max(received, update_bytes)
            del state
            self._open.clear()
        return ExchangeMemory(
            training_bytes=training, adapting_bytes=adapting, estimate_bytes=estimate, mixing_bytes=mixing, received_bytes=received
        )

    def _exchange(self, state: Any, phase: int, ctx: Context) -> tuple[Any, int]:
        """Send, receive and merge; returns the state that this makes, and the bytes of one update."""
        algorithm, channels = self._algorithm, self._algorithm.channels
        outgoing = algorithm.outgoing(state, phase, ctx)
        per_edge = any(channels[name].per_edge for name in outgoing)
        slots = range(len(self._names))
        posted = [tensor for k in (slots if per_edge else slots[:1]) for tensor in self._packed(outgoing, k)]
        came = []
        for k in slots:
            self._open[k] = None  # what is heard with an update settles the flow before
            if k == slots[-1]:
                self._posted = posted  # and when all have been heard, nobody asks for the update before
            came.append({name: self._received(tensor) for name, tensor in over_an_edge(channels, outgoing, slot=k).items()})
        update_bytes = sum(tensor.nbytes for tensor in came[0].values()) if came else 0
        before, messages = [dict(values) for values in self._values], {}
        for k, name in enumerate(self._names):
            messages[name] = self._unpacked(came[k], outgoing, state, phase, k, ctx)
        weight = 1 / (len(self._names) + 1)
        inbox = self._plan.recipe.inboxes.for_node(
            outgoing,
            self._names,
            messages,
            dict.fromkeys(self._names, weight),
            self_weight=weight,
            dtype=ctx.layout.dtype,
            flows={},
            writes_over=algorithm.reads_once and self._balances,
        )
        merged = algorithm.merge(state, phase, inbox, ctx)
        encoded = {channel.encodes for channel in channels.values()}
        for k, name in enumerate(self._names):
            self._values[k].update({of: tensor for of, tensor in messages[name].items() if of in encoded})
            flow = list((inbox.flows or {}).get((0, k), {}).values()) if self._balances else []
            missing_bytes = update_bytes - sum(tensor.untyped_storage().nbytes() for tensor in flow)
            room = torch.empty(max(0, missing_bytes), dtype=torch.uint8)
            self._open[k] = flow, self._live.elsewhere(room) if self._in_files else room
        del before
        return merged, update_bytes

    def _packed(self, outgoing: Mapping[str, Tensor], slot: int) -> list[Tensor]:
        """Tensors that stay as long as what went to one neighbour may be sent again: several channels lie side by side, as a copy."""
        travels = over_an_edge(self._algorithm.channels, outgoing, slot=slot)
        values = over_an_edge(self._algorithm.channels, outgoing, whole=True, slot=slot)
        full = list(values.values()) if values.keys() != travels.keys() else []
        parts = [tensor.contiguous().reshape(-1) for tensor in travels.values()]
        return [*full, parts[0] if len(parts) == 1 else torch.cat([part.view(torch.uint8) for part in parts])]

    def _received(self, like: Tensor) -> Tensor:
        """Room for what a neighbour sends, and what it sent."""
        tensor = like.clone()
        return self._live.elsewhere(tensor) if self._in_files else tensor

    def _unpacked(
        self, came: dict[str, Tensor], outgoing: Mapping[str, Tensor], state: Any, phase: int, slot: int, ctx: Context
    ) -> dict[str, Tensor]:
        """A message as the algorithm sees it: values in place of what encodes them."""
        algorithm, message = self._algorithm, dict(came)
        for of, value in over_an_edge(algorithm.channels, outgoing, whole=True, slot=slot).items():
            if of not in message:
                parts = {channel: message.pop(channel)[None] for channel in list(message) if algorithm.channels[channel].encodes == of}
                held = self._values[slot].get(of)
                message[of] = algorithm.decode(of, (torch.zeros_like(value) if held is None else held)[None], parts, ctx)[0]
        norms = {channel: 1.0 for channel, tensor in came.items() if tensor.is_floating_point()}
        self._guard.norm(state, phase, message, ctx, slot=slot, norms=norms)
        return message


def _small(algorithm: Algorithm, layout: Layout) -> tuple[Algorithm, Layout]:
    """A rule and a layout with the same tensors, each of them smaller where the model is large."""
    fraction = min(1.0, _MOST_NUMBERS / layout.size)
    small = replace(layout, tensors=tuple(_smaller(spec, fraction) for spec in layout.tensors))
    return (PartlyShared(algorithm.rule, small) if isinstance(algorithm, PartlyShared) else algorithm), small


def _smaller(spec: TensorSpec, fraction: float) -> TensorSpec:
    if fraction == 1.0 or not spec.size:
        return spec
    if len(spec.shape) < _MATRIX_AXES:
        return replace(spec, shape=(max(1, round(spec.size * fraction)),))
    sides = spec.shape[0], spec.size // spec.shape[0]
    return replace(spec, shape=tuple(max(1, round(side * fraction**0.5)) for side in sides))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, of which several may lie in one place."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
