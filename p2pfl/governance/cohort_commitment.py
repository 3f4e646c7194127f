"""Cohort commitment of a site: numbers and an HMAC that bind it to the rows that it has frozen, without showing one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

_Hex = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class CohortCommitment:
    """Numbers and the HMAC that bind a site to its rows; public."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    contract: _Hex
    """Digest of the data contract."""
    rows: Annotated[int, Field(ge=0)]
    patients: Annotated[int, Field(ge=0)]
    hmac: _Hex
    """HMAC-SHA256 under a key that never leaves the site."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in the file's order."""
        return {"contract": self.contract, "rows": self.rows, "patients": self.patients, "hmac": self.hmac}
