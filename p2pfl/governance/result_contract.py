"""The result contract of a study: which code and which numbers must be the same everywhere for its results to be.

The contract is made where the study is made, and the study's digest binds it. Each site compares it with what it would compute with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from pydantic import Field

from p2pfl.errors import ConfigError

ARITHMETIC_REVISION: Final = 1
"""Number of the arithmetic that decides results: raise it by one in the change that makes any experiment end with other numbers.

That is: other draws, batches or partitions, another default, another formula of a rule, a compressor, an optimiser, a metric or a built-in
task, another start of a model. Rounding in the last bits and speed do not count.
`tests/governance/test_result_contract.py` pins some results of the current revision; where it fails, raise the number and pin the new ones.
"""

Kind = Literal["wire", "arithmetic", "torch", "task"]
"""Kinds of differences from a contract; site.yaml accepts differences by these names."""

KINDS: tuple[Kind, ...] = get_args(Kind)

_SHOWN_DIGITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class AgreedTask:
    """The code of a task that is not built in."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    name: Annotated[str, Field(min_length=1)]
    """Name of the task, as the experiment says it."""
    distribution: str | None = None
    """The distribution that it came with where the study was made, if any."""
    source: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Digest of its source files; None: it was not there when the study was made, so that nothing binds it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultContract:
    """Versions and code that must be the same at all members for the results to be."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    p2pfl: str
    """Version that made the study; shown, never refused."""
    wire: Annotated[int, Field(ge=1)]
    """Schema of the messages."""
    arithmetic: Annotated[int, Field(ge=1)]
    """`ARITHMETIC_REVISION`; it covers the built-in tasks."""
    torch: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    """Public version of torch, major.minor."""
    task: AgreedTask | None = None
    """None for a built-in task."""

    def as_dict(self) -> dict[str, Any]:
        """The contract as the study's file holds it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference between the contract of a study and a site's machine."""

    kind: Kind
    detail: str
    """The value here, and the value in the study."""
    remedy: str
    """How to make the difference go away."""

    def __str__(self) -> str:
        accept = f"accept_differences: [{self.kind}] in site.yaml, or --accept-difference {self.kind}"
        return f"{self.detail}: {self.remedy}, or let this site accept it on record: {accept}"


def public(text: str) -> str:
    """Shorten a version to its major and minor number."""
    found = re.match(r"\d+\.\d+", text)
    if found is None:
        raise ValueError(f"{text!r}: not a version")
    return found[0]


def differences(agreed: ResultContract, here: ResultContract) -> list[Difference]:
    """Compare a machine with the contract of a study."""
    found = []
    install = f"install p2pfl-mesh {agreed.p2pfl}, which made the study"
    by = f"here (p2pfl {here.p2pfl})"
    if here.wire != agreed.wire:
        found.append(Difference("wire", f"wire schema {here.wire} {by}, {agreed.wire} in the study", install))
    if here.arithmetic != agreed.arithmetic:
        found.append(Difference("arithmetic", f"arithmetic revision {here.arithmetic} {by}, {agreed.arithmetic} in the study", install))
    if here.torch != agreed.torch:
        found.append(Difference("torch", f"torch {here.torch} here, {agreed.torch} in the study", f"install torch {agreed.torch}"))
    return [*found, *_differences_of_task(agreed.task, here.task)]


def _differences_of_task(agreed: AgreedTask | None, here: AgreedTask | None) -> list[Difference]:
    """Compare the code of the task; it may differ where the study does not bind it."""
    again = "make the study again with p2pfl study new"
    if agreed is None:
        return [] if here is None else [Difference("task", f"task {here.name!r} is not built in here, and is in the study", again)]
    if here is None:
        return [Difference("task", f"task {agreed.name!r} is not built in in the study, and is here", again)]
    if agreed.source is None or here.source is None:
        return []
    wanted = f"the study's version of {agreed.distribution or f'the code of {agreed.name}'}"
    if here.source != agreed.source:
        detail = f"task {agreed.name!r}: source {here.source[:_SHOWN_DIGITS]}… here, {agreed.source[:_SHOWN_DIGITS]}… in the study"
        return [Difference("task", detail, f"take {wanted}")]
    if None not in (agreed.distribution, here.distribution) and agreed.distribution != here.distribution:
        detail = f"task {agreed.name!r}: from distribution {here.distribution} here, {agreed.distribution} in the study"
        return [Difference("task", detail, f"install {agreed.distribution}")]
    return []


def accepted(found: Sequence[Difference], kinds: Collection[str], place: str) -> list[Difference]:
    """Return all differences; ConfigError with those whose kinds a site has not accepted in its file, which is *place*."""
    if refused := [str(difference) for difference in found if difference.kind not in kinds]:
        raise ConfigError(refused, place)
    return list(found)
