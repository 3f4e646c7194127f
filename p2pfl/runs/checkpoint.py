"""Write and read checkpoints: tensors and metadata in one file, which is always the old one or the new one as a whole.

A checkpoint is one safetensors file; what is not a tensor is JSON in its metadata. The file is written here and not by the safetensors
library, which makes bytes of every tensor before it writes the first. Small ones that follow each other at once lie in the slots of a file
(slot_file.py), each of them such a file as bytes. Only its owner can read it, for it holds models; and the group of a folder that was set
up for one.
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from p2pfl.errors import StoreError
from p2pfl.runs.open_files import replacing
from p2pfl.runs.slot_file import CONTENT_AT_MOST_BYTES, SlotFile, read_slots

NODE_CHECKPOINT = "checkpoint.safetensors"
"""Name of a node's checkpoint in its state folder."""
_KEY = "p2pfl"
_REMEDY = "restore it from a backup, or remove it to start again"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the dtypes in a safetensors file."""

_ALIGNMENT_BYTES = 8
_SHARED = 0o2750
"""The mode of a folder whose files belong to its own group, which may read them."""


def mode_in(folder: Path) -> int:
    """Choose the mode of a private file: 0600, or 0640 in a folder of mode 2750, which its group may read."""
    return 0o640 if stat.S_IMODE(folder.stat().st_mode) == _SHARED else 0o600


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint durably: temporary name, fsync, rename, fsync of the folder.

    Raises:
        StoreError: the disk refused; the checkpoint that was there is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    with replacing(path, temporary, lambda: _opened(temporary)) as file:
        write_tensors(file, tensors, {_KEY: json.dumps(metadata)})


def _opened(path: Path) -> IO[bytes]:
    """Open a new private file to be written to, and make its folder."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # one that a killed process left may have another mode
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode_in(path.parent)), "wb")  # noqa: PTH123  # Path.open takes no mode


class CheckpointFile:
    """Writer of one checkpoint again and again: small ones into slots, in place, which is one wait for the disk instead of two."""

    def __init__(self, path: Path) -> None:
        self.path, self._slots = path, SlotFile(path, _opened)

    def writing(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Callable[[], None]:
        """Take a checkpoint; what is returned writes it durably, in any thread, as `write_checkpoint` does.

        A small one has been copied when this returns; the tensors of a large one must not change until it is written.
        """
        if sum(tensor.nbytes for tensor in tensors.values()) <= CONTENT_AT_MOST_BYTES:
            content = io.BytesIO()
            write_tensors(content, tensors, {_KEY: json.dumps(metadata)})
            if content.tell() <= CONTENT_AT_MOST_BYTES:
                return lambda: self._slots.write(content.getvalue())
        return lambda: self._write_large(tensors, metadata)

    def _write_large(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        self._slots.forget()
        write_checkpoint(self.path, tensors, metadata)


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors in the format of safetensors one by one; only those not contiguous or not on the CPU are copied."""
    # as the library orders them: the widest dtype first, so that every tensor is aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in names:
        tensor = tensors[name]
        size_bytes = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, start + size_bytes]}
        start += size_bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        if tensors[name].numel():
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read tensors and metadata; None where there is no checkpoint.

    Raises:
        StoreError: there is one and it cannot be read.
    """
    return _read(path, lambda file: {name: file.get_tensor(name) for name in file.keys()}, _tensors)  # noqa: SIM118  # not a dict


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Read the metadata of a checkpoint alone; None where there is no checkpoint.

    Raises:
        StoreError: there is one and it cannot be read.
    """
    found = _read(path, lambda _: {}, lambda _: {})
    return found[1] if found is not None else None


def _read(
    path: Path, tensors_of: Callable[[Any], dict[str, Tensor]], tensors_in: Callable[[bytes], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a checkpoint of either kind, its tensors from an open file of the library's or from bytes in a slot."""
    if not path.exists():
        return None
    try:
        content = read_slots(path)
        if content is not None:
            return tensors_in(content), _metadata(_header(content)["__metadata__"])
        with safe_open(path, framework="pt") as file:
            metadata = _metadata(file.metadata() or {})
            return tensors_of(file), metadata
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not a readable checkpoint: {error}; {_REMEDY}") from error


def _tensors(content: bytes) -> dict[str, Tensor]:
    """Tensors of a safetensors file, by name in alphabetical order, as an open file gives them."""
    return dict(sorted(load(content).items()))


def _header(content: bytes) -> dict[str, Any]:
    """The header of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def _metadata(texts: Mapping[str, str]) -> dict[str, Any]:
    metadata = json.loads(texts[_KEY])
    if not isinstance(metadata, dict):
        raise TypeError(f"{_KEY} is a {type(metadata).__name__}, expected a mapping")
    return metadata


@contextmanager
def changes_told(path: Path) -> Iterator[None]:
    """Raise a StoreError where a checkpoint can be read but lacks what the code inside the block needs.

    Raises:
        StoreError: somebody has changed the file, or it is of another version.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:  # the last from torch
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise StoreError(f"{path}: is not a checkpoint as p2pfl writes it for this run ({fault}); {_REMEDY}") from error
