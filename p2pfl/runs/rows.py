"""Keys of the rows that a run writes, by file."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

REQUIRED = {
    "rounds.jsonl": {"round", "kind"},
    "network.jsonl": {"round", "kind", "nodes"},
    "nodes.jsonl": {"round", "node", "kind"},
    "events.jsonl": {"round", "node", "event"},
}
_OF_ALL_NODES = {
    "loss",
    "disagreement",
    "bound_low",
    "bound_high",
    "rms_norm",
    "rms_disagreement",
    "consensus_distance",
    "bytes_sent",
    "skipped",
    "seconds",
}
KNOWN = {
    "rounds.jsonl": REQUIRED["rounds.jsonl"] | _OF_ALL_NODES | {"nodes", "simulated_s"},
    "nodes.jsonl": REQUIRED["nodes.jsonl"]
    | {"loss", "disagreement", "norm", "skipped", "agreed_for", "stop_round", "bytes_sent", "seconds", "metrics"}
    | {"merged", "simulated_s"},
    "network.jsonl": REQUIRED["network.jsonl"] | _OF_ALL_NODES | {"known_in", "missing"},
    "events.jsonl": REQUIRED["events.jsonl"] | {"time", "detail"},
}
