"""Participation in one round: which nodes are there, which of them train, and whose messages reach whom.

Shapes: N nodes, M rows of this rank, K neighbour slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.errors import ConfigError
from p2pfl.simulator.events.clock import RoundClock, RoundTimes
from p2pfl.simulator.exchange import Exchange
from p2pfl.simulator.sharding.shard import Shard
from p2pfl.simulator.tables import Tables


@dataclass(frozen=True, kw_only=True, slots=True)
class Participation:
    """Nodes that take part in one round, and messages that reach them."""

    tables: Tables
    times: RoundTimes | None
    """Times of the round, where there is a clock."""
    running_N: Tensor
    """bool, nodes that have not stopped."""
    there_N: Tensor | None
    """bool, nodes that send; None: all."""
    active_M: Tensor | None
    """bool, rows that merge; None: all."""
    trains_M: Tensor | None
    """bool, rows that train; None: all."""
    delivered: list[Tensor]
    """By phase, bool (N, K): whose messages reach their receivers."""
    both_NK: Tensor
    """bool, whether neither end of the slot has stopped."""
    skipped_NK: NDArray[np.bool_]
    """Neighbours whose message of any phase does not count."""

    def compared(self, phase: int) -> NDArray[np.bool_]:
        """Whether each node has compared its model with that of any neighbour in a phase, (N,)."""
        compared_N: NDArray[np.bool_] = (self.tables.linked_NK & self.both_NK & self.delivered[phase]).any(dim=1).cpu().numpy()
        return compared_N


def participation(
    number: int, *, local_steps: int, phases: int, running: NDArray[np.bool_], exchange: Exchange, clock: RoundClock | None, shard: Shard
) -> Participation:
    """Find out who of the `running` nodes takes part in the next round: the exchange knows scripted faults, a clock who is late.

    Raises:
        ConfigError: messages come too late, and rows are shared by ranks, which keep no account of what the other side did not take in.
    """
    tables = exchange.tables.at(number)
    running_N = torch.from_numpy(running).to(tables.index_NK.device)
    times = clock.round(number, local_steps=local_steps, running_N=running) if clock is not None else None
    there_N, trains_N, came = exchange.active(number), None, None
    if times is not None and not times.is_whole:
        there_N, trains_N = (torch.from_numpy(mask_N).to(running_N.device) for mask_N in (times.active_N, times.trains_N))
        there_N, came = there_N | ~running_N, times.came
    active_N = there_N
    if not running.all():
        active_N = running_N if active_N is None else active_N & running_N
    delivered = [exchange.delivered(number, came_E) for came_E in came or (None,) * phases]
    both_NK = running_N[:, None] & running_N[tables.index_NK]
    skipped_NK = tables.linked_NK & ~(torch.stack(delivered).all(dim=0) & both_NK)
    if times is not None and not shard.is_all and (num_late := int((skipped_NK & both_NK).sum())):
        raise ConfigError(
            f"clock: in round {number} the deadline is over for {num_late} messages, which {shard.ranks.count} ranks cannot take back; "
            "go on with --resume in one process, without torchrun, or start again with a higher clock.deadline_floor_s"
        )
    active_M = shard.local(active_N) if active_N is not None else None
    return Participation(
        tables=tables,
        times=times,
        running_N=running_N,
        there_N=there_N,
        active_M=active_M,
        trains_M=shard.local(trains_N) if trains_N is not None else active_M,
        delivered=delivered,
        both_NK=both_NK,
        skipped_NK=skipped_NK.cpu().numpy(),
    )
