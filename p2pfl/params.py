"""A model's parameters as one flat vector, and the layout that says which slice is which tensor.

Shapes: P parameters; any leading axes, usually N nodes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model."""

    name: str
    """As in ``nn.Module.named_parameters``."""
    shape: tuple[int, ...]

    dtype: str
    """Without torch's prefix: "float32"."""
    values: str | None = None
    """SHA-256 of the values of a frozen tensor, where somebody has computed it; None for a tensor that trains."""

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Which tensors a model has, in which order they lie in the flat vector.

    Only parameters that require a gradient are in the vector; one of several modules is there once. Frozen parameters stay as the
    model was made with them. Buffers (BatchNorm's running statistics, counters) stay at the node that computed them and never travel.
    """

    tensors: tuple[TensorSpec, ...]

    frozen: tuple[TensorSpec, ...] = ()
    """Parameters that do not require a gradient: no training moves them, and they never travel."""
    personal: tuple[str, ...] = ()
    """Names of tensors in the vector that stay at their node, in the vector's order."""

    @classmethod
    def of(cls, model: nn.Module, *, personal: Sequence[str] = (), with_values: bool = False) -> Layout:
        """Describe a model's parameters.

        Args:
            model: with its start.
            personal: patterns, as in a shell, of names of parameters that stay at their node.
            with_values: compute digests of the frozen parameters' values, for comparison with other nodes.

        Raises:
            ValueError: there is nothing to learn, the trained parameters are not all of one floating dtype, or a pattern names none of
                them; the message names the tensor.
        """
        specs = tuple(_spec(name, p) for name, p in model.named_parameters() if p.requires_grad)
        frozen = tuple(
            replace(_spec(name, p), values=digest_of(p)) if with_values else _spec(name, p)
            for name, p in model.named_parameters()
            if not p.requires_grad
        )
        if not specs and frozen:
            raise ValueError("none of the model's parameters requires a gradient: there is nothing to learn or to exchange")
        if not specs:
            raise ValueError("the model has no parameters: there is nothing to learn or to exchange")
        for spec in specs:
            if not getattr(torch, spec.dtype).is_floating_point:
                raise ValueError(f"parameter {spec.name} has dtype {spec.dtype}: expected a floating dtype")
            if spec.dtype != specs[0].dtype:
                raise ValueError(
                    f"parameter {spec.name} has dtype {spec.dtype}, {specs[0].name} has {specs[0].dtype}: expected one dtype for all"
                )
        return cls(tensors=specs, frozen=frozen, personal=_personal(personal, specs, frozen))

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

    @property
    def shared_bytes(self) -> int:
        """Bytes of the part of one flat vector that travels."""
        return sum(spec.size for spec in self.tensors if spec.name not in self.personal) * self.dtype.itemsize

    def part(self, *, personal: bool) -> tuple[Layout, tuple[slice, ...]]:
        """Describe the personal tensors, or those that travel, as a vector of their own; with its places in the whole one, in order."""
        chosen = [(spec, place) for spec, place in self.slices() if (spec.name in self.personal) == personal]
        places: list[slice] = []
        for _, place in chosen:
            if places and places[-1].stop == place.start:
                places[-1] = slice(places[-1].start, place.stop)
            else:
                places.append(place)
        return Layout(tensors=tuple(spec for spec, _ in chosen)), tuple(places)

    def shared_of(self, flat: Tensor) -> Tensor:
        """The coordinates that travel, (..., S), of flat vectors (..., P); a view where they lie side by side."""
        if not self.personal:
            return flat
        _, places = self.part(personal=False)
        return taken(flat, places)

    def table(self) -> list[dict[str, Any]]:
        """Rows of plain values: name, shape, dtype, whether the tensor trains and travels, and the digest of frozen values if known."""
        rows: list[dict[str, Any]] = []
        for spec, trains in [*((spec, True) for spec in self.tensors), *((spec, False) for spec in self.frozen)]:
            row = {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype, "trains": trains}
            row["travels"] = trains and spec.name not in self.personal
            rows.append(row | ({"values": spec.values} if spec.values is not None else {}))
        return rows

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and dtypes in order, frozen and personal ones included, as 64 hexadecimal digits."""
        content: Any = [[spec.name, list(spec.shape), spec.dtype] for spec in self.tensors]
        if self.frozen or self.personal:  # where everything trains and travels the digest is as it always was
            frozen = [[spec.name, list(spec.shape), spec.dtype, spec.values] for spec in self.frozen]
            content = {"tensors": content, "frozen": frozen, "personal": list(self.personal)}
        canonical = json.dumps(content, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def slices(self) -> list[tuple[TensorSpec, slice]]:
        """Each tensor with its place in the flat vector."""
        stops = accumulate(spec.size for spec in self.tensors)
        return [(spec, slice(stop - spec.size, stop)) for spec, stop in zip(self.tensors, stops, strict=True)]

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


def parameters_of(model: nn.Module) -> Tensor:
    """A model's parameters that require a gradient as a new flat vector (P,), detached."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def sharing_parameters(model: nn.Module) -> nn.Module:
    """A copy of a model with buffers of its own, and parameters that lie where the model's lie: calling it needs no second model."""
    same = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters() if type(p) is nn.Parameter}
    return copy.deepcopy(model, dict[int, Any](same))


