"""Which task code may run here, and where it lies; nothing in this file imports or runs any of it.

A task that is not built in runs where two people agree: its author has marked the function with `@p2pfl.task`, and whoever starts the
program has named it, in `allow_tasks` of site.yaml, with --allow-task or as `allow_tasks=[...]`. A file that came from somebody else, an
experiment, a study, a run's folder, can only ask.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import FileFinder, ModuleSpec
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

from p2pfl.errors import ConfigError
from p2pfl.governance.names import DISTRIBUTION, TASK_RULE, is_task_name

GROUP = "p2pfl.tasks"
"""Entry points of this group give tasks names; being one allows nothing."""

_MARK = "__p2pfl_task__"
_NAMES_OF_MARK = frozenset({"p2pfl.task", "p2pfl.tasks.task", "p2pfl.tasks.permission.task"})
_TARGET = re.compile(r"\s*([\w.]+)\s*:\s*(\w+)\s*(\[.*\])?\s*")

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSource:
    """A task's function in its file, found without importing anything."""

    name: str
    """As the experiment says it."""
    module: str
    """Dotted."""
    function: str
    file: Path
    """The module's Python source."""
    distribution: str | None = None
    """Its declared name, where the task was named as distribution:entry."""
    entry: str | None = None
    """The entry point, likewise."""


def task(function: _Function) -> _Function:
    """Mark a function that returns a Task as one that an experiment may name; the outermost decorator.

    Raises:
        TypeError: it is not a plain function.
    """
    if not isinstance(function, FunctionType):
        raise TypeError(f"@p2pfl.task marks a function; this is {type(function).__name__}: make it the outermost decorator of a def")
    setattr(function, _MARK, function.__code__)  # a wrapper copies the attribute, and has other code
    return function


def is_marked(value: object) -> bool:
    """Whether a value is a plain function that `@p2pfl.task` has marked itself."""
    return isinstance(value, FunctionType) and getattr(value, _MARK, None) is value.__code__


def options_of(allow_tasks: Collection[str]) -> list[str]:
    """Allowed tasks as a command takes them."""
    return [word for name in allow_tasks for word in ("--allow-task", name)]


def find_source(name: str) -> TaskSource:
    """Where a task lies, by its name, without importing it or the packages around it.

    A distribution's entry point comes before a module of the same name.

    Raises:
        ConfigError: the name has another form, or nothing of that name is there with Python source.
    """
    home, _, entry = name.partition(":")
    if not is_task_name(name):
        raise ConfigError(f"task.name = {name!r}: expected {TASK_RULE}")
    importlib.invalidate_caches()
    declared = _declared(name, home, entry)
    if declared is not None:
        distribution, module, function = declared
        return TaskSource(name=name, module=module, function=function, file=_file_of(name, module), distribution=distribution, entry=entry)
    if not all(part.isidentifier() for part in [*home.split("."), entry]):
        raise ConfigError(f"task.name = {name!r}: no installed distribution {home} has an entry point {entry} of the group {GROUP}")
    return TaskSource(name=name, module=home, function=entry, file=_file_of(name, home))


