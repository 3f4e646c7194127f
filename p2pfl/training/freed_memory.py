"""Memory that is free inside the process, given back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
_AT_ONCE_BYTES = 8 * 2**20
_KEPT_BYTES = 64 * 2**20  # at the end of the heap, as glibc itself comes to do


def return_freed_memory() -> None:
    """Have the C library give back to the system what has been freed in between; where it is another than glibc, nothing happens."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_large_at_once() -> None:
    """Have the C library give back each piece of 8 MiB or more as soon as it is freed; where it is another than glibc, nothing happens.

    By itself glibc keeps what is freed up to 32 MiB among what is in use: what a compressor makes for a moment would stay for good.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _AT_ONCE_BYTES)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
