"""Tensors and their story on disk, in one file that is either the old one or the new one, never something between.

A checkpoint is one safetensors file; what is not a tensor is JSON in its metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from p2pfl.errors import StoreError

_KEY = "p2pfl"


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], story: Mapping[str, Any]) -> None:
    """Write durably: to a temporary name, fsync, rename, fsync of the folder.

    Raises:
        StoreError: the disk refused; the checkpoint that was there is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # clones: a rule may hold one tensor under two names, which safetensors refuses
        whole = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        content = save(whole, {_KEY: json.dumps(story)})
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error}") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and the story; None where there is no checkpoint.

    Raises:
        StoreError: there is one and it cannot be read.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            story = json.loads((file.metadata() or {})[_KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, story  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StoreError(f"{path}: not a readable checkpoint: {error}; restore it from a backup, or remove it to start again") from error
