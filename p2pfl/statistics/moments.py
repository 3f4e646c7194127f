"""Means and deviations of a site's training rows: all that hospitals need to show each other to agree on one scale.

Shapes: M rows, D columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Number, mean and spread of some rows, without any of the rows."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    samples: Annotated[int, Field(ge=2)]
    """How many rows; from fewer than two there is no deviation, and one row would be shown as it is."""

    means: tuple[Finite, ...]
    """(D,)."""

    deviations: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...]
    """(D,), standard deviations with ddof 1."""

    def __post_init__(self) -> None:
        if not len(self.means) == len(self.deviations) >= 1:
            raise ValueError(f"{len(self.means)} means and {len(self.deviations)} deviations: expected as many, at least one")

    @classmethod
    def of(cls, rows_MD: np.ndarray) -> Moments:
        """Those of some rows, at least two."""
        deviations_D = rows_MD.std(axis=0, ddof=1)
        return cls(samples=len(rows_MD), means=tuple(rows_MD.mean(axis=0).tolist()), deviations=tuple(deviations_D.tolist()))

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments:
        """Those of the rows of all parts together, the same in whatever order they are given.

        Source: Chan, Golub & LeVeque, "Algorithms for computing the sample variance", The American Statistician 37, 1983.

        Raises:
            ValueError: the parts have different numbers of columns.
        """
        parts = list(parts)
        widths = {len(part.means) for part in parts}
        if len(widths) != 1:
            raise ValueError(f"moments of {sorted(widths)} columns: expected the same number everywhere")
        samples = sum(part.samples for part in parts)
        means, deviations = [], []
        for column in range(widths.pop()):
            mean = math.fsum(part.samples * part.means[column] for part in parts) / samples
            within = [(part.samples - 1) * part.deviations[column] ** 2 for part in parts]
            between = [part.samples * (part.means[column] - mean) ** 2 for part in parts]
            means.append(mean)
            deviations.append(math.sqrt(math.fsum([*within, *between]) / (samples - 1)))
        return cls(samples=samples, means=tuple(means), deviations=tuple(deviations))

    def is_close(self, other: Moments) -> bool:
        """Whether both can be of the same rows: the same up to rounding, which may differ between machines."""
        return self.samples == other.samples and all(
            len(own) == len(theirs) and np.allclose(own, theirs, rtol=1e-9, atol=1e-12)
            for own, theirs in ((self.means, other.means), (self.deviations, other.deviations))
        )

    def as_dict(self) -> dict[str, Any]:
        """As a YAML file holds it."""
        return {"samples": self.samples, "means": list(self.means), "deviations": list(self.deviations)}
