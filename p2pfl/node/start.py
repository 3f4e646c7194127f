"""Start the node of a site from the site's file."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from p2pfl.errors import ConfigError, TaskNotAllowed
from p2pfl.experiment.loading import load_study, recorded_experiment
from p2pfl.experiment.plan import Plan, load_sites, make_plan
from p2pfl.governance.identity import Identity
from p2pfl.governance.result_contract import accepted
from p2pfl.governance.study import Study, TensorRow, confirms, layout_faults
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.node.clock import Timeouts
from p2pfl.node.continuation import continued_plan
from p2pfl.node.daemon import Daemon
from p2pfl.node.node import Node
from p2pfl.node.own_contract import differences_here
from p2pfl.node.own_links import own_links
from p2pfl.node.round_steps import TRIM_FROM_BYTES
from p2pfl.node.site import SiteFile
from p2pfl.node.state_folder import held_state
from p2pfl.protocol.agreed_start import Signing
from p2pfl.protocol.network_view import ViewPolicy
from p2pfl.runs.open_files import raise_file_limit
from p2pfl.training.freed_memory import return_freed_memory, return_large_at_once
from p2pfl.wire.negotiation import announcing
from p2pfl.yaml_files import check

log = logging.getLogger(__name__)


def start(
    site_path: Path,
    *,
    confirmed: str | None = None,
    until_stdin_closes: bool = False,
    start_anew: bool = False,
    start_within_s: float | None = None,
    allow_tasks: Collection[str] = (),
    only_these_tasks: bool = False,
    accept_differences: Sequence[str] = (),
    without_old_state: bool = False,
) -> str:
    """Run the node of a site until its network stops or somebody stops it; returns the stop reason.

    Args:
        site_path: its site.yaml.
        confirmed: the study's digest as the administrator confirmed it; None: the one in the file.
        start_anew: put aside what is in the state folder and begin without it, as the administrator has decided.
        until_stdin_closes: also stop when standard input ends, for a parent that must leave no process behind.
        start_within_s: wait no longer than this for all members; None: as long as the study says.
        allow_tasks: tasks that may run here beside the built-in ones and those that site.yaml allows.
        only_these_tasks: leave out those of site.yaml, for a parent whose folders may have come from somebody else.
        accept_differences: kinds of differences from the study's result contract, beside those in the file.
        without_old_state: begin as the study says, where the study goes on from a model that is no longer here.

    Raises:
        ConfigError: a file is wrong, the digest was not confirmed or is another, the site's data or its old state are not there.
        StoreError: the disk failed.
        MembersMissing: fewer members than the study requires were there in time; nobody has trained.
    """
    raise_file_limit()
    site = SiteFile.load(site_path)
    study = load_study(site.study)
    check_confirmed(site, study, confirmed, site_path)
    identity = Identity.load(site.keys, site.passphrase_file)
    card = study.member(site.member)
    if not identity.owns(card):
        raise ConfigError(f"keys = {str(site.keys)!r}: not those of {site.member} in the study", str(site_path))
    if study.contract is not None or card.cohort is not None:
        from p2pfl.node.own_table import check_own_table  # a study without a contract does without analyses

        check_own_table(site, study, site_path)
    torch.set_num_threads(site.threads)
    found = differences_here(study.result_contract, study.task_name)
    differs = accepted(found, {*site.accept_differences, *accept_differences}, str(site_path))  # before the task's code runs
    for difference in differs:
        log.warning("this site has accepted: %s", difference.detail)
    plan = own_plan(site, study, site_path, (*allow_tasks, *(() if only_these_tasks else site.allow_tasks)))
    links = own_links(site, study, card, identity.curve_secret)
    waits_s = [plan.experiment.require.within_s]
    if site.greet_timeout_s is not None:
        log.warning("greet_timeout_s in %s will go with the next version: it is require.within_s in the experiment now", site_path)
        waits_s = [site.greet_timeout_s]
    if start_within_s is not None:
        waits_s.append(start_within_s)
    keys = {member.name: bytes.fromhex(member.identity) for member in study.members}
    with held_state(site.state, site.state_group):
        if start_anew:
            _put_aside(site.state)
        plan, beginning = continued_plan(plan, study.continues, site, site_path, without_old_state=without_old_state)
        node = Node(
            plan,
            card.name,
            links,
            study_digest=study.digest,
            state=site.state,
            timeouts=Timeouts(
                start_within_s=min(waits_s),
                deadline_floor_s=site.deadline_floor_s,
                deadline_factor=site.deadline_factor,
                linger_s=site.linger_s,
                round_at_least_s=site.round_at_least_s,
            ),
            incarnation=announcing(secrets.randbits(64)),
            signing=Signing(keys=keys, sign=identity.signing.sign),
            start_anew=start_anew,
            accepted_differences=differs,
            spill_mb=site.spill_mb,
            send_mbit_s=site.send_mbit_s,
            beginning=beginning,
            view=ViewPolicy(bytes_per_s=site.view_bytes_per_s, metrics=site.view_metrics, counts=site.view_counts),
        )
        host, port = site.status_address
        daemon = Daemon(node, status_host=host, status_port=port)
        if plan.layout.size_bytes >= TRIM_FROM_BYTES:
            return_large_at_once()
        memory = daemon.memory()
        return_freed_memory()
        log.info("memory: %s", memory.text)
        return asyncio.run(_run(daemon, until_stdin_closes=until_stdin_closes))


async def _run(daemon: Daemon, *, until_stdin_closes: bool) -> str:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup has it ignored, and means it
            loop.add_signal_handler(number, daemon.stop, f"by {number.name}")
    if until_stdin_closes:

        def read() -> None:
            if not os.read(sys.stdin.fileno(), 4096):
                loop.remove_reader(sys.stdin.fileno())
                daemon.stop()

        loop.add_reader(sys.stdin.fileno(), read)
    return await daemon.run()


def _put_aside(state: Path) -> None:
    """Move a node's state into a folder of its own, so that nothing is lost by a wrong decision."""
    found = [state / name for name in (CHECKPOINT, "run") if (state / name).exists()]
    if found:
        aside = state / f"before-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
        aside.mkdir(mode=0o700)
        for path in found:
            path.rename(aside / path.name)
        log.info("what was in %s has been put aside in %s", state, aside.name)


