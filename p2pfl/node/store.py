"""A node's checkpoint: everything that a later start needs to go on as if nothing had happened.

Beside the population's own tensors it holds, as flat bytes or by channel: what this node last sent (sent/EXCHANGE/NEIGHBOUR, or
sent/EXCHANGE/* where all got the same) and what that led to where it continued something (whole/EXCHANGE/NEIGHBOUR/CHANNEL); the values
that it holds of each neighbour's encoded channels (value/NEIGHBOUR/CHANNEL); and what it took in over edges that are not settled
(flow/NEIGHBOUR/EXCHANGE/CHANNEL, back/NUMBER/NEIGHBOUR/EXCHANGE/CHANNEL); where nodes go at their own pace also what it holds of its
neighbours (newest/NEIGHBOUR/CHANNEL).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from p2pfl.errors import BadMessage, StoreError
from p2pfl.params import tensor_over
from p2pfl.protocol.ledger import EdgeLedger
from p2pfl.protocol.pace import Held
from p2pfl.protocol.protocol import Flow, Protocol, SentUpdates
from p2pfl.wire.messages import NO_STOP, NOTHING_CLOSED, Marks
from p2pfl.wire.update import EncodedUpdate, ReceivedUpdate, UpdateFormat, Whole

CHECKPOINT = "checkpoint.safetensors"

_ALL = "*"
"""In place of a receiver's name: all got the same."""

_Sent = TypeVar("_Sent", EncodedUpdate, Whole)


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
    protocol: Protocol, formats: Sequence[UpdateFormat], tensors: Mapping[str, Tensor], story: Mapping[str, Any], place: Path
) -> None:
    """Take up what `edge_tensors` and `Protocol.story` gave.

    Raises:
        StoreError: the checkpoint is of another study, or of a version before updates continued each other.
    """
    if "marks" not in story:
        raise StoreError(f"{place}: was written by an earlier version of p2pfl: go on with that one, or choose another state folder")
    if set(story["ledgers"]) != set(protocol.neighbours):
        raise StoreError(f"{place}: belongs to another study: its neighbours are {', '.join(story['ledgers'])}")
    protocol.exchange, protocol.agreed_for = story["exchange"], story["agreed_for"]
    protocol.stop_round, protocol.closing = story["stop_round"], story["closing"]
    protocol.agreements = dict(map(tuple, story.get("agreements", [])))
    _restore_what_is_remembered(protocol, story)
    held = _tree(tensors)

    for name, exchanges in held.get("flow", {}).items():
        for exchange, amounts in exchanges.items():
            protocol.flows[name, int(exchange)] = Flow(exchange=int(exchange), amounts=amounts)
    for number in sorted(held.get("back", {}), key=int):
        for name, exchanges in held["back"][number].items():
            for exchange, amounts in exchanges.items():
                protocol.taken_back.append((protocol.neighbours[name], Flow(exchange=int(exchange), amounts=amounts)))
    protocol.marks = _from_hex(story["marks"])
    for name, neighbour in protocol.neighbours.items():
        neighbour.values, neighbour.marks = dict(held.get("value", {}).get(name, {})), _from_hex(story["held"][name])
    _restore_newest(protocol, story["newest"], held)
    _restore_sent(protocol, formats, held, story["sent"], place)


def _restore_what_is_remembered(protocol: Protocol, story: Mapping[str, Any]) -> None:
    """What has been told and heard; a checkpoint of an earlier version does not hold all of it."""
    protocol.anew = story.get("anew", 0)
    for name, ledger in story["ledgers"].items():
        neighbour = protocol.neighbours[name]
        neighbour.ledger, neighbour.state_lost = EdgeLedger.from_dict(ledger), story.get("state_lost", {}).get(name, "")


def _restore_newest(protocol: Protocol, story: Mapping[str, tuple[int, int]], held: Mapping[str, Any]) -> None:
    """What it held of its neighbours, where nodes do not wait for each other."""
    for name, (number, age) in story.items():
        if protocol.newest is None:
            raise ValueError(f"holds what {name} sent, as only nodes at their own pace do")
        arrays = {channel: tensor.numpy() for channel, tensor in held["newest"][name].items()}
        received = ReceivedUpdate(exchange=number, arrays=arrays, report=NOTHING_CLOSED, stop=NO_STOP)
        protocol.newest.held[name] = Held(number=number, update=received, age=age)


def _restore_sent(
    protocol: Protocol, formats: Sequence[UpdateFormat], held: Mapping[str, Any], story: Mapping[str, Any], place: Path
) -> None:
    for exchange, posted in story.items():
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
