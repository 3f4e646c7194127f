"""`p2pfl node`: the daemon of one institution."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from p2pfl.cli.options import AcceptDifference, AllowTask, Json
from p2pfl.cli.run import checked_kinds

if TYPE_CHECKING:
    from rich.console import Console

    from p2pfl.node.egress import Egress
    from p2pfl.node.egress_sums import AnalysisEgress
    from p2pfl.node.probe_site import ProbeReport

app = typer.Typer(no_args_is_help=True)

_WIDTH = 80
_PROBE_COLUMNS = 43

LogFormat = Literal["text", "json"]
SitePath = Annotated[Path, typer.Argument(metavar="SITE", help="This institution's site.yaml.")]


@app.command()
def start(
    site: SitePath,
    confirm: Annotated[str | None, typer.Option(metavar="DIGEST", help="Digest of the study. Default: `confirmed` in site.yaml.")] = None,
    start_anew: Annotated[
        bool, typer.Option("--start-anew", help="Put aside the state folder of a node that lost its state, and go on without it.")
    ] = False,
    without_old_state: Annotated[
        bool, typer.Option("--without-old-state", help="Begin without the model of the study that this one continues: it is lost.")
    ] = False,
    allow_task: AllowTask = None,
    only_these_tasks: Annotated[bool, typer.Option("--only-these-tasks", hidden=True)] = False,
    accept_difference: AcceptDifference = None,
    until_stdin_closes: Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)] = False,
    start_within_s: Annotated[float | None, typer.Option(hidden=True)] = None,
    disturbed_by: Annotated[Path | None, typer.Option(hidden=True)] = None,
    log_format: Annotated[  # noqa: ARG001  # `main` has looked it up, before anything was printed
        LogFormat, typer.Option(help="Form of all that is printed: text, or JSON lines with times in UTC.")
    ] = "text",
) -> None:
    """Run this institution's node until its network has finished. SIGTERM, SIGINT and SIGHUP pause it; the same command continues.

    Example: p2pfl node start site.yaml --confirm "3f1c 88a0 ..."
    """
    from p2pfl.cli.run import say_departures
    from p2pfl.node.site import SiteFile
    from p2pfl.node.start import start as run
    from p2pfl.runs.records import read_summary

    logging.getLogger("p2pfl").setLevel(logging.INFO)  # a daemon says one line a round
    if disturbed_by is not None:
        from p2pfl.testing.disturbance import disturb

        disturb(disturbed_by)
    reason = run(
        site,
        confirmed=confirm,
        until_stdin_closes=until_stdin_closes,
        start_anew=start_anew,
        start_within_s=start_within_s,
        allow_tasks=allow_task or (),
        only_these_tasks=only_these_tasks,
        accept_differences=checked_kinds(accept_difference),
        without_old_state=without_old_state,
    )
    if reason == "diverged":
        sys.stderr.write("p2pfl: diverged: the last training became non-finite and was rolled back; the study needs a lower optimizer.lr\n")
    sys.stdout.write(f"stopped: {reason}\n")
    if reason != "paused":
        sys.stdout.flush()
        say_departures(read_summary(SiteFile.load(site).state / "run"))


@app.command(hidden=True)
def fork_server(room: Annotated[str, typer.Argument(help="Blanks, in whose place each process shows its own command line.")]) -> None:  # noqa: ARG001
    """Fork a process for each line of standard input that asks for one; `p2pfl up` speaks to it."""
    from p2pfl.cli import main
    from p2pfl.launcher.fork_server import serve
    from p2pfl.yaml_files import prepare_check

    def prepare() -> None:
        from p2pfl.node.site import SiteFile

        prepare_check(SiteFile)

    def program(arguments: Sequence[str]) -> None:
        sys.argv = ["p2pfl", *arguments]
        main()

    serve(program, prepare=prepare)


@app.command()
def status(site: SitePath, as_json: Json = False) -> None:
    """Show the state of this institution's node. It also shows the node's links, and the records that it has from other nodes.

    Example: p2pfl node status site.yaml
    """
    from p2pfl.node.site import SiteFile
    from p2pfl.node.status import read_status

    state = SiteFile.load(site).state
    found = read_status(state)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    from rich.table import Table

    from p2pfl.cli.terminal import open_console

    console = open_console()
    if waiting_for := found.get("waiting_for"):
        console.print(f"{found['member']} waits for {len(waiting_for)} of {found['members']} members before it trains:", markup=False)
        for name, why in waiting_for.items():
            console.print(f"  {name}: {why}", markup=False, soft_wrap=True)
    if without := found.get("started_without"):
        console.print(f"the network started without {', '.join(without)}", markup=False)
    console.print(f"{found['member']}: round {found['round']} of {found['rounds']} training rounds, {found['bytes_sent']:,} bytes sent")
    for sentence in _standing(found):
        console.print(sentence, markup=False, soft_wrap=True)
    table = Table("neighbour", "link", "open", "exchange", "last seen", "skipped", "refused")
    for name, neighbour in found["neighbours"].items():
        ago = "never" if neighbour["last_seen_s_ago"] is None else f"{neighbour['last_seen_s_ago']:.1f} s ago"
        refused = ", ".join(f"{reason} {count}" for reason, count in neighbour["refused"].items()) or "-"
        table.add_row(
            name,
            f"{neighbour['link']} for {neighbour['link_for_s']:,.0f} s" if "link" in neighbour else "unknown",  # an earlier version's
            "yes" if neighbour["greeted"] else "no",
            str(neighbour["exchange"]),
            ago,
            f"{'yes' if neighbour['skipped'] else 'no'}{', paused' if neighbour.get('paused') else ''}",
            refused,
        )
    console.print(table)
    for name, neighbour in found["neighbours"].items():
        if neighbour.get("link_detail"):
            console.print(f"{name}: {neighbour['link_detail']}", markup=False, soft_wrap=True)
    if (network := found.get("network")) and found.get("started_with", []) is not None:  # before the start nobody has told of anything
        _network_status(console, network, state, str(found["member"]))


@app.command()
def probe(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="Where the node is, as on its card: tcp://host:port. Or its name.")],
    site: Annotated[Path, typer.Option(help="This institution's site.yaml, in whose name the probe speaks.")] = Path("site.yaml"),
    neighbour: Annotated[str | None, typer.Option(metavar="NAME", help="Whose node it is, where the address is on no card.")] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="State folder of the probed node, if it is on this machine: its counters say more."),
    ] = None,
    faulty: Annotated[
        bool,
        typer.Option("--faulty", help="Also send messages that must be refused. For a rehearsal: the node stops waiting for the member."),
    ] = False,
    allow_task: AllowTask = None,
    as_json: Json = False,
) -> None:
    """Greet a neighbour's running node, send one message of each kind, and print what it takes and what it refuses.

    The probe speaks with this site's keys and from the state that this site's node has left. So stop that one first. To the probed node
    it is a restart of the member that pauses at once: it waits for the member as for one that is restarted, and nothing is merged. Only
    before the first round it may take the probe for the member and start. Exit code 3: something is not as the protocol says.

    Example: p2pfl node probe tcp://node.hospital.example:7700 --site site.yaml
    """
    from p2pfl.node.probe_site import probe_node
    from p2pfl.runs.events import DEPARTED

    report = probe_node(address, site, neighbour=neighbour, state=state, faulty=faulty, allow_tasks=allow_task or ())
    if as_json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=2) + "\n")
    else:
        for line in _probe_lines(report):
            sys.stdout.write(line + "\n")
    if not report.is_as_expected:
        raise typer.Exit(DEPARTED)


def _probe_lines(report: ProbeReport) -> Iterator[str]:
    """A table of a probe's findings, at most 80 columns wide."""
    where = f" at {report.address}" if report.address else ", which dialled this site"
    yield from wrap(f"{report.member} greets {report.neighbour}{where}", _WIDTH)
    for found in report.findings:
        mark = "" if found.as_expected else "NOT AS EXPECTED: "
        answers = f"answered by {', '.join(found.answers)}" if found.answers else ""
        detail = mark + "; ".join(part for part in (found.reason, answers, found.detail) if part)
        first, *others = wrap(detail, _WIDTH - _PROBE_COLUMNS) or [""]
        yield f"  {found.message:<28} {found.outcome:<10}  {first}".rstrip()
        yield from (" " * _PROBE_COLUMNS + line for line in others)
    yield "as the protocol says, as far as it shows" if report.is_as_expected else "not as the protocol says"


