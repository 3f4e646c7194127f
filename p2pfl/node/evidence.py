"""Evidence against members that have signed different things of one round, kept in the state folder for a later judge.

Each line of evidence.jsonl names the member, the round and the study, and holds both signed records in hexadecimal: anybody with the
study's file can check them.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from p2pfl.protocol.equivocation import MOST_EACH, Equivocation

EVIDENCE = "evidence.jsonl"
_MOST_BYTES = 2**20


def keep_evidence(state: Path, study: str, name: str, found: Equivocation) -> bool:
    """Append a member's equivocation to the file in a state folder, which grows by MOST_EACH lines a member at most.

    Returns:
        Whether it was new: False where there is enough of the member, or the same.
    """
    numbers = evidence_rounds(state).get(name, [])
    if found.round in numbers or len(numbers) >= MOST_EACH:
        return False
    row: dict[str, Any] = {"member": name, "round": found.round, "study": study}
    line = json.dumps(row | {"records": [sealed.hex() for sealed in found.sealed]})
    path = state / EVIDENCE
    with path.open("a+b") as file:
        path.chmod(0o600)
        is_torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"  # half a line, of a crash
        file.write(b"\n" * is_torn + line.encode() + b"\n")
    return True


def evidence_rounds(state: Path) -> dict[str, list[int]]:
    """Rounds of which there is evidence in a node's file, by member."""
    kept: dict[str, set[int]] = {}
    try:
        with (state / EVIDENCE).open(encoding="utf-8", errors="replace") as file:
            lines = file.read(_MOST_BYTES).splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):  # half a line, of a crash
            row = json.loads(line)
            kept.setdefault(str(row["member"]), set()).add(int(row["round"]))
    return {name: sorted(numbers) for name, numbers in kept.items()}
