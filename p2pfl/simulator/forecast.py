"""Forecast of a simulation's cost: memory by counting, seconds by trying a few rows, and whether compiled loops are worth their loading.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from p2pfl.algorithms import Context
from p2pfl.errors import ConfigError
from p2pfl.experiment.plan import Plan
from p2pfl.params import parameters_of
from p2pfl.runs.stopwatch import rss_bytes
from p2pfl.simulator.mixer import WORTH, mixing_is_worth_it
from p2pfl.simulator.mixing import block_columns, mix_in_place
from p2pfl.tasks import SiteTable

_SAMPLE_BYTES = 32 * 1024**2  # of parameters that are tried
_RESERVE_BYTES = 256 * 1024**2  # for the interpreter's own, records and chunks at work
_MEMINFO = Path("/proc/meminfo")
_LARGE = 2000  # parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Memory that a simulation needs, and what this machine has."""

    state_bytes: int
    """Bytes of the algorithm, the models included."""
    optimizer_bytes: int
    working_bytes: int
    """Bytes that an exchange needs beside them."""
    data_bytes: int
    """Bytes of rows that will be made beside those that are here."""
    peak_bytes: int
    """Bytes of the process, with what it holds already."""
    available_bytes: int | None
    """Bytes that the machine could give it; None where it does not say."""
    seconds: float | None = None
    """Training and mixing, of the most rounds that there can be."""

    @property
    def fits(self) -> bool:
        """Whether this machine has that much memory."""
        return self.available_bytes is None or self.peak_bytes <= self.available_bytes


