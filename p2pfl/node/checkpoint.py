"""A node's checkpoint: everything that a later start needs to go on as if nothing had happened.

Beside the population's own tensors it holds those of its edges, as `protocol.snapshot` names them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from p2pfl.errors import ConfigError
from p2pfl.node.clock import LoopClock
from p2pfl.node.mixing import Mixing
from p2pfl.node.pairwise_mixing import PairwiseMixing
from p2pfl.node.round_log import RoundLog
from p2pfl.node.seconds import RunSeconds
from p2pfl.node.sending import Sending
from p2pfl.protocol.agreed_start import AgreedStart
from p2pfl.protocol.protocol import Protocol
from p2pfl.protocol.snapshot import restore, snapshot
from p2pfl.runs.checkpoint import changes_told, read_checkpoint, write_checkpoint
from p2pfl.runs.folder import RunFolder
from p2pfl.training import Population
from p2pfl.wire.link import Terms
from p2pfl.wire.update import UpdateFormat

CHECKPOINT = "checkpoint.safetensors"

Found = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and metadata of a checkpoint on the disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a node has come in the run."""

    round: int = 0
    phase: int = 0
    loss: float | None = None
    """Loss of the round's local steps; None before them, and where there are none."""
    joined: bool = False
    """Whether the node has just jumped: it mixes at once, and trains again from the next round on."""
    finished: bool = False


class NodeCheckpoint:
    """Everything of one node that a later start takes up; *pairwise* where nodes exchange in pairs."""

    def __init__(
        self,
        path: Path,
        terms: Terms,
        formats: Sequence[UpdateFormat],
        population: Population,
        protocol: Protocol,
        mixing: Mixing,
        pairwise: PairwiseMixing | None,
        agreed: AgreedStart,
        sending: Sending,
        rounds: RoundLog,
        seconds: RunSeconds,
        clock: LoopClock,
    ) -> None:
        self._path, self._terms, self._formats, self._population, self._protocol = path, terms, formats, population, protocol
        self._mixing, self._pairwise, self._agreed, self._sending = mixing, pairwise, agreed, sending
        self._rounds, self._seconds, self._clock = rounds, seconds, clock

    def prepare(self, place: Progress) -> tuple[Callable[..., None], Path, dict[str, Tensor], dict[str, Any]]:
        """Take what a checkpoint at some place holds; returns the function that writes it, and its arguments."""
        tensors = self._population.tensors() if self._pairwise is None else self._pairwise.tensors()
        edges, edge_tensors = snapshot(self._protocol)
        tensors |= edge_tensors | self._mixing.tensors()
        metadata = {
            **asdict(place),
            **self._mixing.metadata(),
            "started": self._agreed.company,
            "bytes_sent": self._sending.bytes_sent,
            "seconds": self._seconds.spent,
            "diverged": list(self._population.diverged),
            "protocol": edges,
            "merged": self._pairwise.merged if self._pairwise is not None else [],
            "terms": asdict(self._terms),
            "written": time.time(),
        }
        return write_checkpoint, self._path, tensors, metadata

    def read(self) -> Found | None:
        """Read what is on the disk; None where nothing is.

        Raises:
            ConfigError: it is of another study or model.
            StoreError: it cannot be read.
        """
        found = read_checkpoint(self._path)
        if found is not None and found[1].get("terms") != asdict(self._terms):
            folder = str(self._path.parent)
            raise ConfigError("holds the checkpoint of another study or model: choose another state folder for this one", folder)
        return found

    def truncate(self, folder: RunFolder, found: Found | None) -> None:
        """Cut off rows of rounds that will be run again."""
        with changes_told(self._path):
            if found is None or not found[1]["finished"]:
                folder.truncate(found[1]["round"] if found is not None else 0)

    def restore(self, found: Found) -> Progress:
        """Take up where a checkpoint was written."""
        with changes_told(self._path):
            return self._restore(*found)

    def _restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Progress:
        place = Progress(**{name: metadata[name] for name in ("round", "phase", "loss", "joined", "finished")})
        self._population.restore(tensors)
        # before there was an agreed start a checkpoint was written after the first exchange
        company = metadata.get("started", self._agreed.members)
        if company is not None:
            now_s = self._clock.now_s()
            self._agreed.start(company, now_s)
            self._protocol.deadlines.wait_at_start(now_s, self._agreed.within_s, self._agreed.agreement.grace_s)
        self._mixing.restore(tensors, metadata)
        self._population.mark_diverged(metadata["diverged"])
        self._sending.restore(metadata["bytes_sent"])
        self._seconds.restore(metadata["seconds"])
        self._rounds.restore(metadata["written"] if place.round else None)
        saved = metadata["protocol"]
        since_s = self._clock.now_s() - max(0.0, time.time() - metadata["written"])
        restore(self._protocol, saved, tensors, self._formats, since_s=since_s, place=self._path)
        self._protocol.edges.enter(place.round * self._protocol.edges.phases + place.phase)
        if self._pairwise is not None:
            self._pairwise.restore(metadata["merged"])
        return place
