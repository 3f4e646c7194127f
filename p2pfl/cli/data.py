"""``p2pfl data``: a site's table and its contract, and public data sets that do not ship with a library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from p2pfl.cli.options import Json
from p2pfl.cli.prepared import prepare
from p2pfl.cli.site_table import check, freeze

app = typer.Typer(no_args_is_help=True, help="Check a site's table against the contract, freeze its rows; download public data sets.")
app.command()(check)
app.command()(freeze)
app.command()(prepare)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `p2pfl data list` shows.")],
    *,
    folder: Annotated[Path | None, typer.Option(help="Folder for the files. Default: one in ~/.cache/p2pfl.")] = None,
    as_json: Json = False,
) -> None:
    """Download a data set and check that its files are the original ones.

    Example: p2pfl data fetch heart-disease
    """
    from p2pfl.data import sources
    from p2pfl.errors import ConfigError

    if name not in sources.SOURCES:
        raise ConfigError(f"NAME = {name!r}: one of {', '.join(sources.SOURCES)}")
    source = sources.SOURCES[name]
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigError(f"--folder = '{folder}': it is a file, expected a folder")
    paths = sources.fetch(source, folder)
    if as_json:
        typer.echo(
            json.dumps({"name": name, "files": [str(path) for path in paths], "licence": source.licence, "citation": source.citation})
        )
        return
    typer.echo(
        f"{source.title}\nLicence: {source.licence}. Please cite: {source.citation}\n{len(paths)} files, checked, in {paths[0].parent}"
    )


@app.command("list")
def list_(*, as_json: Json = False) -> None:
    """List the data sets that can be fetched, with licence and citation.

    Example: p2pfl data list
    """
    from p2pfl.data import sources

    if as_json:
        keys = ("name", "title", "url", "licence", "citation")
        typer.echo(json.dumps([{key: getattr(source, key) for key in keys} for source in sources.SOURCES.values()]))
        return
    for source in sources.SOURCES.values():
        typer.echo(f"{source.name}: {source.title}\n    Licence: {source.licence}. Citation: {source.citation}\n    {source.url}")
