"""A node's status in the text format that Prometheus collects; needs prometheus-client (extra `prometheus`).

Names follow Prometheus's conventions: base units, timestamps instead of ages, `_total` for counters. What is not known has no sample; the
state of a link is one sample for each state, of which one is 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from p2pfl.errors import MissingExtraError
from p2pfl.protocol.link_watch import STATES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

UNKNOWN = "unknown"

_GAUGES = {
    "round": ("round", "The round that this node is in."),
    "rounds_configured": ("rounds", "Training rounds of the experiment."),
    "exchange": ("exchange", "The exchange that this node is in."),
    "agreed_for": ("agreed_for", "Consensus counter: rounds in a row in which the node and all that it has heard of have agreed."),
    "disagreement": (
        "disagreement",
        "Before mixing: half the sum of squared distances from its neighbours' models, as they were sent in the last round.",
    ),
    "loss": ("loss", "Training loss of the last round."),
    "last_round_timestamp_seconds": ("last_round_time", "When the last round was over, in seconds since 1970."),
}
"""Name, its key in the status, its help."""

_NEIGHBOUR_GAUGES = {
    "greeted": "1 where neighbour and node have shaken hands and are connected.",
    "exchange": "The last exchange heard of from the neighbour.",
    "skipped": "1 while the node goes on without the neighbour.",
    "left": "1 once the neighbour has said that it has finished.",
    "paused": "1 while the neighbour is away because it said that it pauses.",
}


@dataclass(frozen=True, slots=True)
class _Sample:
    """One number with its labels."""

    kind: str
    name: str
    text: str
    labels: Mapping[str, str]
    value: Any


class _Families:
    """Samples of one status, as prometheus-client collects them; `_created` is left out, which nobody asks for."""

    def __init__(self, member: str, samples: Iterator[_Sample]) -> None:
        self._member, self._samples = member, samples

    def collect(self) -> Iterator[Any]:
        """Every metric with its samples."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for sample in self._samples:
            if sample.value is None:
                continue
            if sample.name not in families:
                make = CounterMetricFamily if sample.kind == "counter" else GaugeMetricFamily
                families[sample.name] = make(f"p2pfl_{sample.name}", sample.text, labels=["member", *sample.labels])
            families[sample.name].add_metric([self._member, *sample.labels.values()], float(sample.value))
        yield from families.values()


def exposition(status: Mapping[str, Any], now_s: float | None = None) -> bytes:
    """Write a status in Prometheus's text format.

    Args:
        status: of the node.
        now_s: seconds since 1970 when it was asked for; None: now.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest  # an extra
    except ImportError as error:
        raise MissingExtraError("/metrics needs prometheus-client: pip install 'p2pfl-mesh[prometheus]'") from error
    registry = CollectorRegistry(auto_describe=False)
    samples = _samples(status, time.time() if now_s is None else now_s)
    registry.register(_Families(str(status.get("member", "")), samples))
    written: bytes = generate_latest(registry)
    return written


def _samples(status: Mapping[str, Any], now_s: float) -> Iterator[_Sample]:
    version = status.get("version")
    yield _Sample("gauge", "build_info", "Always 1; the label is the version of p2pfl.", {"version": str(version)}, version and 1)
    for name, (key, text) in _GAUGES.items():
        yield _Sample("gauge", name, text, {}, status.get(key))
    lost = status["state_lost"] is not None if "state_lost" in status else None
    yield _Sample("gauge", "state_lost", "1 where neighbours remember more of this node than it knows itself.", {}, lost)
    stopped = status["closing"] is not None if "closing" in status else None
    yield _Sample("gauge", "stopped", "1 once the node has stopped.", {}, stopped)
    for metric, value in (status.get("metrics") or {}).items():
        yield _Sample("gauge", "metric", "A metric of the node's model on its own test rows.", {"metric": metric}, value)
    yield _Sample("counter", "sent_bytes", "Bytes of the updates sent.", {}, status.get("bytes_sent"))
    for reason, count in (status.get("refused") or {}).items():
        yield _Sample("counter", "refused", "Messages refused, by reason.", {"reason": reason}, count)
    for neighbour, facts in (status.get("neighbours") or {}).items():
        yield from _of_neighbour(neighbour, facts, now_s)


def _of_neighbour(neighbour: str, facts: Mapping[str, Any], now_s: float) -> Iterator[_Sample]:
    labels = {"neighbour": neighbour}
    for name, text in _NEIGHBOUR_GAUGES.items():
        yield _Sample("gauge", f"neighbour_{name}", text, labels, facts.get(name))
    ago_s = facts.get("last_seen_s_ago")
    yield _Sample(
        "gauge",
        "neighbour_last_seen_timestamp_seconds",
        "When anything last came from the neighbour, a sign of life included, in seconds since 1970.",
        labels,
        None if ago_s is None else now_s - ago_s,
    )
    lost = facts["state_lost"] is not None if "state_lost" in facts else None
    text = "1 while the neighbour knows less of itself than this node remembers, so that nothing of it is taken in."
    yield _Sample("gauge", "neighbour_state_lost", text, labels, lost)
    link = facts.get("link", UNKNOWN)
    yield _Sample("gauge", "neighbour_up", "1 while the link is up and the neighbour gives signs of life.", labels, _is_up(link))
    for state in (*STATES, UNKNOWN):
        text = "The state of the link to the neighbour: 1 for the one that it is in."
        yield _Sample("gauge", "neighbour_link_state", text, {**labels, "state": state}, state == link)
    for event, count in (facts.get("link_events") or {}).items():
        text = "What happened to the link to the neighbour, such as connected and disconnected."
        yield _Sample("counter", "neighbour_link_events", text, {**labels, "event": event}, count)
    for reason, count in (facts.get("refused") or {}).items():
        yield _Sample("counter", "neighbour_refused", "The neighbour's messages refused, by reason.", {**labels, "reason": reason}, count)


def _is_up(link: str) -> bool | None:
    return None if link == UNKNOWN else link == "up"