def check_confirmed(site: SiteFile, study: Study, confirmed: str | None, place: Path) -> None:
    """Refuse a study whose digest was not confirmed, or is another than the one that was."""
    given = confirmed if confirmed is not None else site.confirmed
    if given is None:
        raise ConfigError(
            "confirmed: required, but missing: compare the digest that p2pfl study show prints with the other members, by telephone, "
            "then write it here or start with --confirm DIGEST",
            str(place),
        )
    if not confirms(study, given):
        # the digest itself is not said: it would be pasted in unread
        raise ConfigError(
            f"confirmed = {given!r}: the study in {site.study} has another digest; compare it with the other members", str(place)
        )


def own_plan(site: SiteFile, study: Study, place: Path, allow_tasks: Collection[str]) -> Plan:
    """Make the plan of a study with the rows that are at this site; ConfigError where they, or the model, are not what the study says."""
    experiment = recorded_experiment(study.experiment, str(site.study))
    if experiment.compiled == "auto" and experiment.schema != 1:  # members would each find an answer of their own
        experiment = replace(experiment, compiled="off")
    try:
        task = load_sites(experiment, site.task, allow_tasks=allow_tasks, site_file=place)
    except TaskNotAllowed as error:
        raise TaskNotAllowed(error.findings, str(site.study)) from error
    mine = [s for s in task.sites if s.name == site.member]
    if not mine:
        names = ", ".join(s.name for s in task.sites)
        raise ConfigError(f"member = {site.member!r}: the task {task.name} has no site of that name here, only {names}", str(place))
    shown, found = study.member(site.member).moments, mine[0].moments
    if "scale" in experiment.task.options and shown is not None and found is not None and not shown.is_close(found):
        raise ConfigError(
            f"moments: the means and deviations on the card of {site.member} are not those of its data; run: p2pfl keys describe",
            str(place),
        )
    samples = {card.name: card.samples or 0 for card in study.members} if experiment.weighting == "samples" else None
    said, rows = study.member(site.member).samples, len(mine[0].train[0]) if mine[0].train else 0
    counts = samples is not None or (experiment.weights == "stationary" and said is not None)
    if counts and rows != (said or 0):
        raise ConfigError(
            f"samples: the card of {site.member} says {said or 0}, its data have {rows} training rows; make a new card", str(place)
        )
    plan = make_plan(experiment, replace(task, sites=mine), names=study.names, topology=study.topology(), samples=samples)
    if study.layout is not None:
        own = [check(TensorRow, row, "layout") for row in plan.layout.table()]
        if faults := layout_faults(study.layout, own):
            raise ConfigError([f"layout: {fault}" for fault in faults], str(place))
    return plan
