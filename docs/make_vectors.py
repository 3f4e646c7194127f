"""Examples of every rule of docs/protocol.md with their outcomes: python docs/make_vectors.py writes docs/vectors.json.

Nothing is drawn: keys, incarnations and times are fixed, so that the same code always writes the same file. Bytes are hexadecimal, and
whole numbers beyond 2**53, which a reader of JSON may round, are texts {"int": "..."}.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from vector_belief import belief
from vector_messages import greeting, messages, pad, refused
from vector_scenario import scenario
from vector_sequences import averaging, ledger, stop

from p2pfl.algorithms import ALGORITHMS
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.governance.card import card_message
from p2pfl.governance.encoding import canonical
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.study_facts import facts_of
from p2pfl.params import bytes_of
from p2pfl.protocol.equivocation import update_digest
from p2pfl.wire.messages import SCHEMA
from p2pfl.wire.ready_record import ReadyRecord, packed, receipt
from p2pfl.wire.ready_record import seal as seal_ready
from p2pfl.wire.round_record import RoundRecord, seal
from p2pfl.wire.sealing import SIGNATURE_BYTES
from p2pfl.yaml_files import dump_yaml

PAGE = Path(__file__).parent / "vectors.json"
NAMES = ("node-0", "node-1", "node-2")
STUDY_DIGEST = b"\xaa" * 32
RECORD = RoundRecord(
    member=1,
    began=1_790_000_000_000,
    round=6,
    level=1,
    settles=False,
    closing=False,
    disagreement=0.1,
    norm=1.5,
    loss=None,
    skipped=1,
    without=(0,),
    agreed_for=2,
    sent=3180,
    milliseconds=(120, 30, 2, 0),
    measured=None,
    metrics=(),
    rows=None,
)
_FLOATS = (0.1, 1e-12, 1.0, 1 / 3, 1e16, 123456789.125, 1e-5, -0.0, 5e-324, 1.7976931348623157e308)


def identity_of(number: int) -> Identity:
    """A member's fixed keys; everybody knows them, so they are for examples only."""
    return Identity(
        Ed25519PrivateKey.from_private_bytes(bytes([number + 1] * 32)), X25519PrivateKey.from_private_bytes(bytes([16 + number] * 32))
    )


def keys() -> list[dict[str, Any]]:
    """Private keys, what follows from them, and signed cards, with an address, several and none."""
    addresses: tuple[Any, ...] = ("tcp://127.0.0.1:7700", ["tcp://10.0.0.1:7701", "tcp://[2001:db8::1]:7701"], None)
    found = []
    for number, (name, address) in enumerate(zip(NAMES, addresses, strict=True)):
        identity = identity_of(number)
        card = identity.card(name, address, samples=None if number else 199)
        found.append(
            {
                "private_pem": identity.pem_blocks().decode("ascii"),
                "ed25519_secret": identity.signing.private_bytes_raw().hex(),
                "x25519_secret": identity.curve.private_bytes_raw().hex(),
                "x25519_public": identity.curve.public_key().public_bytes_raw().hex(),
                "curve_secret": identity.curve_secret.decode("ascii"),
                "curve_public": identity.curve_public.decode("ascii"),
                "card": card.as_dict(),
                "signed": card_message(card.as_dict()).hex(),
                "fingerprint": card.fingerprint,
            }
        )
    return found


def study() -> dict[str, Any]:
    """A study as text, as the bytes that are digested, and all that follows; the same for a model, and the channels of all algorithms."""
    floats = [{"value": value.hex(), "written": canonical(value).decode("ascii")} for value in _FLOATS]
    texts = [
        {"utf8": text.encode().hex(), "written": canonical(text).decode("ascii")} for text in ("Zürich", 'a/b\\"\n\x01\x7f', "\U0001f600")
    ]
    small: dict[str, Any] = {
        "name": "Zürich",
        "task": {"name": "averaging", "dimension": 4},
        "nodes": 3,
        "topology": {"name": "path"},
        "rounds": 2,
        "stop": {"relative_consensus": 1e-12, "patience": 2, "settle": 500},
        "baselines": [],
    }
    model = {
        "name": "logistic",
        "task": {"name": "synthetic-logistic", "features": 2},
        "nodes": 3,
        "rounds": 2,
        "stop": None,
        "baselines": [],
    }
    return {"floats": floats, "texts": texts, "averaging": _study_of(small), "model": _study_of(model), "channels": _channels()}


