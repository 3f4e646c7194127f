"""One examination: the site that is looked at, what is known of it so far, and what was found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError, P2PFLError
from p2pfl.experiment.plan import Plan
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.doctor.interview import EdgeMeasurement
from p2pfl.node.site import SiteFile
from p2pfl.training import Population

_REMEDY = re.compile(
    r"; (?=(?:ask|call|choose|compare|find|give|install|make|mend|name|remove|restore|run|say|set|start|stop|take|unset|use|write)\b)"
)
"""The place in an error's sentence where what to do begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One fault of the site, in words that name it, with its remedy."""

    fault: str
    remedy: str

    @property
    def text(self) -> str:
        """Fault and remedy in one sentence."""
        return f"{self.fault}; {self.remedy}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One thing that was looked at and is in order, or that could not be seen."""

    what: str
    said: str
    """Sentence on how it is, or on why that is unknown."""
    is_known: bool = True
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Numbers and names for machines; None where one is unknown."""


def unknown(what: str, why: str, **figures: Any) -> Fact:
    """Make the fact that something could not be seen."""
    return Fact(what=what, said=why, is_known=False, figures=figures)


Noted = Iterator[Finding | Fact]
"""Findings and facts of one check, in the order in which they are shown."""


@dataclass
class Examination:
    """All that the checks of one site know; each check adds what the later ones need.

    Args:
        path: of site.yaml.
        confirmed: the study's digest where it is not in the file.
        allow_tasks: tasks that may run here beside those that the file allows.
        wait_s: how long neighbours have to answer.
    """

    path: Path
    confirmed: str | None = None
    allow_tasks: tuple[str, ...] = ()
    wait_s: float = 5.0
    site: SiteFile | None = None
    study: Study | None = None
    """The study, once it is known to be the confirmed one."""
    identity: Identity | None = None
    """The keys, once they are known to be the member's."""
    contract_kept: bool | None = None
    """Whether this machine keeps the study's result contract, or its site has accepted the difference; None: it does not."""
    plan: Plan | None = None
    population: Population | None = None
    step_seconds: float | None = None
    """Seconds that one round's training takes here."""
    fsync_seconds: float | None = None
    status: Mapping[str, Any] | None = None
    """Status of the site's own node, where it runs."""
    state_holder: str | None = None
    """The process that holds the state folder; None: nobody does."""
    state_usable: bool | None = None
    """Whether a node could use the state folder; None: it could not."""
    edges: Mapping[str, EdgeMeasurement] | None = None
    """Measurements of the edges, by neighbour."""


def findings_of(error: P2PFLError, remedy: str) -> Iterator[Finding]:
    """Turn an error into findings; its own words on what to do come before the *remedy*, which is for sentences without."""
    if not isinstance(error, ConfigError):
        yield _split(str(error), remedy)
        return
    for text in error.findings:
        yield _split(f"{error.place}: {text}" if error.place else text, remedy)


def _split(text: str, remedy: str) -> Finding:
    parts = _REMEDY.split(text, maxsplit=1)
    return Finding(fault=parts[0], remedy=parts[1] if len(parts) > 1 else remedy)
