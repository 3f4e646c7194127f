"""Write the fuzz corpus anew: ``PYTHONPATH=tests python -m fuzz.make_corpus``.

Valid inputs are made by p2pfl itself or taken from what an earlier version has recorded. What was once found (files ``found-*``) stays.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

import p2pfl
import wire_samples
from fuzz.targets import CORPUS, GRAPH_SUFFIXES, PASSPHRASE, RECORDS, SECTION, bytes_of, pair
from p2pfl.governance.identity import Identity
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.runs.checkpoint import CheckpointFile, read_checkpoint, write_checkpoint
from p2pfl.wire.codec import encode
from p2pfl.wire.round_record import seal
from p2pfl.wire.sum_codec import encode_sum
from sum_samples import EVERY_SUM_MESSAGE

RECORDED = Path(__file__).parents[1] / "recorded" / "first"
HEX = Path(__file__).parents[1] / "corpus"
TINY = {"name": "tiny", "task": {"name": "breast-cancer"}, "nodes": 3, "topology": {"name": "path"}, "rounds": 3}
EXPERIMENTS: dict[str, str] = {
    "smallest": "task: {name: quadratic}\n",
    "many-keys": """name: many
task: {name: breast-cancer}
nodes: 5
partition: {name: dirichlet, alpha: 0.3}
topology: {name: small-world, degree: 2, p: 0.1}
algorithm: {name: choco, local_steps: 3, batch_size: full, gamma: 0.3}
compressor: {name: top-k, share: 0.1}
optimizer: {name: sgd, lr: 1e-2, momentum: 0.9}
rounds: 20
stop: {relative_consensus: 1e-3, patience: 2}
personal: ["head.*"]
require: {members: all, within_s: 60}
seed: 3
""",
    "clock": """task: {name: quadratic}
topology: {name: ring}
clock: {speeds: {node-1: 2}, stragglers: {share: 0.1, factor: 3}, churn: {share: 0.1, rounds: 3}, loss: 0.1}
pace: {name: asynchronous, max_age: 4}
""",
    "aliases": "optimizer: &o {lr: 0.1}\ntask: {name: quadratic}\nrounds: !!int '7'\nseed: &s 0x10\nnodes: *s\n",
}
TABLE = b'age,sex,risk\r\n63,1,0.25\r\n"41",0,-1e-3\r\n\r\n58,,3\r\n'


def messages() -> dict[str, bytes]:
    """One input for each message, one for all in a row, and what the wire's tests refuse."""
    each = {type(message).__name__.lower(): wire_samples.frames_of(message) for message in wire_samples.EVERY_MESSAGE}
    after_hello = {name: bytes_of(encode(wire_samples.HELLO), frames) for name, frames in each.items() if name != "hello"}
    lines = {path.stem: [line for line in path.read_text().splitlines() if not line.startswith("#")] for path in sorted(HEX.glob("*.hex"))}
    refused = {f"refused-{name}": bytes_of([bytes.fromhex(line) for line in found]) for name, found in lines.items()}
    refused = {name: content for name, content in refused.items() if len(content) < 4096}
    encoded = [wire_samples.frames_of(message) for message in (wire_samples.HELLO, wire_samples.CONTINUED, wire_samples.WHOLE)]
    return {"all": bytes_of(*each.values()), "encoded": bytes_of(*encoded), **after_hello, **refused}


def sum_messages() -> dict[str, bytes]:
    """One input for each message of secure sums, and one for all in a row."""
    each = {type(message).__name__.lower(): [*encode_sum(message)] for message in EVERY_SUM_MESSAGE}
    return {"all": bytes_of(*(frames for found in each.values() for frames in found)), **{name: bytes_of(*each[name]) for name in each}}


def records() -> dict[str, bytes]:
    """A simulated run, one of daemons, and one of an earlier version."""
    with tempfile.TemporaryDirectory() as name:
        p2pfl.simulate(TINY, out=Path(name) / "run")
        runs = {"simulated": _folder(Path(name) / "run")}
    return runs | {
        "daemon": _folder(RECORDED / "hospital-0" / "state" / "run"),
        "earlier": _folder(RECORDED / "run"),
        "started": SECTION + b"experiment.yaml\ntask: {name: quadratic}\n" + SECTION + b"rounds.jsonl\n",
    }


def _folder(folder: Path) -> bytes:
    """The files of a run as one input; of long ones the first rows."""
    parts = []
    for file in RECORDS:
        path = folder / file
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            parts.append(SECTION + file.encode() + b"\n" + b"".join(lines[:4] if file.endswith(".jsonl") else lines))
    return b"".join(parts)


