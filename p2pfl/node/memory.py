"""Foretell how much memory a node needs, before it needs it.

Counted are tensors as large as a model, of the moments at which there are most of them. With M bytes of a model, plain SGD on written-out
layers and algorithm dpsgd a node with K neighbours holds

    always              the model that the task made, and the parameters as they are now                    2 M
    while it trains     what it sent last, K flows that may have to be rolled back, the parameters moved    (2 + K) M
    while it mixes      K received models, whose places the flows take, and the mean                        (1 + K) M
    in the last round   K copies of received models, to be measured, K flows, and the mean                  (1 + 2 K) M

so that the most is 3 + 2 K models where neighbours' models are measured at the end. It is 4 + K where they are not, and where the copies
are large, for then these lie in files. Other algorithms and optimisers add what they carry; gradients of layers that are not written out
are there twice for a moment. A neighbour's next update may begin to come in before this node has mixed its last one; the flow to that
neighbour has then been settled, so that nothing is added.

Where updates lie in files (`spill_mb`), so do the flows that take their places and the models to be measured: K counts as 0 above, and the
most is 4 models. The files then take K models, K more for each exchange that a neighbour may be ahead, and K more in the last round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from p2pfl.algorithms import over_an_edge
from p2pfl.evaluation.cross_site import measures_neighbours
from p2pfl.experiment.plan import Plan
from p2pfl.node.own_edges import exchanges_ahead
from p2pfl.node.spill import is_kept_in_files, is_spilled
from p2pfl.training import Population

_OVERHEAD_BYTES = 32 * 2**20
"""Messages on their way in and out, what torch and Python take for themselves while they work; measured."""

_OPTIMIZERS_BYTES = 48 * 2**20
"""Beside that, of torch's libraries that it loads when it first makes an optimiser or vectorises a model; measured."""

_COMPILED_BYTES = 20 * 2**20
"""Beside that, of the compiler's libraries where compiled loops train; measured."""

_WORTH_SAYING_BYTES = 10**6


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeMemory:
    """Bytes that a node needs beyond its process as it was before the model was made; rows of data apart."""

    model_bytes: int
    """One model: the parameters that train."""

    held_bytes: int
    """Models, state of algorithm and optimiser: always there."""

    training_bytes: int
    """Beside them while it trains."""

    mixing_bytes: int
    """Beside them while it mixes."""

    ending_bytes: int
    """Beside them in the last round."""

    library_bytes: int = 0
    """Code that is loaded only for a model of this kind."""

    spilled_bytes: int = 0
    """Beside all that in files, where neighbours' updates lie there."""

    @property
    def peak_bytes(self) -> int:
        """Bytes at the moment when it needs most."""
        return self.held_bytes + max(self.training_bytes, self.mixing_bytes, self.ending_bytes) + self.library_bytes + _OVERHEAD_BYTES

    @property
    def models(self) -> float:
        """Peak as a multiple of one model."""
        return self.peak_bytes / self.model_bytes

    @property
    def text(self) -> str:
        """Sentence for the log."""
        times = f", {self.models:.1f} times the {_mb(self.model_bytes)} MB of one" if self.model_bytes >= _WORTH_SAYING_BYTES else ""
        files = f" and {_mb(self.spilled_bytes)} MB of files" if self.spilled_bytes else ""
        return f"models need at most {_mb(self.peak_bytes)} MB{times}{files}; what the process and its rows take comes on top"


def forecast_node(plan: Plan, population: Population, num_neighbours: int, *, spill_mb: float | None = None) -> NodeMemory:
    """Count what a node with one row needs; the population is that row, at its start, and *spill_mb* is as in site.yaml."""
    algorithm, steps = plan.recipe.algorithm, plan.recipe.local_steps
    model_bytes, rounds = plan.layout.size_bytes, plan.experiment.rounds
    made_bytes = sum(tensor.nbytes for tensor in (*plan.model.parameters(), *plan.model.buffers()))
    state, optimizer_bytes = population.state, _bytes_of(population.optimizer_state.values())
    held_bytes = made_bytes + _bytes_of(state.values()) + optimizer_bytes + _bytes_of(population.buffers.values())

    posted_bytes = received_bytes = flow_bytes = value_bytes = fresh_bytes = packed_bytes = 0  # of the phase that has most
    in_state = _places(state.values())
    for phase in range(algorithm.phases):
        sent = population.outgoing(0, phase, local_steps=steps)
        travels = over_an_edge(algorithm.channels, sent)
        values = over_an_edge(algorithm.channels, sent, whole=True)
        per_edge = any(algorithm.channels[name].per_edge for name in sent)
        update_bytes = _bytes_of(travels.values())
        encoded = {channel.encodes for channel in algorithm.channels.values()}
        posted_bytes += update_bytes * (num_neighbours if per_edge else 1)
        received_bytes = max(received_bytes, update_bytes)
        # of one phase: over an edge one exchange at most is open
        flow_bytes = max(flow_bytes, sum(values[name].nbytes for name in values if algorithm.channels[name].missing == "own"))
        value_bytes += sum(values[name].nbytes for name in values if name in encoded)
        fresh = [tensor for tensor in sent.values() if tensor.untyped_storage().data_ptr() not in in_state]
        packed = update_bytes if len(travels) > 1 else 0  # several channels are copied side by side
        packed_bytes, fresh_bytes = max(packed_bytes, packed), max(fresh_bytes, _bytes_of(fresh) + packed)
    held_bytes += num_neighbours * value_bytes

    measured_bytes = num_neighbours * model_bytes if measures_neighbours(plan, population) else 0
    spilled_bytes = measured_bytes if is_kept_in_files(measured_bytes) else 0
    if is_spilled(received_bytes, num_neighbours, spill_mb):
        ahead = exchanges_ahead(plan) if plan.experiment.pace.kind.in_step else 1
        spilled_bytes = num_neighbours * received_bytes * (1 + ahead) + measured_bytes
        flow_bytes, received_bytes = 0 if algorithm.reads_once else flow_bytes, 0
    open_bytes = num_neighbours * max(flow_bytes, received_bytes)
    trains = bool(rounds and steps and population.trains)
    training_bytes = posted_bytes + open_bytes + (population.training_bytes if trains else 0)
    # its neighbours' values in place of what encodes them, what a rule makes new, and flows beside messages that must not be written over
    decoded_bytes = num_neighbours * value_bytes
    beside_bytes = 0 if algorithm.reads_once else num_neighbours * flow_bytes
    # packed_bytes: of the exchange before, until its flows are settled
    mixing_bytes = packed_bytes + fresh_bytes + num_neighbours * received_bytes + decoded_bytes + _bytes_of(state.values()) + beside_bytes
    ending_bytes = mixing_bytes + (0 if spilled_bytes else measured_bytes)
    return NodeMemory(
        model_bytes=model_bytes,
        held_bytes=held_bytes,
        training_bytes=training_bytes,
        mixing_bytes=mixing_bytes,
        ending_bytes=ending_bytes,
        library_bytes=_OPTIMIZERS_BYTES if trains and population.loads_optimizers else _COMPILED_BYTES if population.is_compiled else 0,
        spilled_bytes=spilled_bytes,
    )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f}"


def _places(tensors: Iterable[Tensor]) -> Mapping[int, int]:
    """Bytes by place in memory: a state may hold one tensor under several names."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(_places(tensors).values())
