"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Nodes = Annotated[int | None, typer.Option("--nodes", help="Partition the task's rows into so many nodes.")]
Rounds = Annotated[int | None, typer.Option("--rounds", help="Number of training rounds.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key, such as algorithm.local_steps=10.")]
AcceptDifference = Annotated[
    list[str] | None,
    typer.Option(
        "--accept-difference",
        metavar="KIND",
        help="Accept a difference from the study's result contract, on record: torch, task, arithmetic or wire.",
    ),
]
AllowTask = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-task", metavar="NAME", help="Let the code of this task run: distribution:entry or module:function; can be repeated."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
