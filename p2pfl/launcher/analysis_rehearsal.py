"""An analysis by secure sums between nodes that are all on this machine, each a process, by the path that institutions take."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from p2pfl.analyses.agreed import read_analysis
from p2pfl.analyses.site_files import SiteSettings, load_settings, load_sites
from p2pfl.data.cohort_files import KEY_FILE
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError, MembersMissing, P2PFLError, store_error
from p2pfl.experiment.graph import build_schedule
from p2pfl.experiment.loading import resolve
from p2pfl.governance.card import Card
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.launcher.processes import PYTHON, own_path
from p2pfl.protocol.sum_terms import FEWEST_PARTICIPANTS
from p2pfl.transports import reserve_port
from p2pfl.yaml_files import dump_yaml, load_yaml

GRACE_S: Final = 20.0
"""Once a node has failed, the others have heard of it after so long, or they wait for it in vain."""
_POLL_S = 0.05
_STOP_S = 10.0
_ASKED_WRONGLY, _NOT_AS_AGREED = 2, 3
"""Exit codes of a node."""


@dataclass(eq=False)
class Member:
    """One node's process with its files."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    is_stopped: bool = False
    """Whether it was stopped because another one failed."""

    def start(self, analysis: Path, options: Sequence[str]) -> None:
        """Start what an administrator would start."""
        with (self.folder / "result").open("wb") as output, (self.folder / "node.log").open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603  # our own command
                [*PYTHON, "-m", "p2pfl", "stats", "together", str(analysis), str(self.folder / "site.yaml"), *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env={"OMP_NUM_THREADS": "1", **os.environ, **own_path()},
            )

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs."""
        return None if self.process is None else self.process.poll()

    @property
    def result(self) -> str:
        """Text that the node has printed."""
        return (self.folder / "result").read_text(encoding="utf-8", errors="replace")

    def said(self) -> list[str]:
        """Lines of its log."""
        return (self.folder / "node.log").read_text(encoding="utf-8", errors="replace").splitlines()


def rehearse_analysis(analysis: Path, sites: Sequence[Path], place: Path, *, options: Sequence[str] = (), first: Sequence[str] = ()) -> str:
    """Run an analysis with one node for each site, over encrypted sockets on 127.0.0.1; the nodes have keys and a study of their own.

    Args:
        analysis: its file, as `stats together` takes it.
        sites: their files, each with the section `table:` and perhaps `policy:`; other keys of a node are not used.
        place: folder for keys, study, results and logs; it is made once the files are found right.
        options: of the command that each node runs.
        first: more options for the node of the first site.

    Returns:
        What all nodes have printed.

    Raises:
        ConfigError: a file is wrong, a site refuses, or the floors or the model do not hold; what each node said of it.
        MembersMissing: a node was away for too long.
        P2PFLError: a node broke, or results differ.
    """
    settings = _settings(sites)
    _check_rows(analysis, sites, settings)
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise store_error(place, error) from error
    with ExitStack() as stack:
        members = found_sites(settings, place, stack)
        try:
            for number, member in enumerate(members):
                member.start(analysis.absolute(), [*options, *(first if number == 0 else ())])
            _wait_for(members)
        finally:
            _stop(members)
    if failed := [each for each in members if each.code != 0 and not each.is_stopped]:
        raise _error_of(failed)
    if differing := [each.name for each in members if each.result != members[0].result]:
        raise P2PFLError(f"{', '.join(differing)}: another result than that of {members[0].name}; their files are in {place}")
    return members[0].result


def _settings(sites: Sequence[Path]) -> list[SiteSettings]:
    """Read what the sites' files say, with every fault at once."""
    findings: list[str] = []
    found: list[SiteSettings] = []
    for site in sites:
        try:
            settings = load_settings(site)
        except ConfigError as error:
            findings += [f"{site}: {each}" for each in error.findings]
            continue
        if settings.name in [each.name for each in found]:
            findings.append(f"{site}: another site has the name {settings.name} already; say member: NAME in its file")
        found.append(settings)
    if len(sites) < FEWEST_PARTICIPANTS:
        findings.append(f"{len(sites)} sites: secure sums want {FEWEST_PARTICIPANTS} at least, so that none is known from the others'")
    if findings:
        raise ConfigError(findings)
    return found


