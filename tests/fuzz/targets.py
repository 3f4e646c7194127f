"""One fuzz target for each parser of what others write: it takes any bytes, and lets only the errors out that the parser declares.

A target writes the bytes where the parser looks for them, calls it as p2pfl does, and uses what it gets. An exception that is not
declared goes through and is a finding. Bounds of time and memory are set by whoever calls the targets.
"""

from __future__ import annotations

import io
import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

import wire_samples
from networks import PATIENT, STUDY, averaging, signing_of
from p2pfl.cli.inspect import inspect
from p2pfl.data.columns import read_columns
from p2pfl.errors import BadMessage, ConfigError, PeerError, StoreError
from p2pfl.evaluation.results import read_buffers, read_models
from p2pfl.experiment.loading import load_experiment, load_study
from p2pfl.experiment.plan import Plan
from p2pfl.governance.card import Card
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.inspector.dashboard.board import Board
from p2pfl.inspector.terminal import print_page
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.node.daemon import Daemon
from p2pfl.node.node import Node
from p2pfl.node.site import SiteFile
from p2pfl.node.status import Answer, requested
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint
from p2pfl.runs.records import damage_told, records_of
from p2pfl.topology import files as graph_files
from p2pfl.transports import MemoryNetwork
from p2pfl.wire import ready_record, round_record
from p2pfl.wire.codec import decode, encode
from p2pfl.wire.link import LinkSession
from p2pfl.wire.sum_codec import SumAssembly, encode_sum

CORPUS: Final = Path(__file__).parent / "corpus"
"""A folder for each target, with the inputs that every search begins with: valid ones, and what was once a finding."""

GRAPH_SUFFIXES: Final = (".yaml", ".graphml", ".gml", ".json", ".edgelist")
SECTION: Final = b"\n== "
"""Begins the name of a file in an input that stands for a folder; the file's content follows on the next line."""

RECORDS: Final = (
    "experiment.yaml",
    "environment.json",
    "topology.json",
    "rounds.jsonl",
    "nodes.jsonl",
    "events.jsonl",
    "network.jsonl",
    "cross_site.json",
    "subgroups.json",
    "worth.json",
    "summary.json",
)
MOST_FRAMES = 64
MOST_SUM_BYTES = 2**20
PASSPHRASE: Final = b"correct horse"
TOKEN: Final = "0123456789abcdef" * 4


def frames_of(content: bytes) -> Iterator[list[bytes]]:
    """Messages that an input stands for: a byte with the number of frames, each frame behind its length in two bytes."""
    source, num_frames = io.BytesIO(content), 0
    while (count := source.read(1)) and num_frames < MOST_FRAMES:
        frames = []
        for _ in range(count[0] % 4):
            length = source.read(2)
            frames.append(source.read(struct.unpack("<H", length)[0] if len(length) == 2 else 0))
        num_frames += max(1, len(frames))
        yield frames


def bytes_of(*messages: list[bytes]) -> bytes:
    """The input that stands for messages; the inverse of `frames_of`."""
    return b"".join(
        bytes([len(frames)]) + b"".join(struct.pack("<H", len(frame)) + bytes(frame) for frame in frames) for frames in messages
    )


def folder_of(content: bytes, folder: Path) -> None:
    """Write the files that an input stands for."""
    for part in content.split(SECTION)[1:]:
        name, _, rest = part.partition(b"\n")
        if name.decode("latin-1") in RECORDS:
            (folder / name.decode()).write_bytes(rest)


def wire(content: bytes) -> None:
    """Messages of one neighbour, through codec, link and assembly of updates."""
    sessions = [
        LinkSession(peer="hospital-1", member="hospital-0", terms=wire_samples.TERMS, incarnation=11, formats=formats)
        for formats in ([wire_samples.SMALL], [wire_samples.ENCODED, wire_samples.SMALL])
    ]
    for frames in frames_of(content):
        with suppress(BadMessage):
            message, payload = decode(frames)
            again = encode(message, payload if payload.nbytes else None)
            assert decode(again)[0] == message, "a message changes by being encoded"
        for session in sessions:
            with suppress(PeerError):
                session.receive(frames, exchange=7)


def sums(content: bytes) -> None:
    """Messages of one neighbour in secure sums."""
    assembly = SumAssembly(MOST_SUM_BYTES)
    for frames in frames_of(content):
        with suppress(BadMessage):
            message = assembly.receive(frames)
            if message is not None:
                pieces = [*encode_sum(message)]
                again = [SumAssembly(MOST_SUM_BYTES).receive(each) for each in pieces[:1] if len(pieces) == 1]
                assert all([*encode_sum(each)] == pieces for each in again if each is not None), "a message changes by being encoded"


def sealed(content: bytes) -> None:
    """Signed records as they travel, by the kinds that there are."""
    for kind in (round_record, ready_record):
        with suppress(BadMessage):
            again = kind.seal(kind.unseal(content), lambda _: bytes(64), bytes(32))  # numbers are shortened, once
            assert kind.seal(kind.unseal(again), lambda _: bytes(64), bytes(32)) == again, "a record changes by being sealed"
        with suppress(BadMessage):
            kind.verify(content, wire_samples.KEY.public_key(), bytes(32))


