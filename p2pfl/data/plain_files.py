"""Files that a site names, looked at before they are opened: a pipe, a device or a folder is no table."""

from __future__ import annotations

import stat
from pathlib import Path

from p2pfl.errors import ConfigError, DataError


def check_plain_file(path: Path, missing: str = "no such file") -> None:
    """Refuse a path at which no plain file is; DataError with the reason."""
    place = str(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise DataError(missing, place) from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}", place) from error
    if stat.S_ISDIR(mode):
        raise DataError("cannot be read: it is a folder, expected a file", place)
    if not stat.S_ISREG(mode):
        raise DataError("is no plain file", place)


def is_there(path: Path) -> bool:
    """Whether a file is at a path; ConfigError where this account cannot see that."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be looked at: {getattr(error, 'strerror', None) or error}", str(path)) from error
    return True
