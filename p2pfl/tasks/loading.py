"""Finding a task by its name."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from p2pfl.errors import ConfigError, P2PFLError, TaskNotAllowed
from p2pfl.governance.names import TASK_RULE, is_task_name
from p2pfl.tasks.base import Task
from p2pfl.tasks.calling import fault_of
from p2pfl.tasks.contract_table import table
from p2pfl.tasks.medical import breast_cancer, heart_disease
from p2pfl.tasks.permission import TaskSource, check_marked, find_source, is_marked, is_only_here
from p2pfl.tasks.synthetic import averaging, quadratic, synthetic_logistic
from p2pfl.tasks.vision import digits, mnist

log = logging.getLogger(__name__)

TABLE = "table"
"""Name of the task on a data contract's table."""

TASKS: dict[str, Callable[..., Task]] = {
    "averaging": averaging,
    "breast-cancer": breast_cancer,
    "digits": digits,
    "heart-disease": heart_disease,
    "mnist": mnist,
    "quadratic": quadratic,
    "synthetic-logistic": synthetic_logistic,
    TABLE: table,
}


def find_task(name: str, allow_tasks: Collection[str] = ()) -> Callable[..., Task]:
    """The function that makes a task.

    Its name is in TASKS, distribution:entry or package.module:function; a module is looked for in the current folder, too. What is not
    built in must be allowed by the person who runs this program, never by a file that came from somebody else, and marked with
    `@p2pfl.task`; both is checked before anything of it is imported.

    Raises:
        TaskNotAllowed: it is neither built in nor allowed.
        ConfigError: there is no such task, module or function, it is not marked, or the module cannot be imported.
    """
    check_may_run(name, allow_tasks)
    if name in TASKS:
        return TASKS[name]
    found = find_source(name)
    try:
        check_marked(found)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise _broken(name, f"{found.module} cannot be imported", error) from error
    function: object = getattr(_imported(found), found.function, None)
    if not is_marked(function):
        raise ConfigError(
            f"task.name = {name!r}: {found.function} in {found.file} is no longer the function under @p2pfl.task once the module is "
            "imported: keep the mark outermost, and give the name to nothing else"
        )
    return cast("Callable[..., Task]", function)


def check_may_run(name: str, allow_tasks: Collection[str] = ()) -> None:
    """Refuse a task that is neither built in nor allowed by the person who runs this program, by its name alone.

    Raises:
        TaskNotAllowed: it is neither.
        ConfigError: nothing can have this name, or the list of those that are allowed is wrong.
    """
    if name in TASKS:
        return
    if not is_task_name(name):
        raise ConfigError(f"task.name = {name!r}: one of {', '.join(TASKS)}, or package.module:function")
    if isinstance(allow_tasks, str):
        raise ConfigError(f"allow_tasks = {allow_tasks!r}: expected a list of names")
    if faults := [f"allow_tasks: {text!r}: expected {TASK_RULE}" for text in allow_tasks if not is_task_name(text)]:
        raise ConfigError(faults)
    if name not in allow_tasks:
        raise TaskNotAllowed(
            f"task.name = {name!r}: nobody has allowed this code to run here; if you trust it, name it in site.yaml "
            f'(allow_tasks: ["{name}"]), with --allow-task {name}, or in Python with allow_tasks=["{name}"]'
        )


def _imported(found: TaskSource) -> ModuleType:
    """The module of a task that may run; ConfigError where it cannot be imported, or Python has another one of that name."""
    if is_only_here(found.module):
        here = str(Path.cwd())
        if here not in sys.path:
            # last, so that nothing here can take the place of an installed module; it stays, for what the module imports later
            sys.path.append(here)
            importlib.invalidate_caches()
    try:
        module = importlib.import_module(found.module)
    except P2PFLError:
        raise
    except ModuleNotFoundError as error:  # something that the user's module imports
        raise _broken(found.name, f"it needs the module {error.name}, which is not installed", error) from error
    except (Exception, SystemExit) as error:
        raise _broken(found.name, f"{found.module} cannot be imported", error) from error
    if module.__file__ is None or Path(module.__file__).resolve() != found.file.resolve():
        raise ConfigError(
            f"task.name = {found.name!r}: {found.file} was looked at, and Python imported {module.__file__}: rename one of them"
        )
    return module


def load_task(name: str, /, *, allow_tasks: Collection[str] = (), **arguments: Any) -> Task:
    """The task of that name, made with these arguments; errors as of `find_task` and `make_task`."""
    return make_task(name, find_task(name, allow_tasks), arguments)


def make_task(name: str, function: Callable[..., Task], arguments: Mapping[str, Any]) -> Task:
    """Make the task that a function from `find_task` returns for a file's options and what a runtime adds to them.

    Raises:
        ConfigError: an argument that the task does not take, or lacks; it raises, or what it returns is not a Task.
        DataError: its rows are missing or not as it needs them.
    """
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
