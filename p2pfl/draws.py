"""Randomness as a pure function of (seed, node, round, step, purpose).

No generator here has a history: a crash resumes exactly, and any row's draw can be made anywhere, with the same bits on every device.

Shapes: N nodes, E epochs of a node's data stream, M rows at the largest site.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_BLOCK = 2**14  # keys at a time
_SMALL = 2**14  # words up to which numpy is quicker than torch

Words = NDArray[np.uint64]
Whole = NDArray[np.int64]
LastEpoch = list[Tensor]
"""Epochs (N,) in which some nodes' streams ended last, and their orders (N, M): the next steps need not draw them again. Empty at first."""


class Purpose(IntEnum):
    """Purpose of a draw; two purposes never have the same bits. The numbers are part of a run's identity: never reuse or renumber."""

    START = 1
    BATCH = 2
    MODEL = 3
    COMPRESSION = 4
    PARTNER = 5
    STRAGGLER = 6
    LOSS = 7
    CHURN = 8
    RESAMPLE = 9
    NOISE = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 with ten rounds: four words of 32 random bits for each counter.

    Args:
        counter: four int64 tensors that broadcast together, each value in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, each value in [0, 2**32).

    Source: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    words: list[Any] = list(counter)
    if is_small := sum(word.numel() for word in words) <= _SMALL and all(word.device.type == "cpu" for word in words):
        words = [np.atleast_1d(word.numpy()) for word in words]  # one dimension at least, as numpy's scalars do not wrap
    zeros = words[0] * 0 + words[1] * 0 + words[2] * 0 + words[3] * 0
    word_0, word_1, word_2, word_3 = (word + zeros for word in words)
    key_0, key_1 = key
    for _ in range(_NUM_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps exactly the bits that an unsigned product has
        product_0 = word_0 * _MULTIPLIERS[0]
        product_1 = word_2 * _MULTIPLIERS[1]
        word_0, word_1, word_2, word_3 = (
            ((product_1 >> 32) & _MASK) ^ word_1 ^ key_0,
            product_1 & _MASK,
            ((product_0 >> 32) & _MASK) ^ word_3 ^ key_1,
            product_0 & _MASK,
        )
        key_0 = (key_0 + _WEYL[0]) & _MASK
        key_1 = (key_1 + _WEYL[1]) & _MASK
    if is_small:
        shape = np.broadcast_shapes(*(tuple(word.shape) for word in counter))
        word_0, word_1, word_2, word_3 = (torch.from_numpy(word).reshape(shape) for word in (word_0, word_1, word_2, word_3))
    return word_0, word_1, word_2, word_3


def sort_keys(seed: int, purpose: Purpose, *, node: Tensor, round: Tensor, step: Tensor, index: Tensor) -> Tensor:
    """Uniform integers in [0, 2**63), int64, of the shape that node, round, step and index broadcast to."""
    word_0, word_1, _, _ = philox((index, step, round, node), (seed & _MASK, int(purpose)))
    return (word_0 << 31) | (word_1 >> 1)


def chances(seed: int, purpose: Purpose, *, node: Whole | int, round: Whole | int, index: Whole | int = 0) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64, of the shape that node, round and index broadcast to."""
    words = {"node": node, "round": round, "index": index, "step": 0}
    keys = sort_keys(seed, purpose, **{name: torch.as_tensor(word) for name, word in words.items()}).numpy()
    return np.asarray((keys >> 10) * 2.0**-53, dtype=np.float64)  # as many bits as the numbers have


def torch_seed(seed: int, purpose: Purpose, *, node: int = 0, round: int = 0, step: int = 0) -> int:
    """A seed for torch.manual_seed, for code that can only draw from torch's own generator."""
    scalars = {"node": torch.tensor(node), "round": torch.tensor(round), "step": torch.tensor(step)}
    return int(sort_keys(seed, purpose, index=torch.tensor(0), **scalars).item())


def shuffled(seed: int, purpose: Purpose, count: int, *, node: int, round: int) -> list[int]:
    """A keyed permutation of range(count)."""
    zeros = torch.zeros(count, dtype=torch.int64)
    keys = sort_keys(seed, purpose, node=zeros + node, round=zeros + round, step=zeros, index=torch.arange(count))
    order: list[int] = keys.argsort(stable=True).tolist()
    return order


def epoch_orders(seed: int, nodes_N: Tensor, sizes_N: Tensor, epochs_NE: Tensor) -> Tensor:
    """Keyed permutations of each node's rows, one for each epoch of its stream; all int64, nodes by their numbers in the roster.

    Returns:
        (N, E, M) int64, M the largest size; the first sizes_N[i] entries along the last axis are a permutation of range(sizes_N[i]), what
        follows is padding and never to be read.
    """
    if nodes_N.device.type == "cpu":
        return _epoch_orders_on_cpu(seed, nodes_N.numpy(), sizes_N.numpy(), epochs_NE.numpy())
    index_M = torch.arange(int(sizes_N.max()), device=nodes_N.device)
    keys_NEM = sort_keys(
        seed,
        Purpose.BATCH,
        node=nodes_N[:, None, None],
        round=epochs_NE[:, :, None],
        step=torch.zeros_like(epochs_NE)[:, :, None],
        index=index_M,
    )
    padding_NM = index_M >= sizes_N[:, None]
    keys_NEM = keys_NEM.masked_fill(padding_NM[:, None, :], torch.iinfo(torch.int64).max)
    return keys_NEM.argsort(dim=-1, stable=True)


def _epoch_orders_on_cpu(seed: int, nodes_N: Whole, sizes_N: Whole, epochs_NE: Whole) -> Tensor:
    """As `epoch_orders`, four times as fast: a block of keys at a time, in place, so that they stay in the cache."""
    num_rows, num_epochs, largest = len(nodes_N), epochs_NE.shape[1], int(sizes_N.max())
    index_M = np.arange(largest, dtype=np.uint64)
    orders_NEM = np.empty((num_rows, num_epochs, largest), dtype=np.int64)
    step = max(1, _BLOCK // max(largest, 1))
    flat_RM, epochs_R = orders_NEM.reshape(-1, largest), epochs_NE.reshape(-1)
    nodes_R, sizes_R = np.repeat(nodes_N, num_epochs), np.repeat(sizes_N, num_epochs)
    key = (seed & _MASK, int(Purpose.BATCH))
    for first in range(0, len(flat_RM), step):
        block = slice(first, first + step)
        keys_RM = _words_on_cpu(index_M, epochs_R[block, None].astype(np.uint64), nodes_R[block, None].astype(np.uint64), key)
        keys_RM[index_M >= sizes_R[block, None]] = np.iinfo(np.int64).max
        flat_RM[block] = np.argsort(keys_RM.view(np.int64), axis=-1, kind="stable")
    return torch.from_numpy(orders_NEM)


def _words_on_cpu(index: Words, round: Words, node: Words, key: tuple[int, int]) -> Words:
    """The keys of `sort_keys` at step 0, the same bits, of the shape that its arguments broadcast to."""
    shape = np.broadcast_shapes(index.shape, round.shape, node.shape)
    word_0, word_2, word_3 = (np.broadcast_to(word, shape).copy() for word in (index, round, node))
    word_1 = np.zeros(shape, dtype=np.uint64)
    mask, half, key_0, key_1 = np.uint64(_MASK), np.uint64(32), key[0], key[1]
    for _ in range(_NUM_ROUNDS):
        product_0 = word_0 * np.uint64(_MULTIPLIERS[0])
        product_1 = word_2 * np.uint64(_MULTIPLIERS[1])
        np.right_shift(product_1, half, out=word_0)
        word_0 ^= word_1
        word_0 ^= np.uint64(key_0)
        np.right_shift(product_0, half, out=word_2)
        word_2 ^= word_3
        word_2 ^= np.uint64(key_1)
        word_1, word_3 = np.bitwise_and(product_1, mask, out=product_1), np.bitwise_and(product_0, mask, out=product_0)
        key_0, key_1 = (key_0 + _WEYL[0]) & _MASK, (key_1 + _WEYL[1]) & _MASK
    return (word_0 << np.uint64(31)) | (word_1 >> np.uint64(1))


def _continued(seed: int, nodes_N: Tensor, sizes_N: Tensor, epochs_NE: Tensor, last: LastEpoch | None) -> Tensor:
    """As `epoch_orders`, with the first epoch from `last` where that is it, and what comes next left there."""
    if last and torch.equal(last[0], epochs_NE[:, 0]):
        before_N1M = last[1].long().unsqueeze(1)
        rest = epochs_NE[:, 1:]
        orders_NEM = torch.cat([before_N1M, epoch_orders(seed, nodes_N, sizes_N, rest)], dim=1) if rest.shape[1] else before_N1M
    else:
        orders_NEM = epoch_orders(seed, nodes_N, sizes_N, epochs_NE)
    if last is not None:
        small = torch.int16 if orders_NEM.shape[-1] < 2**15 else torch.int32
        last[:] = [epochs_NE[:, -1].clone(), orders_NEM[:, -1].to(small)]
    return orders_NEM


def batch_sizes(sizes_N: Tensor, batch_size: int | Literal["full"], *, repeating: bool = False) -> Tensor:
    """Rows in each node's batches, int64 (N,): no more than the node has; "full": all rows of a node.

    In files of schema 1 batches are *repeating*: of exactly `batch_size` rows, also at a node with fewer.
    """
    if batch_size == "full":
        return sizes_N.clone()
    return torch.full_like(sizes_N, batch_size) if repeating else sizes_N.clamp(max=batch_size)


def batch_positions(
    seed: int,
    nodes_N: Tensor,
    sizes_N: Tensor,
    first_step: int,
    num_steps: int,
    batch_size: int,
    last: LastEpoch | None = None,
    *,
    repeating: bool = False,
) -> Tensor:
    """Which rows each node trains on in steps [first_step, first_step + num_steps).

    A node's data stream is the concatenation of keyed permutations of its rows; step s, from the start of the run on, takes positions
    [s B, (s + 1) B), B the batch size of all these nodes, see `batch_sizes`. A batch that is all of a node's rows has them in their order.
    Where batches are *repeating*, as in files of schema 1, a node may have fewer than B rows, and B rows are a permutation. *last* is kept
    by the caller for the same nodes; it makes what follows the steps before quicker, and nothing else.

    Returns:
        (N, num_steps, B) int64 indices into each node's rows.

    Raises:
        ValueError: a node has fewer than B rows, and `repeating` is not set.
    """
    if not repeating and int(sizes_N.min()) < batch_size:
        raise ValueError(f"batch_size = {batch_size}: a node has {int(sizes_N.min())} rows; take batch_sizes() of each node")
    in_order = torch.arange(batch_size, device=nodes_N.device).expand(len(nodes_N), num_steps, batch_size)
    all_N = torch.zeros_like(sizes_N, dtype=torch.bool) if repeating else sizes_N == batch_size
    if bool(all_N.all()):
        return in_order
    first = first_step * batch_size
    stream_T = torch.arange(first, first + num_steps * batch_size, device=nodes_N.device)
    epoch_NT = stream_T // sizes_N[:, None]
    within_NT = stream_T % sizes_N[:, None]
    first_epoch_N1 = epoch_NT[:, :1]
    num_epochs = int((epoch_NT[:, -1:] - first_epoch_N1).max()) + 1
    epochs_NE = first_epoch_N1 + torch.arange(num_epochs, device=nodes_N.device)
    orders_NEM = _continued(seed, nodes_N, sizes_N, epochs_NE, last)
    flat = (epoch_NT - first_epoch_N1) * orders_NEM.shape[-1] + within_NT
    drawn = orders_NEM.flatten(1).gather(1, flat).reshape(len(nodes_N), num_steps, batch_size)
    return torch.where(all_N[:, None, None], in_order, drawn) if bool(all_N.any()) else drawn
