"""A node's checkpoint: everything that a later start needs to go on as if nothing had happened.

Beside the population's own tensors it holds, as flat bytes or by channel: what this node last sent (sent/EXCHANGE/NEIGHBOUR, or
sent/EXCHANGE/* where all got the same) and what that led to where it continued something (whole/EXCHANGE/NEIGHBOUR/CHANNEL); the values
that it holds of each neighbour's encoded channels (value/NEIGHBOUR/CHANNEL); and what it took in over edges that are not settled
(flow/NEIGHBOUR/EXCHANGE/CHANNEL, back/NUMBER/NEIGHBOUR/EXCHANGE/CHANNEL); where nodes go at their own pace also what it holds of its
neighbours (newest/NEIGHBOUR/CHANNEL).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from p2pfl.errors import BadMessage, ConfigError, StoreError
from p2pfl.node.clock import LoopClock
from p2pfl.node.mixing import Mixing
from p2pfl.node.pairwise_mixing import PairwiseMixing
from p2pfl.node.round_log import RoundLog
from p2pfl.node.seconds import RunSeconds
from p2pfl.node.sending import Sending
from p2pfl.params import tensor_over
from p2pfl.protocol.agreed_start import AgreedStart
from p2pfl.protocol.ledger import EdgeLedger
from p2pfl.protocol.pace import Held
from p2pfl.protocol.protocol import Flow, Protocol, SentUpdates
from p2pfl.runs.checkpoint import changes_told, read_checkpoint, write_checkpoint
from p2pfl.runs.folder import RunFolder
from p2pfl.training import Population
from p2pfl.wire.link import Terms
from p2pfl.wire.messages import NO_STOP, NOTHING_CLOSED, Marks
from p2pfl.wire.update import EncodedUpdate, ReceivedUpdate, UpdateFormat, Whole

CHECKPOINT = "checkpoint.safetensors"

_ALL = "*"
"""In place of a receiver's name: all got the same."""

_Sent = TypeVar("_Sent", EncodedUpdate, Whole)

Found = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and metadata of a checkpoint on the disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a node has come in the run."""

    round: int = 0
    phase: int = 0
    loss: float | None = None
    """Of the round's local steps; None before them, and where there are none."""
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
        tensors |= edge_tensors(self._protocol) | self._mixing.tensors()
        metadata = {
            **asdict(place),
            **self._mixing.metadata(),
            "started": self._agreed.company,
            "bytes_sent": self._sending.bytes_sent,
            "seconds": self._seconds.spent,
            "diverged": list(self._population.diverged),
            "protocol": self._protocol.metadata(),
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
            self._protocol.wait_longer_at_start(now_s, self._agreed.within_s, self._agreed.agreement.grace_s)
        self._mixing.restore(tensors, metadata)
        self._population.diverged = tuple(metadata["diverged"])
        self._sending.restore(metadata["bytes_sent"])
        self._seconds.restore(metadata["seconds"])
        self._rounds.restore(metadata["written"] if place.round else None)
        saved = metadata["protocol"]
        restore_edges(self._protocol, self._formats, tensors, saved, self._path)
        self._protocol.exchange = place.round * self._protocol.phases + place.phase
        if self._pairwise is not None:
            self._pairwise.restore(metadata["merged"])
        since_s = self._clock.now_s() - max(0.0, time.time() - metadata["written"])
        self._protocol.restore_pace(saved["in_step"], saved["recent_s"], since_s)
        return place


def edge_tensors(protocol: Protocol) -> dict[str, Tensor]:
    """What the edges have open, and what may be asked for again."""
    flows = {f"flow/{name}": held for (name, _), held in protocol.flows.items()}
    flows |= {f"back/{i}/{neighbour.name}": held for i, (neighbour, held) in enumerate(protocol.taken_back)}
    tensors: dict[str, Tensor] = {}
    for place, held in flows.items():
        tensors |= {f"{place}/{held.exchange}/{channel}": tensor for channel, tensor in held.amounts.items()}
    for name, received in (protocol.newest.held if protocol.newest is not None else {}).items():
        tensors |= {f"newest/{name}/{channel}": tensor_over(array) for channel, array in received.update.arrays.items()}
    for name, neighbour in protocol.neighbours.items():
        tensors |= {f"value/{name}/{channel}": value for channel, value in neighbour.values.items()}
    for exchange, posted in protocol.sent.items() if protocol.meetings is None else ():
        for to, encoded in _by_receiver(posted.updates).items():
            tensors[f"sent/{exchange}/{to}"] = tensor_over(np.frombuffer(encoded.payload, dtype=np.uint8))
        for to, whole in _by_receiver(posted.wholes).items():
            tensors |= {f"whole/{exchange}/{to}/{channel}": torch.from_numpy(array) for channel, array in whole.arrays.items()}
    return tensors


def restore_edges(
    protocol: Protocol, formats: Sequence[UpdateFormat], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], place: Path
) -> None:
    """Take up what `edge_tensors` and `Protocol.metadata` gave.

    Raises:
        StoreError: the checkpoint is of another study, or of a version before updates continued each other.
    """
    if "marks" not in metadata:
        raise StoreError(f"{place}: was written by an earlier version of p2pfl: go on with that one, or choose another state folder")
    if set(metadata["ledgers"]) != set(protocol.neighbours):
        raise StoreError(f"{place}: belongs to another study: its neighbours are {', '.join(metadata['ledgers'])}")
    protocol.exchange, protocol.agreed_for = metadata["exchange"], metadata["agreed_for"]
    protocol.stop_round, protocol.closing = metadata["stop_round"], metadata["closing"]
    protocol.agreements = dict(map(tuple, metadata.get("agreements", [])))
    _restore_what_is_remembered(protocol, metadata)
    held = _tree(tensors)

    for name, exchanges in held.get("flow", {}).items():
        for exchange, amounts in exchanges.items():
            protocol.flows[name, int(exchange)] = Flow(exchange=int(exchange), amounts=amounts)
    for number in sorted(held.get("back", {}), key=int):
        for name, exchanges in held["back"][number].items():
            for exchange, amounts in exchanges.items():
                protocol.taken_back.append((protocol.neighbours[name], Flow(exchange=int(exchange), amounts=amounts)))
    protocol.marks = _from_hex(metadata["marks"])
    for name, neighbour in protocol.neighbours.items():
        neighbour.values, neighbour.marks = dict(held.get("value", {}).get(name, {})), _from_hex(metadata["held"][name])
    _restore_newest(protocol, metadata["newest"], held)
    _restore_sent(protocol, formats, held, metadata["sent"], place)