@app.command()
def egress(
    site: SitePath,
    confirm: Annotated[str | None, typer.Option(metavar="DIGEST", help="Digest of the study. Default: `confirmed` in site.yaml.")] = None,
    allow_task: AllowTask = None,
    as_json: Json = False,
) -> None:
    """List everything that will leave this institution: to whom, through whom, in which tensors, how many bytes a round. Nothing is sent.

    Where the study has analyses, it lists their sums: which, how many numbers, to whom.

    Example: p2pfl node egress site.yaml
    """
    from p2pfl.errors import ConfigError
    from p2pfl.experiment.loading import load_study
    from p2pfl.node.egress import egress_of, egress_of_sums
    from p2pfl.node.egress_ways import relayed_by, ways_of
    from p2pfl.node.site import SiteFile
    from p2pfl.node.start import check_confirmed, own_plan
    from p2pfl.protocol.network_view import ViewPolicy

    own = SiteFile.load(site)
    study = load_study(own.study)
    check_confirmed(own, study, confirm, site)
    card = study.member(own.member)
    policy = ViewPolicy(bytes_per_s=own.view_bytes_per_s, metrics=own.view_metrics, counts=own.view_counts)
    analyses: Sequence[AnalysisEgress] = ()
    if study.analyses is not None:
        from p2pfl.node.egress_sums import sums_of

        analyses = sums_of(study, own.member, own.policy, str(own.study))
    ways: dict[str, Any] = {"ways": ways_of(own, study, card), "relayed": relayed_by(own, study, card), "analyses": analyses}
    try:
        plan = own_plan(own, study, site, (*(allow_task or ()), *own.allow_tasks))
    except ConfigError as error:
        if not analyses:
            raise
        found = egress_of_sums(card, str(error).splitlines()[0], **ways)
    else:
        found = egress_of(plan, card, policy, heartbeat_s=own.heartbeat_s, **ways)
    if as_json:
        sys.stdout.write(json.dumps(found.as_dict(), indent=2) + "\n")
        return
    _say_egress(found, has_table=own.table is not None)


