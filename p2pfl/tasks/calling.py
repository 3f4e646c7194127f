"""Calling what a user wrote: whatever goes wrong there is told in one sentence, with the user's own line."""

from __future__ import annotations

import logging
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from p2pfl.errors import P2PFLError, TaskError
from p2pfl.tasks.base import Task
from p2pfl.tasks.sites import describe

log = logging.getLogger(__name__)

_LIBRARIES = {*sys.stdlib_module_names, "p2pfl", "torch"}
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib")})
_MOST_CHARACTERS = 500


@contextmanager
def users_code(task: str, function: str, *given: object, site: str | None = None, round: int | None = None) -> Iterator[None]:
    """A block that runs nothing but one of a task's functions, with what is given, on a site's rows in a round.

    Raises:
        TaskError: from what the function raised, unless that is a P2PFLError: such a one is meant as it is.
    """
    try:
        yield
    except TaskError as error:
        if error.task is not None:
            raise
        raise TaskError(error.fault, task=task, function=function, site=site, round=round) from error
    except P2PFLError:
        raise
    except (Exception, SystemExit) as error:
        log.info("task %r, %s:", task, function, exc_info=True)
        fault = fault_of(error) + (f"; it was given {', '.join(described(value) for value in given)}" if given else "")
        raise TaskError(fault, task=task, function=function, site=site, round=round) from error


def probabilities_of(task: Task, outputs: Tensor, *, site: str) -> Tensor:
    """The task's probabilities of outputs.

    Raises:
        TaskError: they cannot be computed, or are not of the outputs' shape.
    """
    assert task.probabilities is not None
    with users_code(task.name, "probabilities", outputs, site=site):
        found: object = task.probabilities(outputs)
    if not isinstance(found, Tensor) or found.shape != outputs.shape:
        fault = f"it returned {described(found)} for {described(outputs)}: expected the same shape"
        raise TaskError(fault, task=task.name, function="probabilities", site=site)
    return found


def described(value: object) -> str:
    """Describe a value by its kind, without its numbers."""
    if isinstance(value, Tensor):
        return describe(value)
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype}{list(value.shape)}"
    return "None" if value is None else type(value).__name__


def fault_of(error: BaseException) -> str:
    """An exception in one line: its type, what it says, and where in the user's code it was raised."""
    text = " ".join(str(error).split())
    if len(text) > _MOST_CHARACTERS:
        text = text[:_MOST_CHARACTERS] + "…"
    place = _place_of(error)
    return type(error).__name__ + (f": {text}" if text else "") + (f" ({place})" if place else "")


def _place_of(error: BaseException) -> str | None:
    """File and line of the innermost frame that is the user's own; of an installed package's where none is."""
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return f"{error.filename}:{error.lineno}"
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES
    ]
    own = [frame for frame in frames if not frame[0].startswith(_INSTALLED)]
    file, line = (own or frames or [("", 0)])[-1]
    return f"{file}:{line}" if file else None
