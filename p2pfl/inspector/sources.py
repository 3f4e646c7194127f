"""Where records come from: a run's folder, or a node at work that is asked for what it knows of the network."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
from pathlib import Path

from p2pfl.errors import ConfigError, P2PFLError, StoreError, TransportError
from p2pfl.runs.records import RunRecords, read_run, records_of
from p2pfl.runs.status_client import ADDRESS, address_in, checked_token, fetch_page, has_ended, token_in

_OWN = "run"
"""In a node's state folder: its own records."""
TOKEN_VARIABLE = "P2PFL_STATUS_TOKEN"  # noqa: S105  # the variable's name


def is_url(source: str) -> bool:
    """Whether a source is a node's address and not a folder."""
    return source.startswith(("http://", "https://"))


def read_source(source: str) -> RunRecords:
    """Read the records that there are now in the folder of a run, or of a node at work on this machine.

    A node is its state folder's status.url, or the address that stands there, with what is in status.token in the environment variable
    P2PFL_STATUS_TOKEN. In the place of its own folder, state/run, stands what it tells while it runs: it has heard of the others.

    Raises:
        ConfigError: no such folder, or an address that is not on this machine.
        StoreError: a file is damaged.
        TransportError: no node answers at that address.
    """
    if is_url(source):
        given = os.environ.get(TOKEN_VARIABLE)
        return _ask(source, checked_token(given, TOKEN_VARIABLE) if given else None)
    if Path(source).name == ADDRESS:
        return _ask_in(Path(source).absolute().parent)
    own = read_run(Path(source))
    return _as_the_node_tells(own, Path(source)) or own if own.summary is None else own


def _as_the_node_tells(own: RunRecords, folder: Path) -> RunRecords | None:
    """The view of the node whose own folder this is; None where it does not run, or something else answers at its address."""
    state = folder.resolve().parent
    if folder.resolve().name != _OWN or not (state / ADDRESS).is_file():
        return None
    try:
        told = _ask_in(state)
    except (P2PFLError, OSError, ValueError):
        return None
    return told if told.environment == own.environment else None


def _ask_in(state: Path) -> RunRecords:
    url = address_in(state)
    if url is None or has_ended(state):
        raise TransportError(f"{state}: its node does not run: start it, or look at what it has recorded in {state / _OWN}")
    return _ask(url, token_in(state))


def _ask(url: str, token: str | None) -> RunRecords:
    place = f"{url.rstrip('/')}/run"
    try:
        content = fetch_page(url, "/run", token)
    except urllib.error.HTTPError as error:
        if error.code == http.client.UNAUTHORIZED:
            raise ConfigError(
                f"the node wants to be shown its token: give the path of its status.url, or set {TOKEN_VARIABLE} to what is in its state "
                "folder's status.token",
                url,
            ) from error
        raise StoreError(f"{place}: what answers there is not a node of this version, or takes no part in the view ({error})") from error
    except http.client.HTTPException as error:
        raise StoreError(f"{place}: what answers there does not speak HTTP ({type(error).__name__}): it is not a node") from error
    except OSError as error:
        raise TransportError(f"{url}: no node answers ({error}); look into its state/status.url for where it is, or start it") from error
    try:
        return records_of(json.loads(content))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError(f"{place}: what answers there is not a node of this version ({error})") from error
