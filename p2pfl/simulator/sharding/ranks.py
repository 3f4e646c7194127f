"""Ranks: the processes that share one simulation, as torchrun starts them, and their collectives.

Between two of them messages are tensors sent and received by name, so that whoever fails can be named. Small things go as JSON.

Shapes: N nodes, C columns.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist

from p2pfl.errors import ConfigError, TransportError

DEADLINE_S = 600.0
"""So long a rank that is there may let the others wait: it may be writing a checkpoint."""

_GO_ON = "continue the run from its checkpoint with --resume, on any number of ranks"


@dataclass(kw_only=True)
class PendingTransfers:
    """Messages between ranks that are on their way."""

    rank: int
    """Rank of this process."""
    sends: list[tuple[int | None, Any, Tensor]] = field(default_factory=list)
    """To whom (None: several), the handle, and the buffer, which must live as long."""
    receives: list[tuple[int | None, Any]] = field(default_factory=list)

    def arrived(self) -> None:
        """Wait until everything that others send is here.

        Raises:
            TransportError: a rank has ended, or has been silent for too long.
        """
        while self.receives:
            peer, work = self.receives.pop()
            with _of_rank(self.rank, peer):
                work.wait()

    def done(self) -> None:
        """Wait until the own messages have been taken over as well."""
        self.arrived()
        while self.sends:
            peer, work, _ = self.sends.pop()
            with _of_rank(self.rank, peer):
                work.wait()


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Processes that share one simulation; a single one needs no process group."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this one writes what the simulation leaves."""
        return self.rank == 0

    @property
    def others(self) -> list[int]:
        """Every rank but this one."""
        return [peer for peer in range(self.count) if peer != self.rank]

    def post(self, sends: Mapping[int, Sequence[Tensor]], receives: Mapping[int, Sequence[Tensor]]) -> PendingTransfers:
        """Start messages to and from other ranks; between two of them they pair up in their order.

        Args:
            sends: by receiver; contiguous, and not to be changed before `PendingTransfers.done`.
            receives: by sender; filled once `PendingTransfers.arrived`.
        """
        transfers = PendingTransfers(rank=self.rank)
        if self.device.type == "cuda":
            self._post_together(transfers, sends, receives)
            return transfers
        for peer in self.others:
            with _of_rank(self.rank, peer):
                for tag, tensor in enumerate(sends.get(peer, ())):
                    transfers.sends.append((peer, dist.isend(_bytes_of(tensor), peer, tag=tag), tensor))
                for tag, tensor in enumerate(receives.get(peer, ())):
                    transfers.receives.append((peer, dist.irecv(_bytes_of(tensor), peer, tag=tag)))
        return transfers

    def _post_together(
        self, transfers: PendingTransfers, sends: Mapping[int, Sequence[Tensor]], receives: Mapping[int, Sequence[Tensor]]
    ) -> None:
        """Start all messages as one: NCCL's have no tags, and would wait for each other."""
        outward = [(peer, tensor) for peer in self.others for tensor in sends.get(peer, ())]
        inward = [(peer, tensor) for peer in self.others for tensor in receives.get(peer, ())]
        operations = [dist.P2POp(dist.isend, tensor, peer) for peer, tensor in outward]
        operations += [dist.P2POp(dist.irecv, tensor, peer) for peer, tensor in inward]
        if operations:
            with _of_rank(self.rank, None):
                works = dist.batch_isend_irecv(operations)
            transfers.receives += [(None, work) for work in works]
            transfers.sends += [(None, works[-1], tensor) for _, tensor in outward]

    def all_gather(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Gather a tensor of every rank at all of them, on the CPU; `sizes` are their numbers of rows."""
        found = [own.new_empty((size, *own.shape[1:])) for size in sizes]
        found[self.rank] = own
        self._on_cpu().post({peer: [own] for peer in self.others}, {peer: [found[peer]] for peer in self.others}).done()
        return found

    def gather(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor] | None:
        """Gather a tensor of every rank at the first one, on the CPU; None at the others."""
        own = own.detach().cpu().contiguous()
        if not self.is_first:
            self._on_cpu().post({0: [own]}, {}).done()
            return None
        found = [own, *(own.new_empty((size, *own.shape[1:])) for size in sizes[1:])]
        self._on_cpu().post({}, {peer: [found[peer]] for peer in self.others}).done()
        return found

    def scatter(self, parts: Sequence[Tensor] | None, own: Tensor) -> Tensor:
        """Give each rank one of the first rank's tensors; `own` is filled with it."""
        if parts is not None:
            self._on_cpu().post({peer: [parts[peer].contiguous()] for peer in self.others}, {}).done()
            return parts[0]
        self._on_cpu().post({}, {0: [own]}).done()
        return own

    def all_gather_object(self, fact: Any) -> list[Any]:
        """Gather an object of every rank, anything that JSON can hold, at all of them."""
        if self.count == 1:
            return [fact]
        text = torch.frombuffer(bytearray(json.dumps(fact).encode()), dtype=torch.uint8)
        sizes = torch.cat(self.all_gather(torch.tensor([len(text)]), [1] * self.count)).tolist()
        return [json.loads(part.numpy().tobytes()) for part in self.all_gather(text, sizes)]

    def broadcast_object(self, fact: Any) -> Any:
        """Give every rank the object of the first one."""
        return self.all_gather_object(fact if self.is_first else None)[0]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks."""
        if self.count > 1:
            values = values.clone()
            with _of_rank(self.rank, None):
                dist.all_reduce(values)
        return values

    def _on_cpu(self) -> Ranks:
        return Ranks(rank=self.rank, count=self.count)


def started() -> tuple[int, int]:
    """Rank of this process and number of ranks, as torchrun says; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def ranks_here() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined(device: torch.device | str) -> Iterator[Ranks]:
    """Join the ranks that torchrun has started; this process alone without torchrun.

    Args:
        device: where each computes; "cuda" is a device of its own for each rank of a machine.

    Raises:
        ConfigError: there are no torch.distributed or not as many devices.
        TransportError: in the block, where another rank has failed.
    """
    rank, count = started()
    if count == 1:
        yield Ranks(device=torch.device(device))
        return
    if not dist.is_available():
        raise ConfigError("this build of torch has no torch.distributed; start one process, without torchrun")
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if place.index is None else place
        torch.cuda.set_device(place)
    with _told_to_end(rank):
        if not dist.is_initialized():
            with _of_rank(rank, None):
                dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=timedelta(seconds=DEADLINE_S))
            atexit.register(dist.destroy_process_group)  # not sooner: a second group would meet what the first has left in torchrun's store
        yield Ranks(rank=rank, count=count, device=place)


@contextmanager
def _told_to_end(rank: int) -> Iterator[None]:
    """Turn SIGTERM, which torchrun sends where a rank has failed, into an error with a sentence."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> NoReturn:
        raise TransportError(f"rank {rank} was told to end, as all are where one has failed: torchrun's report says which; {_GO_ON}")

    before: Callable[[int, FrameType | None], Any] | int | None = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bytes_of(tensor: Tensor) -> Tensor:
    """View a tensor's memory as bytes: gloo does not know every dtype."""
    return tensor.detach().view(-1).view(torch.uint8)


@contextmanager
def _of_rank(rank: int, peer: int | None) -> Iterator[None]:
    """Translate an error of torch.distributed into a sentence that names the missing rank."""
    try:
        yield
    except RuntimeError as error:
        who = f"rank {peer}" if peer is not None else "another rank"
        line = str(error).splitlines()[0]
        raise TransportError(f"rank {rank}: {who} has ended, or has been silent for {DEADLINE_S:.0f} s ({line}); {_GO_ON}") from error
