"""A site's table with the paths around it, as its file says: the section `table:`, contract, frozen rows, keys.

The file is a node's whole site.yaml, or one with these keys alone for a site that runs no node.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from p2pfl.data.table_format import SiteTable
from p2pfl.errors import ConfigError
from p2pfl.governance.names import NAME, RULE
from p2pfl.yaml_files import check, load_yaml, shown, text_keys, unknown_key

COHORT_FILE = "cohort.json"
"""Name of the file with the frozen rows, where a site's file says nothing else: beside the state folder."""

_OF_A_NODE = "study"
"""Key of a node's file, whose other keys the node checks."""
_OF_TABLES = ("table", "contract", "cohort", "policy")
_NEAR = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class _Keys:
    """Keys beside `table:` that matter to the table."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    contract: Path | None = None
    cohort: Path | None = None
    keys: Path = Path("keys")
    state: Path = Path("state")


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSection:
    """A site's table with the paths around it, all absolute."""

    place: str
    folder: Path
    """Folder of the site's file."""
    table: SiteTable
    contract: Path | None
    """File of the contract, where the site's file names one."""
    cohort: Path
    """File of the frozen rows, which is there once they are frozen."""
    keys: Path
    """Folder of the site's keys."""

    @classmethod
    def load(cls, path: Path | str) -> SiteSection:
        """Read what a site's file says of its table; a node's other keys are left to the node.

        Raises:
            ConfigError: every fault at once.
        """
        return cls.from_mapping(load_yaml(path, "table: {file: registry.csv}"), path)

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any], path: Path | str) -> SiteSection:
        """Check the content of a site's file, which lies at *path*; for errors see `load`."""
        place, folder = str(path), Path(path).absolute().parent
        names = [each.name for each in fields(_Keys)]
        findings: list[str] = []
        known = ["member", "table", "policy", *names]
        if _OF_A_NODE in raw:
            findings += mistyped_keys(raw)
        else:
            findings += [unknown_key(key, raw[key], known) for key in raw if key not in known]
        table, faults = section_table(raw.get("table"))
        findings += faults if "table" in raw else ["table: required, but missing, such as {file: registry.csv}"]
        own = _Keys()
        try:
            own = check(_Keys, {key: raw[key] for key in names if raw.get(key) is not None}, place)
        except ConfigError as error:
            findings += error.findings
        paths = {key: getattr(own, key) for key in names}
        findings += [fault for key, written in paths.items() if written is not None and (fault := fault_of_home(key, written))]
        if findings or table is None:
            raise ConfigError(findings, place)
        found = {key: folder / written.expanduser() if written is not None else None for key, written in paths.items()}
        return cls(
            place=place,
            folder=folder,
            table=table,
            contract=found["contract"],
            cohort=found["cohort"] or folder / own.state.expanduser().parent / COHORT_FILE,
            keys=folder / own.keys.expanduser(),
        )


def site_name(raw: Mapping[str, Any], path: Path | str) -> str:
    """Find the name of a site in the content of its file: its key `member`, else the file's own name; ConfigError where it is no name."""
    name = raw.get("member", Path(path).stem)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"member = {shown(name)}: expected {RULE}", str(path))
    return name


def mistyped_keys(raw: Mapping[str, Any]) -> list[str]:
    """Find keys of a node's file that are nearly one of the table's; the node itself checks the others."""
    near = [key for key in raw if key not in _OF_TABLES and difflib.get_close_matches(str(key).lower(), _OF_TABLES, n=1, cutoff=_NEAR)]
    return [unknown_key(key, raw[key], list(_OF_TABLES)) for key in near]


def section_table(raw: Any) -> tuple[SiteTable | None, list[str]]:
    """Make a site's table of the section `table:`, or find all that is wrong with it; each finding begins with the key."""
    if not isinstance(raw, Mapping):
        return None, ["table: expected a mapping (key: value), such as {file: registry.csv}"]  # what is there may hold a password
    try:
        table = SiteTable.from_mapping(text_keys(raw), "table")
    except ConfigError as error:
        return None, [f"table.{finding}" for finding in error.findings]
    return table, [fault for key, written in table.paths().items() if (fault := fault_of_home(f"table.{key}", Path(written)))]


def fault_of_home(key: str, path: Path) -> str | None:
    """Find a path that begins with the home folder of an account which this machine does not know."""
    try:
        path.expanduser()
    except RuntimeError:
        return f"{key} = {shown(str(path))}: no account has this home folder; write the folder"
    return None


def beside(folder: Path | str, path: str) -> Path:
    """Find a path that a site's file names: beside the file, unless it is absolute or begins with a home folder."""
    return Path(folder) / Path(path).expanduser()
