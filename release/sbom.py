"""Write the list of software that p2pfl needs: ``python release/sbom.py FOLDER`` makes FOLDER/p2pfl_mesh-VERSION.cdx.json, CycloneDX 1.6.

`cyclonedx-py` lists all that is installed beside this Python. What only tests and releases need is taken out; what only extras need has the
scope "optional". The list is refused where it is not valid, or lacks a dependency.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[1]
SPECIFICATION: Final = "1.6"
ALWAYS_EXTRA: Final = "all"
"""The extra that brings all others; ray is in none, and is listed where somebody installs it."""

Document = dict[str, Any]


def requirements(project: Mapping[str, Any], extra: str | None = None) -> set[str]:
    """Names of the distributions that a project needs on this system, or that one of its extras does, its own extras followed."""
    optional = project.get("optional-dependencies", {})
    found: set[str] = set()
    for text in project["dependencies"] if extra is None else optional[extra]:
        wanted = Requirement(text)
        if canonicalize_name(wanted.name) == canonicalize_name(project["name"]):
            found |= {name for inner in wanted.extras for name in requirements(project, inner)}
        elif wanted.marker is None or wanted.marker.evaluate():
            found.add(canonicalize_name(wanted.name))
    return found


Needs = Callable[[str], Iterable[str]]
"""Names of the distributions that an installed one needs."""


def reduced(bom: Document, core: Iterable[str], extras: Iterable[str], needs: Needs) -> Document:
    """The part of a list that the core and the extras lead to, in the same order.

    Raises:
        ValueError: a dependency of the core is not in it.
    """
    root = bom["metadata"]["component"]["bom-ref"]
    refs = {canonicalize_name(component["name"]): component["bom-ref"] for component in bom["components"]}
    if missing := sorted(set(core) - refs.keys()):
        raise ValueError(f"the list lacks {', '.join(missing)}: install p2pfl with its dependencies beside this Python")
    required = _reached(core, needs, refs.keys())
    kept = required | _reached(extras, needs, refs.keys())
    scopes = {refs[name]: "required" if name in required else "optional" for name in kept}
    components = [{**part, "scope": scopes[part["bom-ref"]]} for part in bom["components"] if part["bom-ref"] in scopes]
    edges = {refs[name]: sorted(refs[needed] for needed in set(needs(name)) & kept) for name in sorted(kept)}
    edges = {root: sorted(refs[name] for name in {*core, *extras} & kept), **edges}
    return {**bom, "components": components, "dependencies": [{"ref": ref, "dependsOn": to} for ref, to in edges.items()]}


def _reached(first: Iterable[str], needs: Needs, known: Collection[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(first)
    while waiting:
        name = waiting.pop()
        if name in known and name not in found:
            found.add(name)
            waiting += needs(name)
    return found


def needs_of_installed(name: str) -> set[str]:
    """Names of the distributions that an installed one needs on this system, without its extras."""
    wanted = [Requirement(text) for text in metadata.requires(name) or ()]
    return {canonicalize_name(each.name) for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})}


def check_valid(text: str) -> None:
    """Pass where a text is CycloneDX of our version, ValueError otherwise."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    if fault := JsonStrictValidator(SchemaVersion.from_version(SPECIFICATION)).validate_str(text):
        raise ValueError(f"not valid CycloneDX {SPECIFICATION}: {fault}")


def main(folder: Path) -> None:
    """Write the list into a folder."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    options = [
        "--pyproject",
        str(ROOT / "pyproject.toml"),
        "--spec-version",
        SPECIFICATION,
        "--output-reproducible",
        "--output-format",
        "JSON",
    ]
    listed = subprocess.run(
        [sys.executable, "-m", "cyclonedx_py", "environment", *options, sys.executable], check=True, stdout=subprocess.PIPE, cwd=ROOT
    ).stdout
    bom = reduced(json.loads(listed), requirements(project), requirements(project, ALWAYS_EXTRA), needs_of_installed)
    text = json.dumps(bom, indent=2, sort_keys=True) + "\n"
    check_valid(text)
    path = folder / f"{project['name'].replace('-', '_')}-{project['version']}.cdx.json"
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(bom['components'])} components")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
