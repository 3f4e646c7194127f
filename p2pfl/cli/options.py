"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Nodes = Annotated[int | None, typer.Option("--nodes", help="Number of nodes that share the task's rows. Default: as the experiment says.")]
Rounds = Annotated[int | None, typer.Option("--rounds", help="Number of rounds. Default: as the experiment says.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key (optimizer.lr=.1); can be repeated.")]
AcceptDifference = Annotated[
    list[str] | None,
    typer.Option(
        "--accept-difference",
        metavar="KIND",
        help="Accept and record a kind of difference from the study's result contract: torch, task, arithmetic or wire; can be repeated.",
    ),
]
AllowTask = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-task", metavar="NAME", help="Allow a task's code to run: distribution:entry or module:function; can be repeated."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
