"""Foretell how much memory a node needs, before it needs it.

Counted are tensors as large as a model, of the moments at which there are most of them: while the node trains, while it mixes, and in the
last round, in which neighbours' models are measured. What its algorithm and its exchanges take is counted on a small model
(exchange_memory.py). With M bytes of a model, plain SGD on written-out layers and algorithm dpsgd a node with K neighbours holds

    always              the model that the task made, and the parameters as they are now                    2 M
    while it trains     what it sent last, K flows that may have to be rolled back, the parameters moved    (2 + K) M
    while it mixes      K received models, whose places the flows take, and the mean                        (1 + K) M
    in the last round   K copies of received models, to be measured, K flows, and the mean                  (1 + 2 K) M

so that the most is 3 + 2 K models where neighbours' models are measured at the end. It is 4 + K where they are not, and where the copies
are large, for then these lie in files. A neighbour's next update may come in before this node has mixed its last one: it lies in a file as
well, so that nothing is added. Gradients of layers that are not written out are there twice for a moment.

Where all updates lie in files (`spill_mb`), so do the flows that take their places and the models to be measured: K counts as 0 above, and
the most is 4 models. The files then take K models, K more for each exchange that a neighbour may be ahead, and K more in the last round.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pfl.evaluation.cross_site import measures_neighbours
from p2pfl.experiment.plan import Plan
from p2pfl.node.exchange_memory import bytes_of, exchange_memory
from p2pfl.node.mixing import update_formats
from p2pfl.node.own_edges import exchanges_ahead
from p2pfl.node.spill import early_in_files, is_kept_in_files, is_spilled
from p2pfl.training import Population
from p2pfl.wire.codec import CHUNK_BYTES
from p2pfl.wire.update import largest_update_bytes

_OVERHEAD_BYTES = 32 * 2**20
"""Bytes that torch and Python take for themselves while they work; measured."""

_LINK_BYTES = 4 * CHUNK_BYTES
"""Bytes of one link's messages on their way in and out, where an update is as large; measured where nothing is read for a while."""

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
    """The model as it was made, and the state of the optimiser: always there."""

    training_bytes: int
    """Beside that while it trains, the algorithm's state included, as in the following."""

    mixing_bytes: int
    """Beside that while it mixes."""

    ending_bytes: int
    """Beside that in the last round."""

    links_bytes: int = 0
    """Messages on their way in and out."""

    library_bytes: int = 0
    """Code that is loaded only for a model of this kind."""

    spilled_bytes: int = 0
    """Beside all that in files, where neighbours' updates lie there."""

    @property
    def peak_bytes(self) -> int:
        """Bytes at the moment when it needs most."""
        most_bytes = max(self.training_bytes, self.mixing_bytes, self.ending_bytes)
        return self.held_bytes + most_bytes + self.links_bytes + self.library_bytes + _OVERHEAD_BYTES

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
    model_bytes, rounds, pace = plan.layout.size_bytes, plan.experiment.rounds, plan.experiment.pace.kind
    update_bytes = largest_update_bytes(update_formats(algorithm, population))
    in_files = is_spilled(update_bytes, num_neighbours, spill_mb)
    exchanges = exchange_memory(plan, num_neighbours, in_files=in_files)
    optimizer_bytes = bytes_of(population.optimizer_state.values())
    made_bytes = sum(tensor.nbytes for tensor in (*plan.model.parameters(), *plan.model.buffers()))
    held_bytes = made_bytes + optimizer_bytes + bytes_of(population.buffers.values())

    is_measured = algorithm.model_channel is not None and measures_neighbours(plan, population)
    measured_bytes = num_neighbours * plan.layout.shared_bytes if is_measured else 0
    spilled_bytes = measured_bytes if in_files or is_kept_in_files(measured_bytes) else 0
    ending_bytes = exchanges.mixing_bytes + (0 if spilled_bytes else measured_bytes)
    ahead = exchanges_ahead(plan) if pace.in_step else 1
    if in_files:
        spilled_bytes += num_neighbours * update_bytes * (1 + ahead)
    elif pace.in_step and early_in_files(update_bytes, num_neighbours):
        spilled_bytes += num_neighbours * update_bytes * ahead
    training_bytes = exchanges.training_bytes
    if rounds and steps and population.trains:
        local_bytes = exchanges.training_bytes + population.training_bytes(exchanges.estimate_bytes)
        training_bytes = max(local_bytes, exchanges.adapting_bytes + optimizer_bytes)
    return NodeMemory(
        model_bytes=model_bytes,
        held_bytes=held_bytes,
        training_bytes=training_bytes,
        mixing_bytes=exchanges.mixing_bytes,
        ending_bytes=ending_bytes,
        links_bytes=num_neighbours * min(update_bytes, _LINK_BYTES),
        library_bytes=_library_bytes(population) if rounds and steps else 0,
        spilled_bytes=spilled_bytes,
    )


def _library_bytes(population: Population) -> int:
    """Bytes of code that is loaded to train a model of this kind."""
    if population.loads_optimizers:
        return _OPTIMIZERS_BYTES
    return _COMPILED_BYTES if population.is_compiled else 0


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f}"