def frozen_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters that do not require a gradient, by name, detached."""
    return {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}


def taken(flat: Tensor, places: Sequence[slice]) -> Tensor:
    """Some places of flat vectors (..., P), side by side; a view where there is one place."""
    return flat[..., places[0]] if len(places) == 1 else torch.cat([flat[..., place] for place in places], dim=-1)


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Tensor) -> object:
    """Call a model with other parameters and buffers than its own, each in every place where the model uses it.

    The model's own tensors are not changed; the others are given by the first of their names. torch's own tying of weights restores a
    module that stands in several places of a model wrongly.
    """
    everywhere = dict(tensors)
    first_name: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for kind in (module._parameters, module._buffers):  # noqa: SLF001  # named_parameters names each module and tensor once
            for key, tensor in kind.items():
                if tensor is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    first = first_name.setdefault(id(tensor), name)
                    if first in tensors:
                        everywhere[name] = tensors[first]
    result: object = functional_call(model, everywhere, (inputs,), tie_weights=False)
    return result


def load_parameters(model: nn.Module, flat: Tensor) -> None:
    """Copy a flat vector (P,) into a model's parameters, in place."""
    views = Layout.of(model).views(flat.detach())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in views:
                parameter.copy_(views[name])


def digest_of(*parts: Tensor) -> str:
    """SHA-256 of the bytes of one vector in any number of parts, little-endian, as 64 hexadecimal digits; nothing is copied."""
    found = hashlib.sha256()
    for part in parts:
        found.update(bytes_of(part))
    return found.hexdigest()


def bytes_of(vector: Tensor) -> memoryview:
    """The bytes of a vector's numbers, little-endian, one behind the other; without a copy where it lies in one piece on the CPU."""
    there = vector.detach().cpu().contiguous().reshape(-1)
    array = (there.view(torch.int16) if there.dtype is torch.bfloat16 else there).numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def _spec(name: str, parameter: Tensor) -> TensorSpec:
    return TensorSpec(name=name, shape=tuple(parameter.shape), dtype=str(parameter.dtype).removeprefix("torch."))


def _personal(patterns: Sequence[str], specs: Sequence[TensorSpec], frozen: Sequence[TensorSpec]) -> tuple[str, ...]:
    """Names that some pattern matches; ValueError where a pattern matches none, or all match."""
    names = [spec.name for spec in specs]
    known = f"the trained parameters are {', '.join(names)}"
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            only = (
                "only frozen parameters, which never travel" if any(fnmatchcase(spec.name, pattern) for spec in frozen) else "no parameter"
            )
            raise ValueError(f"personal: {pattern!r} matches {only}; {known}")
    found = tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
    if len(found) == len(names):
        raise ValueError(f"personal: {list(patterns)} matches every trained parameter, so that nothing would travel; {known}")
    return found


def tensor_over(array: np.ndarray) -> Tensor:
    """An array as a tensor over the same memory, also where the array is read-only, of which torch warns."""
    if array.flags.writeable or (_has_warned() and not torch.is_warn_always_enabled()):
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


@cache
def _has_warned() -> bool:
    """Let torch give its one warning of a process here, where nobody hears it: to keep it from being heard each time takes longer."""
    array = np.zeros(1)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.from_numpy(array)
    return True
