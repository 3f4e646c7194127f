"""The recipe by which a population learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from p2pfl.algorithms import Aggregator, Algorithm, InboxFactory
from p2pfl.algorithms.aggregators import WeightedMean
from p2pfl.privacy import Mechanism
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