def _restore_what_is_remembered(protocol: Protocol, metadata: Mapping[str, Any]) -> None:
    """What has been told and heard; a checkpoint of an earlier version does not hold all of it."""
    protocol.anew = metadata.get("anew", 0)
    for name, ledger in metadata["ledgers"].items():
        neighbour = protocol.neighbours[name]
        neighbour.ledger, neighbour.state_lost = EdgeLedger.from_dict(ledger), metadata.get("state_lost", {}).get(name, "")


def _restore_newest(protocol: Protocol, metadata: Mapping[str, tuple[int, int]], held: Mapping[str, Any]) -> None:
    """What it held of its neighbours, where nodes do not wait for each other."""
    for name, (number, age) in metadata.items():
        if protocol.newest is None:
            raise ValueError(f"holds what {name} sent, as only nodes at their own pace do")
        arrays = {channel: tensor.numpy() for channel, tensor in held["newest"][name].items()}
        received = ReceivedUpdate(exchange=number, arrays=arrays, report=NOTHING_CLOSED, stop=NO_STOP)
        protocol.newest.held[name] = Held(number=number, update=received, age=age)


def _restore_sent(
    protocol: Protocol, formats: Sequence[UpdateFormat], held: Mapping[str, Any], metadata: Mapping[str, Any], place: Path
) -> None:
    for exchange, posted in metadata.items():
        update_format = formats[int(exchange) % protocol.phases]
        after, mark = [mark and bytes.fromhex(mark) for mark in posted["marks"] or (None, None)]
        marks = None if mark is None else (after, mark)
        receivers = sorted(protocol.links(int(exchange) // protocol.phases).receivers)
        updates = {
            to: _encoded(update_format, int(exchange), payload, marks, place)
            for to, payload in held.get("sent", {}).get(exchange, {}).items()
        }
        wholes = {}
        if update_format.whole is not None and mark is not None:
            for to, tensors_of in held.get("whole", {}).get(exchange, {}).items():
                arrays = {channel: tensor.numpy() for channel, tensor in tensors_of.items()}
                wholes[to] = Whole(update_format.whole, int(exchange), arrays, mark)
        protocol.sent[int(exchange)] = SentUpdates(
            updates=_to_each(receivers, updates), wholes=_to_each(receivers, wholes), agreed_for=posted["agreed_for"], mark=mark
        )


def _encoded(update_format: UpdateFormat, exchange: int, payload: Tensor, marks: Marks | None, place: Path) -> EncodedUpdate:
    """What was sent, from its bytes."""
    try:
        return update_format.pack(exchange, update_format.unpack(payload.numpy()), marks)
    except BadMessage as error:
        raise StoreError(f"{place}: what this node sent in exchange {exchange} is damaged: {error}") from error


def _by_receiver(sent: Mapping[str, _Sent]) -> Mapping[str, _Sent]:
    """One for each receiver, or one for all of them where they got the same."""
    different = {id(each): each for each in sent.values()}
    return {_ALL: next(iter(different.values()))} if len(different) == 1 else sent


def _to_each(receivers: Sequence[str], sent: Mapping[str, _Sent]) -> Mapping[str, _Sent]:
    """The other way round."""
    return dict.fromkeys(receivers, sent[_ALL]) if _ALL in sent else sent


def _from_hex(marks: Mapping[str, str]) -> dict[int, bytes]:
    return {int(phase): bytes.fromhex(mark) for phase, mark in marks.items()}


def _tree(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Names with slashes as nested mappings."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, leaf = name.split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = tensor
    return tree
