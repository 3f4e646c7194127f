"""A node's status in the text format that Prometheus collects; needs prometheus-client (extra `prometheus`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from p2pfl.errors import MissingExtraError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_GAUGES = {
    "round": "The round that this node is in.",
    "rounds": "Training rounds of the experiment.",
    "exchange": "The exchange that this node is in.",
    "agreed_for": "So many rounds in a row the node and all that it has heard of have agreed.",
    "disagreement": "Half the sum of squared distances from its neighbours' models in the last round.",
    "loss": "Training loss of the last round.",
}

_NEIGHBOUR_GAUGES = {
    "greeted": "1 where the neighbour has greeted.",
    "last_seen_s_ago": "Seconds since anything came from the neighbour.",
    "exchange": "The last exchange heard of from the neighbour.",
    "skipped": "1 while the node goes on without the neighbour.",
    "left": "1 once the neighbour has said goodbye.",
}


def exposition(status: Mapping[str, Any]) -> bytes:
    """The text, of what `p2pfl node status` says.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest  # an extra
    except ImportError as error:
        raise MissingExtraError("/metrics needs prometheus-client: pip install 'p2pfl-mesh[prometheus]'") from error
    registry, member = CollectorRegistry(), str(status.get("member", ""))
    families: dict[str, Any] = {}
    for kind, name, text, labels, value in _samples(status):
        if value is not None:
            if name not in families:
                families[name] = (Counter if kind == "counter" else Gauge)(f"p2pfl_{name}", text, ("member", *labels), registry=registry)
            child = families[name].labels(member, *labels.values())
            (child.inc if kind == "counter" else child.set)(value)
    written: bytes = generate_latest(registry)
    return written


def _samples(status: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, str], Any]]:
    """Kind, name, what it is, labels and value of each."""
    for name, text in _GAUGES.items():
        yield "gauge", name, text, {}, status.get(name)
    yield "gauge", "stopped", "1 once the node has stopped.", {}, status.get("closing") is not None
    for metric, value in (status.get("metrics") or {}).items():
        yield "gauge", "metric", "A metric of the node's model on its own test rows.", {"metric": metric}, value
    for neighbour, facts in (status.get("neighbours") or {}).items():
        for name, text in _NEIGHBOUR_GAUGES.items():
            yield "gauge", f"neighbour_{name}", text, {"neighbour": neighbour}, facts.get(name)
    yield "counter", "sent_bytes", "Bytes of the updates sent.", {}, status.get("bytes_sent")
    for reason, count in (status.get("refused") or {}).items():
        yield "counter", "refused", "Messages refused, by reason.", {"reason": reason}, count
