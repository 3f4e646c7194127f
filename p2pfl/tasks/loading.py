"""Finding a task by its name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError, P2PFLError
from p2pfl.tasks.base import Task
from p2pfl.tasks.calling import fault_of
from p2pfl.tasks.medical import breast_cancer, heart_disease
from p2pfl.tasks.synthetic import averaging, quadratic, synthetic_logistic
from p2pfl.tasks.vision import digits, mnist

log = logging.getLogger(__name__)

TASKS: dict[str, Callable[..., Task]] = {
    "averaging": averaging,
    "breast-cancer": breast_cancer,
    "digits": digits,
    "heart-disease": heart_disease,
    "mnist": mnist,
    "quadratic": quadratic,
    "synthetic-logistic": synthetic_logistic,
}


def find_task(name: str) -> Callable[..., Task]:
    """The function that makes a task.

    Args:
        name: registered in TASKS, or "package.module:function"; a module is looked for in the current folder, too.

    Raises:
        ConfigError: there is no such task, module or function, or the module cannot be imported.
    """
    if name in TASKS:
        return TASKS[name]
    allowed = f"one of {', '.join(TASKS)}, or package.module:function"
    module_name, colon, function_name = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise ConfigError(f"task.name = {name!r}: {allowed}")
    here = str(Path.cwd())
    if here not in sys.path:
        # last, so that nothing here can take the place of an installed module; it stays, for what the module imports later
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except P2PFLError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):  # something that the user's module imports
            raise _broken(name, f"it needs the module {error.name}, which is not installed", error) from error
        raise ConfigError(f"task.name = {name!r}: no module {error.name} is installed or lies in {here}; {allowed}") from error
    except (Exception, SystemExit) as error:
        raise _broken(name, f"{module_name} cannot be imported", error) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"task.name = {name!r}: {module.__file__} has no function {function_name}")
    try:
        inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"task.name = {name!r}: {function_name} does not say which arguments it takes: expected a function") from error
    found: Callable[..., Task] = function
    return found


def load_task(name: str, **arguments: Any) -> Task:
    """The task of that name, made with these arguments.

    Raises:
        ConfigError: as in find_task; an argument that the task does not take, or lacks; it raises, or what it returns is not a Task.
        DataError: its rows are missing or not as it needs them.
    """
    function = find_task(name)
    parameters = inspect.signature(function).parameters
    takes = [key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    findings = [
        f"task.{key} = {value!r}: {name} takes {', '.join(takes) or 'no options'}"
        for key, value in arguments.items()
        if key not in takes and not takes_any
    ]
    findings += [
        f"task.{key} is missing: {name} needs it"
        for key in takes
        if parameters[key].default is inspect.Parameter.empty and key not in arguments
    ]
    if findings:
        raise ConfigError(findings)
    try:
        task: Any = function(**arguments)
    except P2PFLError:
        raise
    except (Exception, SystemExit) as error:
        raise _broken(name, "the function failed", error) from error
    if not isinstance(task, Task):
        raise ConfigError(f"task.name = {name!r}: it returned {type(task).__name__}, expected p2pfl.tasks.Task")
    return task


def _broken(name: str, what: str, error: BaseException) -> ConfigError:
    log.info("task %r:", name, exc_info=error)
    return ConfigError(f"task.name = {name!r}: {what}: {fault_of(error)}")
