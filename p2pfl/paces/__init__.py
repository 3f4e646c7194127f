"""Paces by name: whether nodes wait for each other, and for whom."""

from __future__ import annotations

from typing import Any, Final

from p2pfl.paces.asynchronous import Asynchronous
from p2pfl.paces.base import Held, Pace
from p2pfl.paces.lockstep import Lockstep
from p2pfl.paces.pairwise import Pairwise

PACES: Final[dict[str, type[Pace[Any]]]] = {"synchronous": Lockstep, "asynchronous": Asynchronous, "pairwise": Pairwise}
"""Paces by the name that an experiment gives; each class declares what it needs and what it can do."""

__all__ = ["PACES", "Held", "Pace"]
