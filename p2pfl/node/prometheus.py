"""A node's status in the text format that Prometheus collects; needs prometheus-client (extra `prometheus`).

Names follow Prometheus's conventions: base units, timestamps instead of ages, `_total` for counters. What is not known has no sample; the
state of a link is one sample for each state, of which one is 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
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


class _Families:
    """Metrics of one status, as prometheus-client collects them; `_created` is left out, which nobody asks for."""

    def __init__(self, member: str) -> None:
        self._member = member
        self._by_name: dict[str, Any] = {}

    def add(self, name: str, text: str, value: Any, *, is_counter: bool = False, **labels: str) -> None:
        """Add one sample of a metric, with what the metric is; None: it is not known, and there is no sample."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        if value is None:
            return
        if name not in self._by_name:
            make = CounterMetricFamily if is_counter else GaugeMetricFamily
            self._by_name[name] = make(f"p2pfl_{name}", text, labels=["member", *labels])
        self._by_name[name].add_metric([self._member, *labels.values()], float(value))

    def collect(self) -> Iterable[Any]:
        """Every metric with its samples."""
        return self._by_name.values()


def exposition(status: Mapping[str, Any]) -> bytes:
    """Write what a node's status is now in Prometheus's text format; MissingExtraError where prometheus-client is not installed."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest  # an extra
    except ImportError as error:
        raise MissingExtraError("/metrics needs prometheus-client: pip install 'p2pfl-mesh[prometheus]'") from error
    families, registry = _Families(str(status.get("member", ""))), CollectorRegistry(auto_describe=False)
    _add_node(families, status)
    for neighbour, facts in (status.get("neighbours") or {}).items():
        _add_neighbour(families, neighbour, facts, time.time())
    registry.register(families)
    written: bytes = generate_latest(registry)
    return written


def _add_node(families: _Families, status: Mapping[str, Any]) -> None:
    version, add = status.get("version"), families.add
    add("build_info", "Always 1; the label is the version of p2pfl.", version and 1, version=str(version))
    for name, (key, text) in _GAUGES.items():
        add(name, text, status.get(key))
    add("state_lost", "1 where neighbours remember more of this node than it knows itself.", _is_said(status, "state_lost"))
    add("stopped", "1 once the node has stopped.", _is_said(status, "closing"))
    for metric, value in (status.get("metrics") or {}).items():
        add("metric", "A metric of the node's model on its own test rows.", value, metric=metric)
    add("sent_bytes", "Bytes of the updates sent.", status.get("bytes_sent"), is_counter=True)
    for reason, count in (status.get("refused") or {}).items():
        add("refused", "Messages refused, by reason.", count, is_counter=True, reason=reason)


def _add_neighbour(families: _Families, neighbour: str, facts: Mapping[str, Any], now_s: float) -> None:
    add = partial(families.add, neighbour=neighbour)
    for name, text in _NEIGHBOUR_GAUGES.items():
        add(f"neighbour_{name}", text, facts.get(name))
    ago_s = facts.get("last_seen_s_ago")
    text = "When anything last came from the neighbour, a sign of life included, in seconds since 1970."
    add("neighbour_last_seen_timestamp_seconds", text, None if ago_s is None else now_s - ago_s)
    text = "1 while the neighbour knows less of itself than this node remembers, so that nothing of it is taken in."
    add("neighbour_state_lost", text, _is_said(facts, "state_lost"))
    link = facts.get("link", UNKNOWN)
    is_up = None if link == UNKNOWN else link == "up"
    add("neighbour_up", "1 while the link is up and the neighbour gives signs of life.", is_up)
    for state in (*STATES, UNKNOWN):
        add("neighbour_link_state", "The state of the link to the neighbour: 1 for the one that it is in.", state == link, state=state)
    for event, count in (facts.get("link_events") or {}).items():
        text = "What happened to the link to the neighbour, such as connected and disconnected."
        add("neighbour_link_events", text, count, is_counter=True, event=event)
    for reason, count in (facts.get("refused") or {}).items():
        add("neighbour_refused", "The neighbour's messages refused, by reason.", count, is_counter=True, reason=reason)


def _is_said(facts: Mapping[str, Any], key: str) -> bool | None:
    """Whether something is said; None where there is no word of it, as in a status of an earlier version."""
    return facts[key] is not None if key in facts else None
