"""Agreed preprocessing of a table: the numbers by which all institutions fill gaps and scale inputs, before anybody trains.

They are sums over institutions, or written by hand from published ranges. Nobody computes numbers of its own for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.governance.encoding import canonical
from p2pfl.yaml_files import check, load_yaml, nearest, shown, strange_keys, text_keys

_DOMAIN = b"p2pfl preprocessing 1\n"
_MOST_BYTES = 4 * 1024**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Agreed scale of one column: a value becomes (value - centre) / scale."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    centre: float
    scale: Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class AgreedVariable:
    """Agreed numbers of one variable."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    centre: float | None = None
    """Centre of a number, in the contract's unit, or of a date in days since 1970-01-01."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """Spread that stands for 1."""
    missing: Annotated[float | str, Field(union_mode="left_to_right")] | None = None
    """Value that a missing one takes: a number or a label; for the outcome there is none."""
    levels: dict[str, Scale] = field(default_factory=dict)
    """Scale of the column of each label; labels without one have columns of 0 and 1."""

    def as_dict(self) -> dict[str, Any]:
        """All that is said, by key."""
        found: dict[str, Any] = {key: value for key in ("centre", "scale", "missing") if (value := getattr(self, key)) is not None}
        if self.levels:
            found["levels"] = {label: {"centre": each.centre, "scale": each.scale} for label, each in self.levels.items()}
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """Agreed numbers of a model's inputs, and of an outcome that is a number. Made by load and from_mapping only, which check it."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    schema: Literal[1] = 1
    """Number of this file's format."""
    contract: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Digest of the data contract whose variables these are."""
    variables: dict[str, AgreedVariable]

    @classmethod
    def load(cls, path: Path | str, contract: Contract) -> Preprocessing:
        """Read the agreed numbers from their file; for errors see `from_mapping`."""
        return cls.from_mapping(load_yaml(path, "contract: DIGEST", _MOST_BYTES), contract, str(path))

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any], contract: Contract, place: str) -> Preprocessing:
        """Check agreed numbers as their file holds them, and hold them against the contract.

        Raises:
            ConfigError: every fault at once.
        """
        faults = strange_keys(raw)
        given = raw.get("variables")
        if isinstance(given, Mapping):
            faults += strange_keys(given, "variables")
            for name, each in given.items():
                if isinstance(each, Mapping) and isinstance(each.get("levels"), Mapping):
                    faults += strange_keys(each["levels"], f"variables.{name}.levels")
        if faults:
            raise ConfigError([f"{fault}: write it in quotes" for fault in faults], place)
        found = check(cls, text_keys(raw), place)
        if faults := list(found.faults(contract)):
            raise ConfigError(faults, place)
        return found

    def as_dict(self) -> dict[str, Any]:
        """The content of the file."""
        variables = {name: each.as_dict() for name, each in self.variables.items()}
        return {"schema": self.schema, "contract": self.contract, "variables": variables}

    @property
    def digest(self) -> str:
        """SHA-256 of the content, 64 hex digits."""
        return sha256(_DOMAIN + canonical(self.as_dict())).hexdigest()

    def faults(self, contract: Contract) -> Iterator[str]:
        """Find numbers of another contract, and numbers that the contract's variables cannot have."""
        if self.contract != contract.digest:
            yield (
                f"contract = {shown(self.contract[:16] + '…')}: the data contract here has the digest {contract.digest[:16]}…; "
                "agree on the numbers again: p2pfl data prepare"
            )
            return
        for name, each in self.variables.items():
            if name not in contract.variables:
                near = nearest(name, list(contract.variables))
                yield f"variables.{name}: no variable of the contract; {near}expected one of {', '.join(contract.variables)}"
            else:
                yield from (f"variables.{name}.{fault}" for fault in _faults_of(each, contract, name))

    def lacking(self, names: Sequence[str], contract: Contract) -> Iterator[str]:
        """Find inputs of a model for which numbers are missing."""
        for name in names:
            each, is_factor = self.variables.get(name), contract.variables[name].type == "category"
            needed = ("missing",) if is_factor else ("centre", "scale", "missing")
            lacks = [key for key in needed if each is None or getattr(each, key) is None]
            if lacks:
                yield f"variables.{name}: {', '.join(lacks)} required, but missing: agree on the numbers again: p2pfl data prepare"


def _faults_of(agreed: AgreedVariable, contract: Contract, name: str) -> Iterator[str]:
    """Find agreed numbers of one variable that its type or its range does not have; each begins with the key."""
    variable = contract.variables[name]
    if variable.type == "category":
        yield from (f"{key}: {name} has categories; expected levels" for key in ("centre", "scale") if getattr(agreed, key) is not None)
        if agreed.missing is not None and agreed.missing not in variable.labels:
            yield f"missing = {shown(agreed.missing)}: expected one of {', '.join(variable.labels)}"
        for label in agreed.levels:
            if label not in variable.labels:
                yield f"levels.{label}: no category; expected one of {', '.join(variable.labels)}"
        return
    if variable.type == "id":
        yield "centre: a variable of type id is no model input; leave it out"
        return
    if agreed.levels:
        yield f"levels: {name} is of type {variable.type}; expected centre and scale"
    if isinstance(agreed.missing, str):
        yield f"missing = {shown(agreed.missing)}: expected a number"
    elif agreed.missing is not None and variable.range is not None and not variable.range[0] <= agreed.missing <= variable.range[1]:
        yield f"missing = {agreed.missing:g}: outside of the contract's range"