def check_marked(found: TaskSource) -> None:
    """Refuse a function that its author has not marked as a task, from the module's syntax tree.

    Raises:
        ConfigError: there is no such function at the module's top level, or it is not marked.
        SyntaxError: the file is not Python; or ValueError, or RecursionError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever imports it is told
        tree = ast.parse(found.file.read_bytes(), str(found.file))
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    named = [node for node in defined if node.name == found.function]
    if not named:
        raise ConfigError(
            f"task.name = {found.name!r}: {found.file} has no function {found.function}: expected a def at its top level, "
            "marked with @p2pfl.task"
        )
    last = named[-1]
    if not isinstance(last, ast.FunctionDef):
        raise ConfigError(f"task.name = {found.name!r}: {found.file}:{last.lineno}: {found.function} is not a plain function")
    meanings = _meanings(tree.body)
    if not last.decorator_list or _dotted(last.decorator_list[0], meanings) not in _NAMES_OF_MARK:
        raise ConfigError(
            f"task.name = {found.name!r}: {found.file}:{last.lineno}: {found.function} is not marked as a task: "
            "import p2pfl there and write @p2pfl.task above all that stands over its def"
        )


def is_only_here(module: str) -> bool:
    """Whether a module is found in the current folder, and nowhere else on the path."""
    top = module.partition(".")[0]
    return _spec(top, None) is None and _spec(top, [str(Path.cwd())]) is not None


def _declared(name: str, home: str, entry: str) -> tuple[str, str, str] | None:
    """The distribution, module and function of an entry point; None where there is no such one."""
    if not DISTRIBUTION.fullmatch(home):
        return None
    try:
        distribution = importlib.metadata.distribution(home)
    except importlib.metadata.PackageNotFoundError:
        return None
    for point in distribution.entry_points:
        if point.group == GROUP and point.name == entry:
            target = _TARGET.fullmatch(point.value)
            if target is None or not all(part.isidentifier() for part in target[1].split(".")):
                raise ConfigError(f"task.name = {name!r}: its entry point is {point.value!r}, expected package.module:function")
            return str(distribution.metadata["Name"]), target[1], target[2]
    return None


def _file_of(name: str, module: str) -> Path:
    parts = module.split(".")
    here = str(Path.cwd())
    spec, missing = _found(parts, None)
    if missing == parts[0]:
        spec, missing = _found(parts, [here])
    if spec is None:
        raise ConfigError(
            f"task.name = {name!r}: no module {missing} is installed or lies in {here}; expected the name of one that is there"
        )
    if not spec.has_location or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(f"task.name = {name!r}: the module {module} has no Python source file, where @p2pfl.task could stand")
    return Path(spec.origin)


def _found(parts: Sequence[str], paths: list[str] | None) -> tuple[ModuleSpec | None, str]:
    """Where a module is, and the first part of its name that is nowhere; `importlib.util.find_spec` would import its parents."""
    search, spec = paths, None
    for depth in range(len(parts)):
        full = ".".join(parts[: depth + 1])
        spec = _spec(full, search)
        if spec is None:
            return None, full
        if depth + 1 == len(parts):
            break
        if spec.submodule_search_locations is None:  # not a package
            return None, ".".join(parts[: depth + 2])
        search = list(spec.submodule_search_locations)
    return spec, ""


def _spec(full: str, search: list[str] | None) -> ModuleSpec | None:
    """A module or package by its full name; search: the folders of its parent, or of somewhere; None: wherever Python looks."""
    if search is None:
        asked = (finder.find_spec(full, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        return next((spec for spec in asked if spec is not None), None)
    namespace = ModuleSpec(full, None, is_package=True)
    namespace.submodule_search_locations = []
    for folder in search:  # as PathFinder does, which asks the parent of a namespace; that one is not imported
        finder = pkgutil.get_importer(folder)
        spec = finder.find_spec(full) if isinstance(finder, FileFinder) else None
        if spec is not None and spec.loader is not None:
            return spec
        if spec is not None:
            namespace.submodule_search_locations += spec.submodule_search_locations or []
    return namespace if namespace.submodule_search_locations else None


def _meanings(statements: Iterable[ast.stmt]) -> dict[str, str]:
    """The full name of everything that a module imports at its top level, by the name that it has there."""
    meanings: dict[str, str] = {}
    for node in statements:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                meanings[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                meanings[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return meanings


def _dotted(node: ast.expr, meanings: dict[str, str]) -> str:
    """The full name that an expression such as `fl.task` stands for; empty where it is something else."""
    if isinstance(node, ast.Name):
        return meanings.get(node.id, "")
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value, meanings)
        return before and f"{before}.{node.attr}"
    return ""
