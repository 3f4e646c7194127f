"""Records of eight hospitals on a ring of which one is killed, and perhaps comes back: as every surface finds them."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass

from rich.console import Console

from p2pfl.inspector.terminal import page
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run, records_of

EIGHT = tuple(f"hospital-{number}" for number in range(8))
KILLED = "hospital-5"
NEIGHBOURS = ("hospital-4", "hospital-6")
RING = [[i, (i + step) % 8, 1 / 3] for i in range(8) for step in (1, 7)]
GRAPH = {
    "nodes": list(EIGHT),
    "edges": RING,
    "lambda_2": (1 + math.sqrt(2)) / 3,
    "lambda_min": -1 / 3,
    "laplacian_lambda_2": 2 - math.sqrt(2),
    "laplacian_lambda_max": 4.0,
    "diameter": 4,
}
EXPERIMENT = {"name": "eight hospitals", "topology": {"name": "ring"}, "rounds": 3000, "stop": {"relative_consensus": 1e-3}}


@dataclass(frozen=True, kw_only=True)
class Course:
    """When what happens; a round is recorded up to `last`."""

    last: int = 60
    killed: int = 40
    """The last round that the killed hospital makes."""
    back: int | None = None
    """The round from which it takes part again; None: it stays away."""

    def is_away(self, number):
        return number > self.killed and (self.back is None or number < self.back)


def node_rows(course):
    """Of all nodes, by round."""
    rows = []
    for number in range(course.last + 1):
        away = course.is_away(number)
        for name in EIGHT:
            if away and name == KILLED:
                continue
            rows.append(
                {
                    "round": number,
                    "node": name,
                    "kind": "train",
                    "loss": 0.7 * 0.99**number,
                    "disagreement": 1e-4,
                    "norm": 2.0,
                    "skipped": [KILLED] if away and name in NEIGHBOURS else [],
                    "agreed_for": 0,
                    "bytes_sent": 1000,
                    "seconds": {"train": 0.05, "wait": 0.02, "mix": 0.001, "evaluate": 0.0},
                }
            )
    return rows


def network_row(course, number):
    """What a node certifies of a round; while somebody is away, a lower bound alone."""
    away = course.is_away(number)
    return {
        "round": number,
        "kind": "train",
        "nodes": 7 if away else 8,
        "missing": [KILLED] if away else [],
        "known_in": number + 4,
        "disagreement": 8e-4,
        "bound_low": 0.005,
        "bound_high": None if away else 0.013,
        "rms_norm": 2.0,
        "bytes_sent": 8000,
        "skipped": 2 if away else 0,
        "loss": 0.7 * 0.99**number,
    }


def whole_folder(path, course, *, died=True, summary=None):
    """As `p2pfl up` writes it."""
    folder = RunFolder.create(path, EXPERIMENT, topology=GRAPH, engine="daemons")
    folder.append_node(*node_rows(course))
    for number in range(course.last + 1):
        row = {key: value for key, value in network_row(course, number).items() if key not in ("known_in", "missing")}
        folder.append_round(row)
    if died:
        folder.append_event({"round": course.killed, "node": KILLED, "event": "died", "detail": "killed by signal 9"})
    if summary is not None:
        folder.write_summary(summary)
    return folder


def own_folder(path, course, me, *, named=True):
    """As the node of one institution writes its own."""
    folder = RunFolder.create(path, EXPERIMENT, topology=GRAPH, engine="daemons", member=me if named else None)
    for row in node_rows(course):
        if row["node"] == me:
            folder.append_node(row)
            own = {key: row[key] for key in ("round", "kind", "loss", "disagreement", "bytes_sent", "seconds")}
            folder.append_round(own | {"nodes": 1, "bound_low": None, "bound_high": None, "rms_norm": 2.0, "skipped": len(row["skipped"])})
    for number in range(max(course.last - 4, 0)):
        folder.append_network(network_row(course, number))
    folder.append_event({"round": 0, "node": me, "event": "started", "detail": ""})
    if me in NEIGHBOURS and course.last > course.killed:
        at = {"time": "2026-01-01T01:48:10.000Z", "round": course.killed + 1, "node": me}
        folder.append_event({**at, "event": "skipped", "detail": f"{KILLED} did not come to exchange {course.killed + 1}"})
        if course.back is not None and course.last >= course.back:
            at = {"time": "2026-01-01T02:02:30.000Z", "round": course.back, "node": me}
            folder.append_event({**at, "event": "returned", "detail": f"{KILLED} is back at exchange {course.back}"})
    return folder


def asked(path, course, me):
    """As the node *me* tells it at its address."""
    own = read_run(own_folder(path, course, me).path)
    newest = {row["node"]: row for row in node_rows(course)}
    kept = [row for row in node_rows(course) if row["node"] == me or row["round"] > course.last - 30]
    rows = {(row["node"], row["round"]): row for row in kept}
    for name, row in newest.items():
        age_s = 75.0 if name == KILLED and course.is_away(course.last) else 0.4
        rows[name, row["round"]] = row | {"age_s": age_s, "age_rounds": course.last - row["round"], "state": "running"}
    return records_of(
        {
            "experiment": own.experiment,
            "environment": own.environment,
            "topology": own.topology,
            "rounds": own.rounds,
            "nodes": sorted(rows.values(), key=lambda row: (row["round"], row["node"])),
            "events": own.events,
            "network": list(own.network),
            "summary": None,
        }
    )


def printed(run, *, is_live=False, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(page(run, width=width, is_live=is_live))
    return console.file.getvalue()


def calls_well(text, name=KILLED):
    """Whether a table's row, of a page or of a terminal, has the name and "well" beside it."""
    pictures = r"<(script|style)\b.*?</\1>"
    plain = re.sub(r"<[^>]+>", " ", re.sub(r"</tr>|</p>|</li>", "\n", re.sub(pictures, "", text, flags=re.DOTALL)))
    return any(re.search(rf"{name}\b[\s,].*\bwell\b", line) for line in plain.splitlines())
