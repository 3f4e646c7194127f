"""The command line, and its exit codes: 0 as agreed, 1 it broke, 2 what was asked is wrong, 3 it ended and not as agreed."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import NoReturn

import typer
import typer.main

import p2pfl
from p2pfl.cli import data, keys, node, stats, study, topology
from p2pfl.cli.chaos import chaos
from p2pfl.cli.doctor import doctor
from p2pfl.cli.inspect import dashboard, inspect
from p2pfl.cli.run import predict, simulate, up
from p2pfl.cli.streams import asks_for_json, guard_streams, log_handler, print_json_lines
from p2pfl.cli.sweep import sweep
from p2pfl.errors import ConfigError, MembersMissing, P2PFLError

_EXIT_CODES = """\b
Exit codes:
  0  the command did all that was agreed, or a signal paused a run,
     which then prints how to continue it
  1  a disk, a process or the task's code failed
  2  the command or a file is wrong; nothing was run, or `doctor`
     has found something to mend
  3  the run ended with departures from what was agreed: members
     missing, rounds missed, state lost, numbers that are not finite,
     no mixing; summary.json lists them
  130, 143, 129  Ctrl-C, SIGTERM or SIGHUP ended a command that cannot
     be continued
"""

app = typer.Typer(
    name="p2pfl",
    epilog=_EXIT_CODES,
    help="Train a model among institutions that cannot pool their data. Neighbours exchange encrypted updates, without a server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(up)
app.command()(simulate)
app.command()(sweep)
app.command()(inspect)
app.command()(dashboard)
app.command()(predict)
app.command()(chaos)
app.command()(doctor)
app.add_typer(topology.app, name="topology", help="List, show and compare graphs, and advise on links.")
app.add_typer(keys.app, name="keys", help="Make and show a site's keys and its public card.")
app.add_typer(study.app, name="study", help="Make, check and join a study, which all its members confirm.")
app.add_typer(node.app, name="node", help="Run one institution's node, and show its state.")
app.add_typer(data.app, name="data", help="Check a site's table, freeze its rows; download public data sets.")
app.add_typer(stats.app, name="stats", help="Describe, fit and compare over sites, as if their rows were pooled.")


def _say_version(asked: bool) -> None:  # typer's way of calling
    if asked:
        typer.echo(f"p2pfl {p2pfl.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log more on standard error: level INFO."),
    version: bool = typer.Option(False, "--version", help="Print the version and stop.", callback=_say_version, is_eager=True),  # noqa: ARG001
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[log_handler()])
    logging.getLogger("p2pfl.evaluation.progress").setLevel(logging.INFO)  # what takes long says so


@cache
def command_line() -> Callable[[], object]:
    """All commands; made once, also for the processes that are forked from this one."""
    return typer.main.get_command(app)


def main() -> NoReturn:
    """Run the command line, and exit with its code."""
    guard_streams()
    if asks_for_json(sys.argv):
        print_json_lines()
    try:
        command_line()()
    except P2PFLError as error:
        rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        sys.stderr.write(f"p2pfl{rank}: {error}\n")
        sys.exit(2 if isinstance(error, ConfigError) else 3 if isinstance(error, MembersMissing) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
