"""Where records come from: a run's folder, or a node at work that is asked for what it knows of the network."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from p2pfl.errors import ConfigError, P2PFLError, StoreError, TransportError
from p2pfl.records import RunRecords, read_run, records_of

_OWN, _ADDRESS = "run", "status.url"
"""In a node's state folder: its own records, and where it answers while it runs."""
_HOSTS = frozenset({"127.0.0.1", "localhost"})
_REQUEST_S = 5.0
_MOST_BYTES = 256 * 2**20


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody to another machine."""

    def redirect_request(self, *_: object) -> None:
        """None: what redirects is no node."""


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay)
"""Without the proxy that a hospital's machines use for everything else."""


def is_url(source: str) -> bool:
    """Whether a source is a node's address and not a folder."""
    return source.startswith(("http://", "https://"))


def read_source(source: str) -> RunRecords:
    """What there is now.

    Args:
        source: the folder of a run, or the address of a node's status endpoint on this machine, as its state folder's status.url has it. In
            the place of a node's own folder, state/run, stands what the node itself tells while it runs: it has heard of the others.

    Raises:
        ConfigError: no such folder, or an address that is not on this machine.
        StoreError: a file is damaged.
        TransportError: no node answers at that address.
    """
    if is_url(source):
        return _ask(source)
    own = read_run(Path(source))
    return _as_the_node_tells(own, Path(source)) or own if own.summary is None else own


def _as_the_node_tells(own: RunRecords, folder: Path) -> RunRecords | None:
    """The view of the node whose own folder this is; None where it does not run, or something else answers at its address."""
    address = folder.resolve().parent / _ADDRESS
    if folder.resolve().name != _OWN or not address.is_file():
        return None
    try:
        told = _ask(address.read_text(encoding="utf-8").strip())
    except (P2PFLError, OSError, ValueError):
        return None
    return told if told.environment == own.environment else None


def _ask(url: str) -> RunRecords:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or parts.hostname not in _HOSTS:
        raise ConfigError(f"{url!r}: a node answers only on its own machine: expected http://127.0.0.1:PORT/, as status.url has it")
    place = f"http://{parts.netloc}/run"
    try:
        with _OPENER.open(place, timeout=_REQUEST_S) as response:  # checked above
            content = response.read(_MOST_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        raise StoreError(f"{place}: what answers there is not a node of this version, or takes no part in the view ({error})") from error
    except http.client.HTTPException as error:
        raise StoreError(f"{place}: what answers there does not speak HTTP ({type(error).__name__}): it is not a node") from error
    except OSError as error:
        raise TransportError(f"{url}: no node answers ({error}); look into its state/status.url for where it is, or start it") from error
    try:
        return records_of(json.loads(content))
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{place}: what answers there is not a node of this version ({error})") from error
