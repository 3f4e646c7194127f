"""`p2pfl chaos`: an experiment with real daemons and real faults on this machine, and what the faults cost."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import typer

from p2pfl.cli.long_runs import pausable
from p2pfl.cli.new_files import write_new
from p2pfl.cli.options import AllowTask, Json, Nodes, Rounds, Set
from p2pfl.cli.run import of_file, overrides_from
from p2pfl.errors import ConfigError, P2PFLError
from p2pfl.runs.events import DEPARTED

if TYPE_CHECKING:
    from p2pfl.testing.chaos import ChaosReport
    from p2pfl.testing.staging import Progress

_KINDS = "kill,pause,partition,throttle,loss,corrupt,clock,dns"
_EVERY_S = 5.0


def chaos(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="A YAML file, see examples/.")],
    plan: Annotated[
        str | None, typer.Option("--plan", metavar="KIND,...", help=f"Kinds of faults that are drawn. Default: {_KINDS}; also: cut, slow.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the faults; the experiment has its own.")] = 0,
    faults: Annotated[Path | None, typer.Option(metavar="FILE", help="Faults from a file, in the place of --plan and --seed.")] = None,
    write_plan: Annotated[
        Path | None,
        typer.Option("--write-plan", metavar="FILE", help="Write the faults to a file and stop; p2pfl simulate --faults reads it."),
    ] = None,
    nodes: Nodes = None,
    rounds: Rounds = None,
    assignments: Set = None,
    out: Annotated[Path | None, typer.Option("--out", help="New folder for the run. Default: runs/NAME-chaos.")] = None,
    allow_task: AllowTask = None,
    as_json: Json = False,
) -> None:
    """Run an experiment with real daemons on this machine while faults happen, and report what they cost.

    The exit code is 0 if all faults began, all nodes ended at one agreed round and the mean has drifted by less than 1e-6, else 3.

    Example: p2pfl chaos examples/breast_cancer.yaml --plan kill,partition --seed 7
    """
    from p2pfl.experiment.loading import resolve
    from p2pfl.faults.drawing import kinds_of
    from p2pfl.faults.plan_file import FaultPlan
    from p2pfl.launcher.processes import ForkServer, can_fork

    if faults is not None and (plan is not None or seed):
        raise ConfigError("--faults has its own kinds and its own seed: leave out --plan and --seed")
    kinds = kinds_of(_KINDS if plan is None else plan)
    given = FaultPlan.load(faults) if faults is not None else None
    resolved = resolve(experiment, overrides_from(nodes, rounds, assignments))
    with of_file(experiment), ForkServer() if can_fork() and write_plan is None else nullcontext() as fork, pausable(hears=True):
        from p2pfl.testing.chaos import draw_plan, neighbours_of, plan_of, run_chaos

        made = plan_of(resolved, allow_task or ())
        if given is not None:
            given.script(neighbours_of(made), str(faults))
        drawn = given if given is not None else draw_plan(made.experiment, neighbours_of(made), kinds, seed)
        if write_plan is not None:
            write_new(write_plan, drawn.text)
            if as_json:
                sys.stdout.write(json.dumps({"faults": len(drawn.faults), "nodes": len(made.names), "file": str(write_plan)}) + "\n")
            else:
                sys.stdout.write(f"{len(drawn.faults)} faults of {len(made.names)} nodes are in {write_plan}\n")
            return
        place = out if out is not None else Path("runs") / f"{resolved.name}-chaos"
        try:
            report = run_chaos(
                made,
                drawn,
                place=place,
                allow_tasks=allow_task or (),
                fork=fork,
                progress=None if as_json else _progress(len(drawn.faults)),
            )
        except TimeoutError as error:
            raise P2PFLError(str(error)) from error
    if as_json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=2) + "\n")
    else:
        _say(report, place)
    for sentence in report.departures:
        sys.stderr.write(f"p2pfl: not as agreed: {sentence}\n")
    if report.departures:
        raise typer.Exit(DEPARTED)


def _progress(num_faults: int) -> Progress:
    """A line on standard error every five seconds."""
    said_s = monotonic()

    def tell(furthest: int, begun: int) -> None:
        nonlocal said_s
        if monotonic() - said_s >= _EVERY_S:
            said_s = monotonic()
            sys.stderr.write(f"round {furthest}, {begun} of {num_faults} faults have begun\n")
            sys.stderr.flush()

    return tell


def _say(report: ChaosReport, place: Path) -> None:
    from rich.table import Table

    from p2pfl.cli.terminal import open_console

    console = open_console()

    def shown(value: float | None, form: str = ".1f") -> str:
        return "-" if value is None else format(value, form)

    table = Table("fault", "round", "began s", "ended s", "recovered s")
    for fault in report.faults:
        began = "-" if fault.began_round is None else str(fault.began_round)
        table.add_row(fault.what, began, shown(fault.began_s), shown(fault.ended_s), shown(fault.recovered_s))
    console.print(table)
    table = Table("node", "ended at", "lost", "alone", "starts", "exit", "stop reason")
    for node in report.nodes:
        ended = "-" if node.rounds is None else str(node.rounds)
        code = "-" if node.exit_code is None else str(node.exit_code)
        table.add_row(node.name, ended, str(node.lost), str(node.alone), str(node.starts), code, node.stop_reason or "-")
    console.print(table)
    if report.metrics:
        table = Table("metric, mean over nodes", "undisturbed", "with faults")
        for name, (before, after) in report.metrics.items():
            table.add_row(name, shown(before, ".4f"), shown(after, ".4f"))
        console.print(table)
    drift = f"drift of the mean {report.drift.value:.2g}" if report.drift.value is not None else "drift of the mean unknown"
    ended = f"all ended after round {report.agreed_round}" if report.agreed_round is not None else "no round that all ended at"
    console.print(f"{ended}, {drift}, {report.seconds:.0f} s", soft_wrap=True)
    console.print("lost: rounds jumped over or not trained; alone: rounds without any neighbour", soft_wrap=True)
    console.print(f"the report is in {place / 'chaos.json'}; more: p2pfl inspect {place}", soft_wrap=True)