def _say_egress(found: Egress, *, has_table: bool) -> None:
    """Print what leaves a site."""
    from rich.table import Table

    from p2pfl.cli.terminal import open_console

    console = open_console(markup=False, highlight=False)
    if found.no_updates is not None:
        console.print(f"{found.member} sends no updates, as no node of this study starts here: {found.no_updates}", soft_wrap=True)
    else:
        console.print(
            f"{found.member} sends updates to {', '.join(found.receivers) or 'nobody'}, to each of them in a round:", soft_wrap=True
        )
        table = Table("phase", "channel", "dtype", "shape", "bytes", "when")
        for one in found.tensors:
            shape = " x ".join(map(str, one.shape))
            table.add_row(
                str(one.phase), one.channel, one.dtype, shape, f"{one.size_bytes:,}", "on request" if one.on_request else "always"
            )
        console.print(table)
        console.print(f"made of the model's {', '.join(found.travels)}", soft_wrap=True)
        most = "at most " if found.is_most else ""
        total = f"{most}{found.update_bytes:,} bytes a round to each with headers, {found.round_bytes:,} to all"
        console.print(f"{total}; what is lost on the way is sent again", soft_wrap=True)
    for analysis in found.analyses:
        for line in analysis.lines:
            console.print(line, soft_wrap=True)
    if has_table and not found.analyses:
        console.print("The study lists no analysis: p2pfl stats together sends sums of the file that it is given", soft_wrap=True)
    for way in found.ways:
        console.print(way.text, soft_wrap=True)
    if found.relayed is not None:
        console.print(found.relayed.text, soft_wrap=True)
    for message in found.messages:
        most = "" if message.most_bytes is None else f", at most {message.most_bytes:,} bytes"
        console.print(f"{message.what}, to {message.to}, {message.when}{most}: {message.holds}", soft_wrap=True)
    of_table = "the table of the data contract, " if has_table else ""
    stays = f"{of_table}rows, labels, groups{''.join(f', {name}' for name in found.stays)}"
    console.print(f"What stays: {stays}, private keys, the optimiser's state", soft_wrap=True)


def _standing(found: dict[str, Any]) -> Iterator[str]:
    """Sentences on the node's disk, and on how far it was from its neighbours in its last round."""
    if found.get("disk_full"):
        yield f"it waits for room on its disk: {found['disk_full']}"
    if (disagreement := found["disagreement"]) is not None or found.get("last_round_time") is not None:
        far = "unknown (no models were compared in the last round)" if disagreement is None else f"{disagreement:.3g}"
        yield f"disagreement with neighbours {far}, agreed for {found['agreed_for']} rounds"


def _network_status(console: Console, network: dict[str, Any], state: Path, me: str) -> None:
    """How everybody is as far as the node has heard: a line for each member that is not known to be well."""
    from p2pfl.inspector.health import node_health
    from p2pfl.runs.records import heard_records

    rows, unheard = network["rows"], [name for name in network["not_heard_of"] if name != me]
    members = len(network["rows"]) + len(network["not_heard_of"])
    oldest = max((row["age_rounds"] for row in rows), default=0)
    silent = f"; never of {', '.join(unheard)}" if unheard else ""
    console.print(f"it has heard of {members - len(unheard)} of {members} members, at most {oldest} rounds ago{silent}", markup=False)
    for name, health in node_health(heard_records(network, state / "run")).items():
        if health.state not in ("well", "finished") and (name != me or rows):
            console.print(f"{name} is {health.state}: {health.why}", markup=False)
    last = network["certificate"]
    if last is not None and last["bound_low"] is not None:
        most = f" and at most {last['bound_high']:.3g}" if last["bound_high"] is not None else ", as far as is known"
        size = f" (the models' size is {last['rms_norm']:.3g})" if last["rms_norm"] else ""
        console.print(f"in round {last['round']} the disagreement was at least {last['bound_low']:.3g}{most}{size}", markup=False)
