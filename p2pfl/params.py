"""A model's parameters as one flat vector, and the layout that says which slice is which tensor.

Shapes: P parameters; any leading axes, usually N nodes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model."""

    name: str
    """As in ``nn.Module.named_parameters``."""

    shape: tuple[int, ...]

    dtype: str
    """Without torch's prefix: "float32"."""

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Which tensors a model has, in which order they lie in the flat vector.

    Only parameters are in it. Buffers (BatchNorm's running statistics, counters) stay at the node that computed them and never travel.
    """

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """The layout of a model's parameters.

        Raises:
            ValueError: the model has no parameters, they are not all of one floating dtype; the message names the tensor.
        """
        specs = tuple(
            TensorSpec(name=name, shape=tuple(p.shape), dtype=str(p.dtype).removeprefix("torch.")) for name, p in model.named_parameters()
        )
        if not specs:
            raise ValueError("the model has no parameters: there is nothing to learn or to exchange")
        for (name, p), spec in zip(model.named_parameters(), specs, strict=True):
            if not p.dtype.is_floating_point:
                raise ValueError(f"parameter {name} has dtype {spec.dtype}: expected a floating dtype")
            if spec.dtype != specs[0].dtype:
                raise ValueError(
                    f"parameter {name} has dtype {spec.dtype}, {specs[0].name} has {specs[0].dtype}: expected one dtype for all"
                )
        return cls(tensors=specs)

    @cached_property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(spec.size for spec in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every tensor, and so of the flat vector."""
        dtype = getattr(torch, self.tensors[0].dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of one flat vector."""
        return self.size * self.dtype.itemsize

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and dtypes in order, as 64 hexadecimal digits."""
        canonical = json.dumps([[spec.name, list(spec.shape), spec.dtype] for spec in self.tensors], separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def slices(self) -> Iterator[tuple[TensorSpec, slice]]:
        """Each tensor with its place in the flat vector."""
        start = 0
        for spec in self.tensors:
            yield spec, slice(start, start + spec.size)
            start += spec.size

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The named tensors inside a flat vector (..., P): views, not copies, each (..., *shape)."""
        if flat.shape[-1] != self.size:
            raise ValueError(f"a vector of {flat.shape[-1]} parameters: this layout has {self.size}")
        return {
            spec.name: flat[..., place].view(*flat.shape[:-1], *spec.shape) if spec.shape else flat[..., place.start]
            for spec, place in self.slices()
        }

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One flat vector (..., P) from named tensors (..., *shape), the leading axes the same for all."""
        parts = []
        for spec in self.tensors:
            if spec.name not in tensors:
                raise ValueError(f"tensor {spec.name} is missing: expected {len(self.tensors)} tensors")
            tensor = tensors[spec.name]
            num_leading = tensor.dim() - len(spec.shape)
            if num_leading < 0 or tuple(tensor.shape[num_leading:]) != spec.shape:
                raise ValueError(f"tensor {spec.name} has shape {tuple(tensor.shape)}: expected (..., {', '.join(map(str, spec.shape))})")
            parts.append(tensor.reshape(*tensor.shape[:num_leading], spec.size))
        return torch.cat(parts, dim=-1)

    def first_difference(self, other: Layout) -> str | None:
        """What the first tensor is in which the other layout differs, as a sentence; None where they are the same."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=False):
            if mine != theirs:
                return f"{_describe(mine)} here, {_describe(theirs)} there"
        if len(self.tensors) != len(other.tensors):
            longer, where = (self, "here") if len(self.tensors) > len(other.tensors) else (other, "there")
            extra = longer.tensors[min(len(self.tensors), len(other.tensors))]
            return f"{_describe(extra)} only {where}"
        return None


def parameters_of(model: nn.Module) -> Tensor:
    """A model's parameters as a new flat vector (P,), detached."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def load_parameters(model: nn.Module, flat: Tensor) -> None:
    """Copy a flat vector (P,) into a model's parameters, in place."""
    views = Layout.of(model).views(flat.detach())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(views[name])


def digest_of(flat: Tensor) -> str:
    """SHA-256 of a vector's bytes, little-endian, as 64 hexadecimal digits."""
    array = flat.detach().cpu().contiguous().numpy()
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()).hexdigest()


def _describe(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype}{list(spec.shape)}"
