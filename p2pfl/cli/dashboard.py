"""``p2pfl dashboard``: runs in a browser, while they go."""

from __future__ import annotations

from typing import Annotated

import typer


def dashboard(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|STATUS.URL...", help="Folders of runs, or the state/status.url of a node at work; several are compared."
        ),
    ],
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
    opens: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in this user's browser.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help='Print the address as one JSON object, {"url": ...}.')] = False,
) -> None:
    """Show runs on a page in the browser that renews itself: graph, agreement, late and lost nodes, every site. Ctrl-C ends it.

    It listens on 127.0.0.1 only, and lets in whoever has the token in the address that it prints.

    Example: p2pfl dashboard runs/breast-cancer

    Example: p2pfl dashboard runs/ring runs/torus --port 8080
    """
    import json

    from p2pfl.inspector.dashboard.server import serve

    def say(url: str) -> None:
        typer.echo(json.dumps({"url": url}) if as_json else url)

    try:
        serve(sources, port=port, opens=opens, say=say)
    except KeyboardInterrupt:
        return
