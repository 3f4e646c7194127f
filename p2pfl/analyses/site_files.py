"""Sites of an analysis from their YAML files: name, table and policy of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from p2pfl.analyses.policy import Policy
from p2pfl.data.check import CheckedTable, accepted_table
from p2pfl.data.contract import Contract
from p2pfl.data.csv_reading import read_csv
from p2pfl.data.table_format import SiteTable
from p2pfl.errors import ConfigError, DataError
from p2pfl.governance.names import NAME, RULE
from p2pfl.yaml_files import check, load_yaml, shown, strange_keys, text_keys, unknown_key

_KEYS = ["member", "table", "policy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalysisSite:
    """One site with its rows, which all lie on this machine."""

    name: str
    table: CheckedTable
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSettings:
    """Settings of a site for analyses, from its file."""

    name: str
    table: SiteTable
    policy: Policy


def load_settings(path: Path | str) -> SiteSettings:
    """Read a site's file with the keys `member`, `table` and `policy`; ConfigError with every fault at once."""
    raw, place = load_yaml(path, "table: {file: registry.csv}"), str(path)
    findings = [unknown_key(key, value, _KEYS) for key, value in raw.items() if key not in _KEYS]
    name = raw.get("member", Path(path).stem)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        findings.append(f"member = {shown(name)}: expected {RULE}")
    table, policy = None, Policy()
    if not isinstance(raw.get("table"), Mapping):
        findings.append("table: required, but missing" if "table" not in raw else f"table = {shown(raw['table'])}: expected a mapping")
    else:
        try:
            table = SiteTable.from_mapping(raw["table"], place)
        except ConfigError as error:
            findings += [f"table.{each}" for each in error.findings]
    if not isinstance(raw.get("policy", {}), Mapping):
        findings.append(f"policy = {shown(raw['policy'])}: expected a mapping, such as {{patients_per_cell: 5}}")
    else:
        findings += strange_keys(raw.get("policy", {}), "policy")
        try:
            policy = check(Policy, text_keys(raw.get("policy", {})), place)
        except ConfigError as error:
            findings += [f"policy.{each}" for each in error.findings]
    if findings or table is None:
        raise ConfigError(findings, place)
    return SiteSettings(name=str(name), table=replace(table, file=str(Path(path).parent / Path(table.file).expanduser())), policy=policy)


def load_sites(paths: Sequence[Path | str], contract: Contract) -> list[AnalysisSite]:
    """Read and check the tables of several sites.

    Raises:
        ConfigError: a file is wrong, a table does not follow the contract, or two sites have one name; what is wrong at all of them.
    """
    findings: list[str] = []
    sites: list[AnalysisSite] = []
    for path in paths:
        try:
            settings = load_settings(path)
            table = accepted_table(read_csv(settings.table.file, contract, settings.table), contract, settings.table)
        except (ConfigError, DataError) as error:
            findings += [f"{error.place or path}: {each}" for each in error.findings]
            continue
        if settings.name in [each.name for each in sites]:
            findings.append(f"{path}: another site has the name {settings.name} already; say member: NAME in its file")
        sites.append(AnalysisSite(name=settings.name, table=table, policy=settings.policy))
    if findings:
        raise ConfigError(findings)
    return sites
