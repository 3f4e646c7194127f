"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Nodes = Annotated[int | None, typer.Option("--nodes", help="Partition the task's rows into so many nodes.", show_default=False)]
Rounds = Annotated[int | None, typer.Option("--rounds", help="Number of training rounds.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a key, such as algorithm.local_steps=10.", show_default=False),
]
AcceptDifference = Annotated[
    list[str] | None,
    typer.Option(
        "--accept-difference",
        metavar="KIND",
        help="Accept a difference from the study's result contract, on record: torch, task, arithmetic or wire.",
        show_default=False,
    ),
]
AllowTask = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-task",
        metavar="NAME",
        help="Let the code of this task run: distribution:entry or module:function; can be repeated.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
