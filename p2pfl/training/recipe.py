"""The recipe by which a population learns, and the model that all nodes start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from p2pfl.algorithms import Aggregator, Algorithm, InboxFactory
from p2pfl.algorithms.aggregators import WeightedMean
from p2pfl.draws import Purpose, batch_sizes, torch_seed
from p2pfl.errors import TaskError
from p2pfl.params import Layout
from p2pfl.privacy import Mechanism
from p2pfl.tasks import Task
from p2pfl.tasks.calling import described, users_code
from p2pfl.training.optimizers import OptimizerSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a population learns: what the experiment says, without when it ends."""

    algorithm: Algorithm
    optimizer: OptimizerSpec
    batch_size: int | Literal["full"]
    """The most examples in a batch; a site with fewer rows takes each of them once. "full": all rows of every site."""
    rounds: int
    """Training rounds, for the learning rate's schedule."""
    local_steps: int
    seed: int
    repeats_rows: bool = False
    """Whether batches have exactly `batch_size` rows, also at a site with fewer, as in files of schema 1."""
    compiled: bool = False
    """Whether local steps are those of compiled loops, which round otherwise than torch."""
    aggregator: Aggregator = field(default_factory=WeightedMean)
    """How messages are mixed."""
    mechanism: Mechanism | None = None
    """How gradients of single examples become one; None: local steps need none of single examples."""

    @property
    def inboxes(self) -> InboxFactory:
        """The factory of every inbox that the algorithm is given."""
        return InboxFactory(channels=self.algorithm.channels, aggregator=self.aggregator)

    @property
    def mixes_in_place(self) -> bool:
        """Whether an exchange makes of all rows x <- W x and nothing else."""
        return self.algorithm.plain_gossip and self.aggregator.sums_flows

    def batch_sizes(self, sizes_N: Tensor) -> Tensor:
        """Rows in each site's batches, int64 (N,), from the numbers of its training rows."""
        return batch_sizes(sizes_N, self.batch_size, repeating=self.repeats_rows)


def build_model(task: Task, dtype: torch.dtype, seed: int) -> nn.Module:
    """Make the task's model with the start of every node, under the experiment's seed.

    Raises:
        TaskError: it cannot be made, or its parameters are none that can be exchanged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, Purpose.START))
        with users_code(task.name, "model"):
            model: object = task.model()
    fault = None
    if not isinstance(model, nn.Module):
        fault = f"it returned {described(model)}: expected a torch.nn.Module"
    elif any(is_lazy(parameter) for parameter in (*model.parameters(), *model.buffers())):
        fault = "it has lazy layers: expected layers that are told their input's size"
    elif complex_ones := [name for name, parameter in model.named_parameters() if parameter.is_complex()]:
        fault = f"parameter {complex_ones[0]} is complex: expected a floating dtype"
    else:
        model = model.to(dtype)
        try:
            Layout.of(model)
        except ValueError as error:
            fault = str(error)
        else:
            return model
    raise TaskError(fault, task=task.name, function="model")
