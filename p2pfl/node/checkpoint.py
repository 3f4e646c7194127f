"""A node's checkpoint: everything that a later start needs to go on as if nothing had happened.

Beside the population's own tensors it holds those of its edges, as `protocol.snapshot` names them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from p2pfl.errors import ConfigError
from p2pfl.node.node import Node, Progress
from p2pfl.protocol.snapshot import FLOWS, restore, snapshot
from p2pfl.runs.checkpoint import NODE_CHECKPOINT, changes_told, read_checkpoint
from p2pfl.runs.open_files import sync_file

CHECKPOINT = NODE_CHECKPOINT
_PLACE = tuple(each.name for each in fields(Progress))

Found = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and metadata of a checkpoint on the disk."""


async def keep(node: Node) -> None:
    """Write a node's checkpoint; only then may its neighbours be told what it contains.

    It is written after every exchange, whatever `checkpoint_every` says: the next update tells of this one, and what has been told must
    be there after a crash.
    """
    began_s = node.clock.now_s()
    tensors, metadata = _content(node)
    await node.log.write(node.file.writing(tensors, metadata))
    node.protocol.edges.checkpointed(metadata["protocol"]["ledgers"])
    node.spend("checkpoint", began_s)


def _content(node: Node) -> Found:
    edges, edge_tensors = snapshot(node.protocol)
    tensors, place = node.population.tensors() if node.pairwise is None else node.pairwise.tensors(), node.place
    return tensors | edge_tensors | node.mixing.tensors(), {
        **{name: getattr(place, name) for name in _PLACE},
        **node.mixing.metadata(),
        "started": node.agreed.company,
        "bytes_sent": node.sending.bytes_sent,
        "seconds": node.seconds.spent,
        "diverged": list(node.population.diverged),
        "protocol": edges,
        "merged": node.pairwise.merged if node.pairwise is not None else [],
        "terms": node.saved_terms,
        "written": time.time(),
    }


def read(node: Node) -> Found | None:
    """Read the checkpoint that a node left on the disk; None where there is none.

    Raises:
        ConfigError: it is of another study or model.
        StoreError: it cannot be read.
    """
    found = read_checkpoint(node.state / CHECKPOINT)
    if found is not None:
        sync_file(node.state / CHECKPOINT)  # what it says will be told to neighbours
    if found is not None and found[1].get("terms") != node.saved_terms:
        raise ConfigError("holds the checkpoint of another study or model: choose another state folder for this one", str(node.state))
    return found


def take_up(node: Node, found: Found | None) -> None:
    """Go where a checkpoint was written, or to the beginning, and cut off rows of rounds that will be run again."""
    with changes_told(node.state / CHECKPOINT):
        if found is None or not found[1]["finished"]:
            node.log.folder.truncate(found[1]["round"] if found is not None else 0)
        if found is not None:
            _restore(node, *found)


def _restore(node: Node, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    place = {name: metadata[name] for name in _PLACE}
    if node.room.spills:
        tensors = {**tensors, **node.room.copy({name: tensor for name, tensor in tensors.items() if name.startswith(FLOWS)})}
    node.population.restore(tensors)
    # before there was an agreed start a checkpoint was written after the first exchange
    company = metadata.get("started", node.agreed.members)
    if company is not None:
        node.start_with(company)
    node.mixing.restore(tensors, metadata)
    node.population.mark_diverged(metadata["diverged"])
    node.sending.restore(metadata["bytes_sent"])
    node.seconds.restore(metadata["seconds"])
    node.rounds.restore(metadata["written"] if place["round"] else None)
    since_s = node.clock.now_s() - max(0.0, time.time() - metadata["written"])
    restore(node.protocol, metadata["protocol"], tensors, node.formats, since_s=since_s, place=node.state / CHECKPOINT)
    node.protocol.edges.enter(place["round"] * node.protocol.edges.phases + place["phase"])
    if node.pairwise is not None:
        node.pairwise.restore(metadata["merged"])
    node.move(**place)