def graphs() -> dict[str, bytes]:
    """A path of three in every kind of file, with and without names and figures."""
    path = nx.path_graph(3)
    nx.set_edge_attributes(path, 0.25, "weight")
    named = nx.relabel_nodes(path, {0: "basel", 1: "bern", 2: "zurich"})
    yaml = "nodes: [basel, bern, {name: zurich, mass: 2}]\nedges:\n  - [basel, bern]\n  - {between: [bern, zurich], latency_ms: 12}\n"
    texts = {
        ".yaml": ["nodes: 3\nedges: [[0, 1], [1, 2]]\n", yaml],
        ".graphml": ["\n".join(nx.generate_graphml(graph)) for graph in (path, named)],
        ".gml": ["\n".join(nx.generate_gml(graph)) for graph in (path, named)],
        ".json": [json.dumps(nx.node_link_data(graph, edges="edges")) for graph in (path, named)],
        ".edgelist": ["\n".join(nx.generate_edgelist(path)), "# basel bern zurich\nbasel, bern\nbern,zurich\n"],
    }
    kinds = {suffix: bytes([number]) for number, suffix in enumerate(GRAPH_SUFFIXES)}
    return {f"{suffix[1:]}-{i}": kinds[suffix] + text.encode() for suffix, found in texts.items() for i, text in enumerate(found)}


def checkpoints() -> dict[str, bytes]:
    """A checkpoint, and models as a run keeps them."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "small.safetensors"
        write_checkpoint(path, {"x": torch.arange(3.0), "n": torch.tensor(7)}, {"exchange": 3, "ledgers": {"b": {}}})
        small = path.read_bytes()
        slots = CheckpointFile(path)
        for exchange in (3, 4):
            slots.writing({"x": torch.arange(3.0)}, {"exchange": exchange})()
        in_slots = path.read_bytes()
    header = json.dumps(
        {"__metadata__": {"nodes": "a\nb", "parameters": "x"}, "x": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}
    )
    return {
        "small": small,
        "slots": in_slots,
        "models": len(header).to_bytes(8, "little") + header.encode() + bytes(8),
        "recorded": (RECORDED / "hospital-0" / "state" / "checkpoint.safetensors").read_bytes(),
    }


def states() -> dict[str, bytes]:
    """Metadata of a node that has ended, as if it had been killed then."""
    with tempfile.TemporaryDirectory() as name:
        nodes = pair(Path(name))

        async def run() -> None:
            await asyncio.gather(*(node.run() for node in nodes))

        asyncio.run(run())
        found = read_checkpoint(nodes[0].node.state / CHECKPOINT)
    assert found is not None
    return {"daemon": json.dumps(found[1] | {"finished": False}).encode()}


def keys() -> dict[str, bytes]:
    """Private keys of nobody: not encrypted, encrypted, and of an earlier version."""
    with tempfile.TemporaryDirectory() as name:
        identity = Identity.new()
        identity.save(Path(name, "plain"))
        identity.save(Path(name, "sealed"), PASSPHRASE)
        found = {kind: Path(name, kind, "private.pem").read_bytes() for kind in ("plain", "sealed")}
    encryption = BestAvailableEncryption(PASSPHRASE)
    earlier = [
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        for key in (Ed25519PrivateKey.generate(), X25519PrivateKey.generate())
    ]
    return found | {"earlier": b"".join(earlier)}


def corpus() -> dict[str, dict[str, bytes]]:
    """Inputs by target and name."""
    study, card = (RECORDED / "study.yaml").read_bytes(), (RECORDED / "hospital-0" / "keys" / "card.yaml").read_bytes()
    key = Ed25519PrivateKey.from_private_bytes(b"\x11" * 32)
    (ready,) = next(message for message in wire_samples.EVERY_MESSAGE if type(message).__name__ == "Ready").sealed
    status: dict[str, Any] = {
        name.partition(".")[0]: [json.loads(line) for line in (RECORDED / "run" / name).read_text().splitlines()[:4]]
        for name in ("rounds.jsonl", "nodes.jsonl")
    }
    status |= {
        "experiment": {},
        "environment": {},
        "topology": {"nodes": ["a", "b"], "edges": [[0, 1, 0.5]]},
        "events": [],
        "summary": None,
    }
    return {
        "wire": messages(),
        "sums": sum_messages(),
        "sealed": {"round": seal(wire_samples.RECORD, key.sign, bytes(32)), "ready": ready},
        "card": {"recorded": card},
        "study": {"recorded": study},
        "site": {"recorded": (RECORDED / "hospital-0" / "site.yaml").read_bytes()},
        "experiment": {name: text.encode() for name, text in EXPERIMENTS.items()},
        "records": records(),
        "status": {"recorded": json.dumps(status).encode()},
        "graph": graphs(),
        "table": {"small": TABLE},
        "checkpoint": checkpoints(),
        "state": states(),
        "key": keys(),
        "request": {
            "word": b"GET /live HTTP/1.1\r\nHost: 127.0.0.1",
            "page": b"GET /metrics?a=b HTTP/1.1\r\nHost: localhost:9464\r\nAuthorization: Bearer 0123\r\nAccept: */*",
            "browser": b"POST / HTTP/1.1\r\nHost: a.example\r\nOrigin: null\r\nSec-Fetch-Site: cross-site",
        },
    }


if __name__ == "__main__":
    for target, inputs in corpus().items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if not old.name.startswith("found-"):
                old.unlink()
        for name, content in inputs.items():
            (folder / name).write_bytes(content)