def card(content: bytes) -> None:
    """card.yaml."""
    with _file(content, "card.yaml") as path, suppress(ConfigError):
        read = Card.load(path)
        assert Card.from_mapping(read.as_dict(), "again") == read, "a card changes by being written"


def study(content: bytes) -> None:
    """study.yaml."""
    with _file(content, "study.yaml") as path, suppress(ConfigError):
        read = load_study(path)
        assert Study.from_mapping(read.as_dict(), "again").digest == read.digest, "a study's digest changes by being written"
        read.topology()


def site(content: bytes) -> None:
    """site.yaml."""
    with _file(content, "site.yaml") as path, suppress(ConfigError):
        SiteFile.load(path)


def experiment(content: bytes) -> None:
    """An experiment's file."""
    with _file(content, "experiment.yaml") as path, suppress(ConfigError):
        load_experiment(path).as_dict()


def records(content: bytes) -> None:
    """A run's folder, as `p2pfl inspect` and the dashboard read it."""
    with tempfile.TemporaryDirectory(dir=_memory()) as name, redirect_stdout(io.StringIO()):
        folder = Path(name, "run")
        folder.mkdir()
        folder_of(content, folder)
        forms = [{}, {"as_json": True}, {"to_csv": Path(name, "tables")}]
        if len(content) % 8 == 0:  # these take ten times as long
            forms.append({"to_html": Path(name, "page.html")})
            Board.of([str(folder)]).look()
        for options in forms:
            with suppress(ConfigError, StoreError):
                inspect(str(folder), **options)


def status(content: bytes) -> None:
    """A node's answer to `p2pfl inspect URL`."""
    with suppress(ConfigError, StoreError), damage_told("http://127.0.0.1/"):
        print_page(records_of(json.loads(content)), Console(file=io.StringIO(), width=100))


def graph(content: bytes) -> None:
    """A graph's file; the first byte decides which kind."""
    suffix = GRAPH_SUFFIXES[content[0] % len(GRAPH_SUFFIXES)] if content else ".yaml"
    with _file(content[1:], f"graph{suffix}") as path, suppress(ConfigError):
        graph_files.load(path)


def table(content: bytes) -> None:
    """A site's CSV table."""
    with _file(content, "rows.csv") as path, suppress(ConfigError):
        read_columns(path, ["age", "risk"])


def checkpoint(content: bytes) -> None:
    """A file of tensors: a checkpoint, or the models of a run."""
    with tempfile.TemporaryDirectory(dir=_memory()) as name:
        folder = Path(name)
        (folder / "models").mkdir()
        for path in (folder / "checkpoint.safetensors", folder / "models.safetensors", folder / "models" / "a.safetensors"):
            path.write_bytes(content)
        with suppress(StoreError):
            read_checkpoint(folder / "checkpoint.safetensors")
        for _ in range(2):
            with suppress(StoreError, ConfigError):
                read_models(folder)
            with suppress(StoreError, ConfigError):
                read_buffers(folder, "a")
            (folder / "models.safetensors").unlink(missing_ok=True)


def state(content: bytes) -> None:
    """Metadata of a node's checkpoint, as the node takes it up when it starts again."""
    metadata = None
    with suppress(ValueError, RecursionError):
        metadata = json.loads(content)
    if not isinstance(metadata, dict):
        return
    with tempfile.TemporaryDirectory(dir=_memory()) as name:
        daemon = pair(Path(name))[0]
        terms = asdict(daemon.node.terms)
        write_checkpoint(daemon.node.state / CHECKPOINT, {"state/x": torch.zeros(1, 5, dtype=torch.float64)}, metadata | {"terms": terms})
        with suppress(ConfigError, StoreError):
            daemon._open_folder()


def pair(folder: Path) -> list[Daemon]:
    """Two nodes that average, not started."""
    plan, network = _plan(), MemoryNetwork()
    signing = signing_of(plan)
    given = {"study_digest": STUDY, "timeouts": PATIENT}
    return [
        Daemon(
            Node(plan, name, network.transport(name, [other]), state=folder / name, incarnation=i, signing=signing[name], **given),
            status_port=None,
        )
        for i, (name, other) in enumerate(permutations(plan.names), start=1)
    ]


@cache
def _plan() -> Plan:
    return averaging({"name": "path"}, 2)


def key(content: bytes) -> None:
    """private.pem, of a site whose passphrase is `PASSPHRASE`."""
    with tempfile.TemporaryDirectory(dir=_memory()) as name:
        for file, inside in (("private.pem", content), ("passphrase", PASSPHRASE)):
            path = Path(name, file)
            path.touch(mode=0o600)
            path.write_bytes(inside)
        with suppress(ConfigError):
            Identity.load(Path(name), Path(name, "passphrase"))


def request(content: bytes) -> None:
    """A request to the status page by somebody who does not know its token."""
    for local in (True, False):
        found = requested(content + b"\r\n\r\n", TOKEN, local=local)
        assert found in ("/live", "/ready") or isinstance(found, Answer), "a page is given without the token"


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (wire, sums, sealed, card, study, site, experiment, records, status, graph, table, checkpoint, state, key, request)
}


@contextmanager
def _file(content: bytes, name: str) -> Iterator[Path]:
    """A file with the content, in a folder of its own that goes with it."""
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def _memory() -> str | None:
    """A folder that is in memory, where there is one: a search writes some thousand files a second."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
