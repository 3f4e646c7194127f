"""Snapshots of a protocol for a checkpoint: each part says and takes up its own.

Tensors are named by slashes: sent/EXCHANGE/NEIGHBOUR, or sent/EXCHANGE/* where all got the same, are encoded updates as flat bytes;
whole/EXCHANGE/NEIGHBOUR/CHANNEL the full updates beside them; value/NEIGHBOUR/CHANNEL the values of a neighbour's encoded channels;
flow/NEIGHBOUR/EXCHANGE/CHANNEL and back/NUMBER/NEIGHBOUR/EXCHANGE/CHANNEL what edges have open; newest/NEIGHBOUR/CHANNEL what was held of
neighbours at an asynchronous pace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from p2pfl.errors import StoreError
from p2pfl.paces import Chosen
from p2pfl.params import tensor_over
from p2pfl.protocol.protocol import Protocol
from p2pfl.wire.messages import NO_STOP, NOTHING_CLOSED
from p2pfl.wire.update import ReceivedUpdate, UpdateFormat

FLOWS = ("flow/", "back/")
"""Beginnings of the names of what edges have open."""


def snapshot(protocol: Protocol) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gather metadata and tensors of all parts."""
    kept = protocol.pace.kept()
    metadata: dict[str, Any] = {"newest": {name: [held.number, held.age] for name, held in kept.items()}}
    newest = {name: protocol.neighbours[name].session.kept(held.number) for name, held in kept.items()}
    tensors: dict[str, Any] = {
        f"newest/{name}/{channel}": tensor_over(array) for name, received in newest.items() for channel, array in received.arrays.items()
    }
    for said, holds in (protocol.edges.snapshot(), protocol.transfers.snapshot(), protocol.values.snapshot()):
        metadata, tensors = metadata | said, tensors | holds
    metadata |= protocol.stopping.snapshot() | protocol.claims.snapshot() | protocol.deadlines.snapshot() | protocol.states.snapshot()
    return metadata, tensors


def restore(
    protocol: Protocol,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    formats: Sequence[UpdateFormat],
    *,
    since_s: float,
    place: Path,
) -> None:
    """Take up what `snapshot` gave; *since_s*: when it was taken, on this process's clock.

    Raises:
        StoreError: the checkpoint is of another study, or of a version before updates continued each other.
    """
    if "marks" not in metadata:
        raise StoreError(f"{place}: was written by an earlier version of p2pfl: go on with that one, or choose another state folder")
    if set(metadata["ledgers"]) != set(protocol.neighbours):
        raise StoreError(f"{place}: belongs to another study: its neighbours are {', '.join(metadata['ledgers'])}")
    tree = _tree(tensors)
    protocol.edges.restore(metadata, tree)
    protocol.transfers.restore(metadata, tree, formats, place)
    protocol.values.restore(metadata, tree)
    protocol.stopping.restore(metadata)
    protocol.states.restore(metadata)
    protocol.claims.restore(metadata["in_step"], since_s)
    protocol.deadlines.restore(metadata["recent_s"], since_s)
    protocol.pace.restore({name: Chosen(number=number, age=age) for name, (number, age) in metadata["newest"].items()})
    for name, (number, _) in metadata["newest"].items():
        arrays = {channel: tensor.numpy() for channel, tensor in tree["newest"][name].items()}
        received = ReceivedUpdate(exchange=number, arrays=arrays, report=NOTHING_CLOSED, stop=NO_STOP)
        protocol.neighbours[name].session.keep(received)


def _tree(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Names with slashes as nested mappings."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, leaf = name.split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = tensor
    return tree