def _study_of(experiment: dict[str, Any]) -> dict[str, Any]:
    resolved = experiment_from(experiment)
    plan = make_plan(resolved, load_sites(resolved))
    cards = [identity_of(i).card(name, f"tcp://127.0.0.1:{7700 + i}") for i, name in enumerate(NAMES)]
    made = Study.create(resolved.as_dict() | {"compiled": "off"}, cards, plan.topology).with_layout(plan.layout.table())
    facts = facts_of(made, "vectors")
    assert facts.start is not None
    return {
        "yaml": dump_yaml(made.as_dict()),
        "canonical": canonical(made.as_dict()).decode("ascii"),
        "digest": made.digest,
        "start": bytes(bytes_of(facts.start)).hex(),
        "derived": facts.values,
    }


def _channels() -> list[dict[str, Any]]:
    """Channels of every algorithm by phase, of a model of 3 parameters."""
    found = []
    for name in ALGORITHMS:
        for compressor in ("none", "int8", "top-k") if name == "choco" else ("none",):
            said = {
                "name": name,
                "task": {"name": "synthetic-logistic", "features": 2},
                "nodes": 3,
                "topology": {"name": "complete" if name == "allreduce" else "path"},
                "algorithm": {"name": name},
                "compressor": {"name": compressor},
                "rounds": 1,
                "stop": None,
                "baselines": [],
            }
            resolved = experiment_from(said)
            plan = make_plan(resolved, load_sites(resolved))
            cards = [identity_of(i).card(name, f"tcp://127.0.0.1:{7700 + i}") for i, name in enumerate(NAMES)]
            derived = facts_of(Study.create(resolved.as_dict(), cards, plan.topology), "vectors").values
            found.append(
                {"algorithm": name, "compressor": compressor, **{key: derived[key] for key in ("phases", "channels", "model_channel")}}
            )
    return found


def record() -> dict[str, Any]:
    """Sealed records, with all that their signatures are over."""
    signing = identity_of(1).signing
    digests = [b"\x01" * 32, b"\x02" * 32]
    with_update = RoundRecord(**{**asdict(RECORD), "update": update_digest(digests)})
    ready = [
        ReadyRecord(member=1, began=1_790_000_000_000, number=3, links=packed((0, 1)), started=None),
        ReadyRecord(member=1, began=1_790_000_000_000, number=4, links=packed((0, 9)), started=packed((0, 1, 2))),
    ]
    sealed = [("p2pfl round record v1", asdict(each), seal(each, signing.sign, STUDY_DIGEST)) for each in (RECORD, with_update)]
    sealed += [("p2pfl ready record v1", asdict(each), seal_ready(each, signing.sign, STUDY_DIGEST)) for each in ready]
    return {
        "ed25519_secret": signing.private_bytes_raw().hex(),
        "identity": signing.public_key().public_bytes_raw().hex(),
        "study": STUDY_DIGEST.hex(),
        "update_digest": {"payload_digests": [each.hex() for each in digests], "update": update_digest(digests).hex()},
        "records": [
            {
                "domain": domain,
                "fields": {key: value.hex() if isinstance(value, bytes) else value for key, value in fields.items()},
                "array": each[SIGNATURE_BYTES:].hex(),
                "sealed": each.hex(),
                "receipt": receipt(each).hex(),
            }
            for domain, fields, each in sealed
        ],
    }


def vectors() -> dict[str, Any]:
    """All twelve groups, as JSON values."""
    found = {
        "schema": SCHEMA,
        "keys": keys(),
        "study": study(),
        "messages": messages(),
        "refused": refused(),
        "pad": pad(),
        "greeting": greeting(),
        "ledger": ledger(),
        "stop": stop(),
        "belief": belief(),
        "averaging": averaging(),
        "record": record(),
        "scenario": scenario(),
    }
    plain: dict[str, Any] = json.loads(text_of(found))
    return plain


def text_of(found: dict[str, Any]) -> str:
    """The text of the file: one line for each example."""
    lines = ["{"]
    for number, (group, content) in enumerate(found.items()):
        comma = "," if number + 1 < len(found) else ""
        inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else None
        if inner is None:
            lines.append(f" {json.dumps(group)}: {json.dumps(content)}{comma}")
            continue
        opening, closing = ("{", "}") if isinstance(content, dict) else ("[", "]")
        rows = [
            f"  {json.dumps(key) + ': ' if isinstance(content, dict) else ''}{json.dumps(value, ensure_ascii=True)}" for key, value in inner
        ]
        lines += [f" {json.dumps(group)}: {opening}", ",\n".join(rows), f" {closing}{comma}"]
    return "\n".join([*lines, "}", ""])


def main() -> None:
    """Write the file anew."""
    text = text_of(vectors())
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE}   {len(text):,} bytes, sha256 {sha256(text.encode()).hexdigest()[:16]}")


if __name__ == "__main__":
    main()
