"""Sites of an analysis from their YAML files: name, table and policy of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from p2pfl.analyses.policy import Policy
from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.data.site_rows import site_rows
from p2pfl.data.site_section import SiteSection, site_name
from p2pfl.errors import ConfigError, DataError
from p2pfl.yaml_files import load_yaml


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
    section: SiteSection
    policy: Policy


def load_settings(path: Path | str) -> SiteSettings:
    """Read what a site's file says of its name, table and policy; ConfigError with every fault at once."""
    raw, place = load_yaml(path, "table: {file: registry.csv}"), str(path)
    findings: list[str] = []
    name, section, policy = "", None, Policy()
    try:
        name = site_name(raw, path)
    except ConfigError as error:
        findings += error.findings
    try:
        section = SiteSection.from_mapping(raw, path)
    except ConfigError as error:
        findings += error.findings
    try:
        policy = Policy.from_mapping(raw.get("policy", {}), place)
    except ConfigError as error:
        findings += error.findings
    if findings or section is None:
        raise ConfigError(findings, place)
    return SiteSettings(name=name, section=section, policy=policy)


def load_sites(paths: Sequence[Path | str], contract: Contract) -> list[AnalysisSite]:
    """Read and check the tables of several sites; where a site has frozen rows, these alone are taken.

    Raises:
        ConfigError: a file is wrong, a table does not follow the contract, or two sites have one name; what is wrong at all of them.
    """
    findings: list[str] = []
    sites: list[AnalysisSite] = []
    for path in paths:
        try:
            settings = load_settings(path)
            _, table = site_rows(settings.section, contract)
        except (ConfigError, DataError) as error:
            findings += [f"{error.place or path}: {each}" for each in error.findings]
            continue
        if settings.name in [each.name for each in sites]:
            findings.append(f"{path}: another site has the name {settings.name} already; say member: NAME in its file")
        sites.append(AnalysisSite(name=settings.name, table=table, policy=settings.policy))
    if findings:
        raise ConfigError(findings)
    return sites
