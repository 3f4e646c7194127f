"""Progress of long computations, as lines in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

log = logging.getLogger(__name__)
"""The commands show its INFO lines, on standard error."""

EVERY_S = 3.0

T = TypeVar("T")

Progress = Callable[[int, int, Mapping[str, Any]], None]
"""Called after each round with the number of rounds so far, the most that there can be, and the network's row."""


def logged(what: str, items: Sequence[T]) -> Iterator[T]:
    """Iterate over items, and log every three seconds how many are done."""
    said_s = time.monotonic()
    for done, item in enumerate(items):
        now_s = time.monotonic()
        if now_s - said_s >= EVERY_S:
            said_s = now_s
            log.info("%s: %d of %d", what, done, len(items))
        yield item