def _check_rows(analysis: Path, sites: Sequence[Path], settings: Sequence[SiteSettings]) -> None:
    """Find before any node is started what is wrong with the analysis or a table; a policy is for its own node."""
    spec, named = read_analysis(analysis)
    file = named if named is not None else settings[0].section.contract
    if file is not None:  # else each node says so
        contract = Contract.load(file)
        spec.check(contract)
        load_sites(sites, contract)


def found_sites(sites: Sequence[SiteSettings], place: Path, stack: ExitStack) -> list[Member]:
    """Make keys, cards, a study on a ring, and a node's file for each site."""
    names = [site.name for site in sites]
    experiment = resolve(
        {"task": {"name": "averaging", "dimension": 1}, "nodes": len(names), "topology": {"name": "ring"}, "rounds": 1, "baselines": []}
    )
    cards: list[Card] = []
    for name in names:
        identity = Identity.new()
        identity.save(place / "sites" / name / "keys")
        cards.append(identity.card(name=name, address=stack.enter_context(reserve_port()).address))
    study = Study.create(experiment.as_dict(), cards, build_schedule(experiment, sorted(names)).union())
    study.save(place / "study.yaml")
    for site, card in zip(sites, cards, strict=True):
        folder = place / "sites" / site.name
        if (key := site.section.keys / KEY_FILE).is_file():  # frozen rows are found by it
            shutil.copy(key, folder / "keys" / KEY_FILE)
        of_a_node = {"study": "../../study.yaml", "keys": "keys", "confirmed": study.digest, "state": "state", "listen": card.address}
        content = dump_yaml({"member": site.name, **of_a_node, **_of_a_table(site)})
        (folder / "site.yaml").write_text(content, encoding="utf-8")
    return [Member(name=name, folder=place / "sites" / name) for name in names]


def _of_a_table(site: SiteSettings) -> dict[str, Any]:
    """Keys of a site's file for its table, its frozen rows and its policy, with absolute paths."""
    raw, section = load_yaml(site.section.place), site.section
    table = dict(raw["table"])
    for key, written in section.table.paths().items():
        path = str((section.folder / Path(written).expanduser()).absolute())
        if key == "sql.url":
            table["sql"] = {**table["sql"], "url": f"sqlite:///{path}"}
        elif key.startswith("sql."):
            table["sql"] = {**table["sql"], key.removeprefix("sql."): path}
        else:
            table[key] = path
    found: dict[str, Any] = {"table": table, "cohort": str(section.cohort)}
    if section.contract is not None:
        found["contract"] = str(section.contract)
    return found | ({"policy": raw["policy"]} if "policy" in raw else {})


def _wait_for(members: Sequence[Member]) -> None:
    """Wait until all have ended, or one has failed and the others have had the time to hear of it."""
    failed_s: float | None = None
    while any(each.code is None for each in members):
        if failed_s is None and any(each.code for each in members):
            failed_s = time.monotonic()
        if failed_s is not None and time.monotonic() - failed_s > GRACE_S:
            return
        time.sleep(_POLL_S)


def _stop(members: Sequence[Member]) -> None:
    """Leave no process behind."""
    at_work = [each for each in members if each.process is not None and each.code is None]
    for each in at_work:
        assert each.process is not None
        each.is_stopped = True
        each.process.terminate()
    for each in at_work:
        assert each.process is not None
        try:
            each.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            each.process.kill()
            each.process.wait()


def _error_of(failed: Sequence[Member]) -> P2PFLError:
    """The error of all nodes that failed, with what each of them said, once where it is the same."""
    said: dict[str, list[str]] = {}
    for member in failed:
        for line in member.said() or [f"ended with exit code {member.code}"]:
            said.setdefault(line.removeprefix("p2pfl: "), []).append(member.name)
    findings = [line if len(names) == len(failed) > 1 else f"{', '.join(names)}: {line}" for line, names in said.items()]
    codes = {member.code for member in failed}
    if codes <= {_ASKED_WRONGLY, _NOT_AS_AGREED}:
        return ConfigError(findings) if _ASKED_WRONGLY in codes else MembersMissing("\n".join(findings))
    return P2PFLError("\n".join(findings))
