"""Which code a task is: its name, its distribution and a digest over its source files; nothing here imports or runs it."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote, urlsplit

from p2pfl.errors import ConfigError
from p2pfl.governance.result_contract import AgreedTask
from p2pfl.tasks.loading import TASKS
from p2pfl.tasks.permission import find_source

_DOMAIN = b"p2pfl task source v1\0"
_INIT = "__init__.py"


def task_code(name: str) -> AgreedTask | None:
    """The code of a task on this machine, found without importing it; None for a built-in one.

    Raises:
        ConfigError: there is no such module here, it has no Python source, or that cannot be read.
    """
    if name in TASKS or name.partition(":")[0].partition(".")[0] == "p2pfl":
        return None
    found = find_source(name)
    try:
        source = source_digest(found.module, found.file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"task.name = {name!r}: its source in {found.file.parent} cannot be read: {error}") from error
    return AgreedTask(name=name, distribution=found.distribution or distribution_of(found.file), source=source)


def source_digest(module: str, file: Path) -> str:
    """SHA-256 over the sorted (path, SHA-256) of the Python files around a module, 64 hex digits; its lines end in LF for this.

    An installed wheel, an editable install and a folder on the path give the same digest. Other files than .py do not count.
    """
    root, name = _top_of(module, file)
    with_lf = ((path, file.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")) for path, file in _python_files(root, name))
    listed = sorted((path, sha256(source).hexdigest()) for path, source in with_lf)
    return sha256(_DOMAIN + json.dumps(listed, separators=(",", ":")).encode("ascii")).hexdigest()


def distribution_of(file: Path) -> str | None:
    """The name of the installed distribution whose file this is, editable installs included; None where there is none."""
    place = file.resolve()
    editable: list[tuple[int, str]] = []
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"]
        folder = _editable_folder(found)
        if folder is not None and place.is_relative_to(folder):
            editable.append((len(folder.parts), name))
            continue
        record = found.read_text("RECORD")
        if record is not None and file.name not in record:
            continue  # to read its list of files as one text is twenty times as fast
        if any(path.name == file.name and Path(str(found.locate_file(path))).resolve() == place for path in found.files or ()):
            return str(name)
    return max(editable)[1] if editable else None


def _editable_folder(found: importlib.metadata.Distribution) -> Path | None:
    """The project's folder of an editable install."""
    try:
        said = json.loads(found.read_text("direct_url.json") or "{}")
        url = urlsplit(said["url"])
        is_editable = said["dir_info"]["editable"] is True
    except (ValueError, KeyError, TypeError):
        return None
    return Path(unquote(url.path)).resolve() if is_editable and url.scheme == "file" else None


def _top_of(module: str, file: Path) -> tuple[Path, str]:
    """The first regular package on the way to a module (others may put files into namespaces) or its own file; and its name as a path."""
    parts = module.split(".")
    path = file.parent if file.name == _INIT else file
    ways = [path, *path.parents][: len(parts)][::-1]
    for depth, way in enumerate(ways):
        if (way / _INIT).is_file():
            return way, "/".join(parts[: depth + 1])
    return file, "/".join(parts)


def _python_files(root: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Path within the distribution, and file, of all Python sources; hidden folders are nobody's package."""
    if root.is_file():
        yield f"{name}.py", root
        return
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder) / file
                yield f"{name}/{path.relative_to(root).as_posix()}", path
