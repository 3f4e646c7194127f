"""Evidence against members that have signed different things of one round, kept in the state folder for whoever has to judge it.

Each line of evidence.jsonl names the member, the round and the study, and holds both signed records in hexadecimal: anybody with the
study's file can check them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from p2pfl.protocol.equivocation import MOST_EACH, Contradiction

EVIDENCE = "evidence.jsonl"
_MOST_BYTES = 2**20


class EvidenceFile:
    """The file of one node; it grows by MOST_EACH lines a member at most.

    Args:
        state: the node's folder.
        study: digest of the study, 64 hexadecimal digits.
    """

    def __init__(self, state: Path, study: str) -> None:
        self._path, self._study = state / EVIDENCE, study
        self._kept: dict[str, set[int]] | None = None

    def rounds(self) -> dict[str, list[int]]:
        """Rounds of which there is evidence, by member."""
        return {name: sorted(numbers) for name, numbers in self._known().items()}

    def keep(self, name: str, found: Contradiction) -> bool:
        """Append a contradiction; False: there is enough of the member, or the same."""
        numbers = self._known().setdefault(name, set())
        if found.round in numbers or len(numbers) >= MOST_EACH:
            return False
        numbers.add(found.round)
        row: dict[str, Any] = {"member": name, "round": found.round, "study": self._study}
        line = json.dumps(row | {"records": [sealed.hex() for sealed in found.sealed]})
        with self._path.open("a", encoding="utf-8") as file:
            self._path.chmod(0o600)
            file.write(line + "\n")
        return True

    def _known(self) -> dict[str, set[int]]:
        if self._kept is None:
            self._kept = {}
            for line in _lines(self._path):
                try:
                    row = json.loads(line)
                    self._kept.setdefault(str(row["member"]), set()).add(int(row["round"]))
                except (ValueError, KeyError, TypeError):  # half a line, of a crash
                    continue
        return self._kept


def _lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_MOST_BYTES).splitlines()
    except FileNotFoundError:
        return []
