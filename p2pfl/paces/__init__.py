"""Paces by name: whether nodes wait for each other, and for whom."""

from __future__ import annotations

from typing import Final

from p2pfl.paces.asynchronous import Asynchronous
from p2pfl.paces.base import Chosen, Pace
from p2pfl.paces.lockstep import Lockstep
from p2pfl.paces.pairwise import Pairwise

PACES: Final[dict[str, type[Pace]]] = {"synchronous": Lockstep, "asynchronous": Asynchronous, "pairwise": Pairwise}
"""Paces by the name that an experiment gives; each class declares what it needs and what it can do."""

__all__ = ["PACES", "Chosen", "Pace"]
