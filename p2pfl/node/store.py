"""A node's checkpoint: everything that a later start needs to go on as if nothing had happened.

Beside the population's own tensors it holds, as flat bytes or by channel: what this node last sent (sent/EXCHANGE/NEIGHBOUR, or
sent/EXCHANGE/* where all got the same), and for flows that are not settled what it sent (own/EXCHANGE/CHANNEL, or where nodes meet in pairs
own/EXCHANGE NEIGHBOUR/CHANNEL) and what came
(flow/NEIGHBOUR/EXCHANGE/CHANNEL, back/NUMBER/NEIGHBOUR/EXCHANGE/CHANNEL); where nodes go at their own pace also what it holds of its
neighbours (newest/NEIGHBOUR/CHANNEL).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2pfl.errors import BadMessage, StoreError
from p2pfl.node.protocol import HALF, Flow, Protocol
from p2pfl.wire.ledger import EdgeLedger
from p2pfl.wire.messages import NO_STOP, NOTHING_CLOSED
from p2pfl.wire.newest import Held
from p2pfl.wire.update import Arrived, Parcel, UpdateFormat

CHECKPOINT = "checkpoint.safetensors"

_ALL = "*"
"""In place of a receiver's name: all got the same."""


def edge_tensors(protocol: Protocol) -> dict[str, Tensor]:
    """What the edges have open, and what may be asked for again."""
    flows = {f"flow/{name}": held for (name, _), held in protocol.flows.items()}
    flows |= {f"back/{i}/{neighbour.name}": held for i, (neighbour, held) in enumerate(protocol.taken_back)}
    tensors: dict[str, Tensor] = {}
    for place, held in flows.items():
        tensors |= {f"{place}/{held.exchange}/{channel}": tensor for channel, tensor in held.theirs.items()}
        own = _own(protocol, place.rpartition("/")[2], str(held.exchange))
        tensors |= {f"own/{own}/{channel}": tensor for channel, tensor in held.own.items()}
    for name, arrived in (protocol.newest.held if protocol.newest is not None else {}).items():
        tensors |= {f"newest/{name}/{channel}": torch.from_numpy(np.array(array)) for channel, array in arrived.payload.arrays.items()}
    for exchange, (parcels, _) in protocol.sent.items() if protocol.meetings is None else ():
        different = {id(parcel): parcel for parcel in parcels.values()}
        to = {_ALL: next(iter(different.values()))} if len(different) == 1 else parcels
        for name, parcel in to.items():
            tensors[f"sent/{exchange}/{name}"] = torch.frombuffer(bytearray(parcel.payload), dtype=torch.uint8)
    return tensors


def restore_edges(
    protocol: Protocol, formats: Sequence[UpdateFormat], tensors: Mapping[str, Tensor], story: Mapping[str, Any], place: Path
) -> None:
    """Take up what `edge_tensors` and `Protocol.story` gave.

    Raises:
        StoreError: the checkpoint is of another study.
    """
    if set(story["ledgers"]) != set(protocol.neighbours):
        raise StoreError(f"{place}: belongs to another study: its neighbours are {', '.join(story['ledgers'])}")
    protocol.exchange, protocol.agreed_for = story["exchange"], story["agreed_for"]
    protocol.stop_round, protocol.closing = story["stop_round"], story["closing"]
    for name, ledger in story["ledgers"].items():
        protocol.neighbours[name].ledger = EdgeLedger.from_dict(ledger)
    held = _tree(tensors)

    def flow(name: str, exchange: str, theirs: Mapping[str, Tensor]) -> Flow:
        weight = HALF if protocol.meetings is not None else protocol.links(int(exchange) // protocol.phases).weights[name]
        return Flow(exchange=int(exchange), weight=weight, own=held["own"][_own(protocol, name, exchange)], theirs=theirs)

    for name, exchanges in held.get("flow", {}).items():
        for exchange, theirs in exchanges.items():
            protocol.flows[name, int(exchange)] = flow(name, exchange, theirs)
    for number in sorted(held.get("back", {}), key=int):
        for name, exchanges in held["back"][number].items():
            for exchange, theirs in exchanges.items():
                protocol.taken_back.append((protocol.neighbours[name], flow(name, exchange, theirs)))
    _restore_newest(protocol, story["newest"], held)
    for exchange, agreed_for in story["sent"].items():
        parcels = _parcels(protocol, formats, int(exchange), held.get("sent", {}).get(exchange, {}), place)
        protocol.sent[int(exchange)] = (parcels, agreed_for)


def _own(protocol: Protocol, name: str, exchange: str) -> str:
    """Where what this node sent in an exchange is kept: it is the same for all neighbours, unless nodes meet in pairs."""
    return exchange if protocol.meetings is None else f"{exchange} {name}"


def _restore_newest(protocol: Protocol, story: Mapping[str, tuple[int, int]], held: Mapping[str, Any]) -> None:
    """What it held of its neighbours, where nodes do not wait for each other."""
    for name, (number, age) in story.items():
        assert protocol.newest is not None
        arrays = {channel: tensor.numpy() for channel, tensor in held["newest"][name].items()}
        arrived = Arrived(exchange=number, arrays=arrays, report=NOTHING_CLOSED, stop=NO_STOP)
        protocol.newest.held[name] = Held(number=number, payload=arrived, age=age)


def _parcels(
    protocol: Protocol, formats: Sequence[UpdateFormat], exchange: int, payloads: Mapping[str, Tensor], place: Path
) -> dict[str, Parcel]:
    """What was sent in an exchange, by receiver."""
    update_format = formats[exchange % protocol.phases]
    try:
        parcels = {name: update_format.pack(exchange, update_format.unpack(payload.numpy().copy())) for name, payload in payloads.items()}
    except BadMessage as error:
        raise StoreError(f"{place}: what this node sent in exchange {exchange} is damaged: {error}") from error
    if _ALL in parcels:
        return dict.fromkeys(sorted(protocol.links(exchange // protocol.phases).receivers), parcels[_ALL])
    return parcels


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