def forecast_memory(plan: Plan, num_ranks: int = 1, ranks_here: int = 1) -> Forecast:
    """Forecast the most memory that a simulation of this plan will hold; checkpoints apart.

    Args:
        plan: of the simulation.
        num_ranks: that share the rows; said is then what the first one holds, which writes everybody's models.
        ranks_here: so many of them on this machine, and each can have that part of its memory.
    """
    num_nodes = -(-len(plan.names) // num_ranks)
    algorithm, (x_2P, ctx) = plan.recipe.algorithm, _two_rows(plan)
    state = algorithm.init(x_2P, ctx)
    state_bytes = num_nodes * _bytes_a_row(state)
    optimizer_bytes = num_nodes * _bytes_a_row(plan.recipe.optimizer.init(x_2P))
    model_bytes = num_nodes * plan.layout.size_bytes
    clock = plan.experiment.clock
    is_plain = plan.recipe.mixes_in_place and plan.time_varying_bound(plan.names[:1]) is None
    if is_plain and (clock is None or not clock.drops):
        working_bytes = num_nodes * block_columns(num_nodes, plan.layout.size, plan.layout.dtype.itemsize) * plan.layout.dtype.itemsize
    else:  # what is sent and what is made of it, while the state is still there
        sent = algorithm.outgoing(state, 0, ctx)
        sent_bytes = num_nodes * _bytes_a_row({name: tensor for name, tensor in sent.items() if tensor is not state.get(name)})
        working_bytes = sent_bytes + state_bytes + model_bytes
    if num_ranks > 1:
        # others' rows, at most as many as the own; at the end everybody's models
        working_bytes = max(working_bytes + model_bytes, len(plan.names) * plan.layout.size_bytes)
    sites = plan.task.sites
    data_bytes = 0 if isinstance(sites, SiteTable) else sum(rows.nbytes for site in sites if site.train for rows in site.train)
    data_bytes //= num_ranks
    now_bytes, free_bytes = rss_bytes(), _available_bytes()
    if free_bytes is not None:
        free_bytes //= ranks_here
    needed_bytes = state_bytes + optimizer_bytes + working_bytes + data_bytes + _RESERVE_BYTES
    return Forecast(
        state_bytes=state_bytes,
        optimizer_bytes=optimizer_bytes,
        working_bytes=working_bytes,
        data_bytes=data_bytes,
        peak_bytes=now_bytes + needed_bytes,
        available_bytes=None if free_bytes is None else now_bytes + free_bytes,
    )


def forecast_seconds(plan: Plan, threads: int) -> float:
    """Forecast the seconds of training and mixing in all rounds, from one round of some rows."""
    num_nodes = len(plan.names)
    rows = min(num_nodes, max(2, 16 * threads, min(_SAMPLE_BYTES // plan.layout.size_bytes, 4096 * threads)))
    sample = plan.population(plan.names[:rows])
    sample.use_threads(threads)
    if plan.recipe.compiled or training_is_worth_it(plan):
        sample.compile()
    spent = {"train": math.inf, "mix": math.inf}
    index_NK, weights_NK = _some_neighbours(plan, rows)
    all_NK = torch.ones_like(index_NK, dtype=torch.bool)
    for number in range(2):  # the first warms up
        began = time.perf_counter()
        sample.train(number, in_place=True)
        trained = time.perf_counter()
        mix_in_place(sample.state["x"], index_NK, weights_NK, all_NK, threads=threads, compiled=mixing_is_worth_it(plan))
        spent = {"train": min(spent["train"], trained - began), "mix": min(spent["mix"], time.perf_counter() - trained)}
    experiment = plan.experiment
    mixing_only = experiment.last_possible_round - experiment.rounds
    return num_nodes / rows * (experiment.rounds * (spent["train"] + spent["mix"]) + mixing_only * spent["mix"])


def training_is_worth_it(plan: Plan) -> bool:
    """Whether compiled training is faster, by the parameters of all steps of a run that an earlier version began."""
    if plan.experiment.schema != 1 or plan.experiment.compiled != "auto":
        return False
    num_steps = len(plan.names) * plan.recipe.local_steps * plan.experiment.rounds
    return plan.layout.size >= _LARGE and num_steps * plan.layout.size >= WORTH


def refuse_what_does_not_fit(plan: Plan, num_ranks: int = 1, ranks_here: int = 1) -> None:
    """Refuse a simulation that does not fit into this machine.

    Raises:
        ConfigError: it does not; with both numbers and what would help.
    """
    found = forecast_memory(plan, num_ranks, ranks_here)
    if found.fits:
        return
    assert found.available_bytes is not None
    smaller = "dtype: float32 halves that; " if plan.layout.dtype is torch.float64 else ""
    raise ConfigError(
        f"nodes = {len(plan.names)}: {_gib(found.peak_bytes)} GiB would be needed, {_gib(found.available_bytes)} GiB are there "
        f"({_gib(found.state_bytes)} for models and state, {_gib(found.optimizer_bytes)} for the optimiser, {_gib(found.working_bytes)} to "
        f"exchange, {_gib(found.data_bytes)} for data); {smaller}fewer nodes, or several machines: torchrun -m p2pfl simulate"
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.1f}"


def _two_rows(plan: Plan) -> tuple[Tensor, Context]:
    """Models of two nodes and the context that a rule has in the first round, without the nodes' data."""
    x_2P, recipe = parameters_of(plan.model).repeat(2, 1), plan.recipe
    return x_2P, Context(
        round=0,
        local_steps=recipe.local_steps,
        lr=recipe.optimizer.lr_at(0, recipe.rounds),
        seed=recipe.seed,
        nodes_N=torch.arange(2),
        layout=plan.layout,
        slots_NK=plan.slots(range(2)),
    )


def _bytes_a_row(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes // len(tensor) for tensor in tensors.values())


def _some_neighbours(plan: Plan, rows: int) -> tuple[Tensor, Tensor]:
    """Make neighbours of a sample: as many as the network's nodes have on average, with small weights."""
    degree = max(1, round(len(plan.topology.senders) / plan.topology.num_nodes))
    index_NK = (torch.arange(rows)[:, None] + 1 + torch.arange(degree)) % rows
    return index_NK, torch.full((rows, degree), 1 / (degree + 1), dtype=plan.layout.dtype)


def _available_bytes() -> int | None:
    """Memory that this machine can give to a process; None where it does not say so as Linux does."""
    if not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
