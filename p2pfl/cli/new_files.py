"""New files that a command writes."""

from __future__ import annotations

from pathlib import Path

from p2pfl.errors import ConfigError, store_error


def write_new(path: Path, text: str) -> None:
    """Write a text with its own line ends to a new file.

    Raises:
        ConfigError: a file is there already.
        StoreError: it cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"cannot be written: {error.strerror}; choose another file", str(path)) from None
    except OSError as error:
        raise store_error(path, error) from error
