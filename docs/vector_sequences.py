"""Examples of rules that go over several exchanges: the ledger of an edge, agreeing to stop, and the arithmetic of averaging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from p2pfl.algorithms import DPSGD, Context, InboxFactory
from p2pfl.algorithms.stopping import NEVER, StopRule
from p2pfl.params import Layout, bytes_of
from p2pfl.protocol.ledger import EdgeLedger
from p2pfl.wire.messages import Report

Step = Mapping[str, Any]


# ---- the ledger


def run_ledger(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Carry out the steps of one side, or of both, and tell the state after each.

    A step names its side and does one thing: "close" an exchange ("merged" or not), "hear" what is durable at the other side or a report
    that is given, "keep" a checkpoint, or "kill" the process, which goes on from its last checkpoint.
    """
    sides = {"a": EdgeLedger(), "b": EdgeLedger()}
    saved = {name: each.to_dict() for name, each in sides.items()}
    rows = []
    for step in steps:
        name = step["side"]
        side, back = sides[name], None
        match step["do"]:
            case "close":
                back = side.close(step["exchange"], merged=step["merged"])
            case "hear":
                given = step.get("report")
                report = (
                    sides["b" if name == "a" else "a"].report() if given is None else Report(**{**given, "merged": tuple(given["merged"])})
                )
                back = side.hear(report)
            case "keep":
                saved[name] = side.to_dict()
                side.checkpointed(saved[name])
            case "kill":
                sides[name] = side = EdgeLedger.from_dict(saved[name])
        rows.append(
            {
                **step,
                "rolls_back": back,
                "state": {
                    "closed_through": side.closed_through,
                    "open": side.open_flow,
                    "merged": list(side.merged),
                    "confirmed": side.confirmed,
                    "settled": side.acknowledged,
                },
                "durable_report": asdict(side.report()) | {"merged": list(side.report().merged)},
                "lost_history": side.counters["lost_history"],
            }
        )
    return rows


def _both(exchange: int, *, a: bool = True, b: bool = True) -> list[Step]:
    """Both close an exchange, keep, and hear of each other."""
    closes: list[Step] = [{"side": name, "do": "close", "exchange": exchange, "merged": merged} for name, merged in (("a", a), ("b", b))]
    return [*closes, *({"side": name, "do": do} for do in ("keep", "hear") for name in "ab")]


def _hear_first() -> list[Step]:
    return [{"side": name, "do": "hear"} for name in "ab"]


def ledger() -> dict[str, Any]:
    """Conversations of both sides of an edge, with the state after each step."""
    lost = {"closed_through": 5, "merged": [4, 5], "confirmed": 3, "settled": 4}
    conversations: dict[str, list[Step]] = {
        "everything comes": [*_hear_first(), *_both(0), *_both(1), *_both(2)],
        "a's message of exchange 1 is lost": [*_hear_first(), *_both(0), *_both(1, b=False), *_both(2), *_both(3)],
        "both messages of exchange 1 are lost": [*_hear_first(), *_both(0), *_both(1, a=False, b=False), *_both(2)],
        "b is killed between its merge and its checkpoint, and then misses exchange 1": [
            *_hear_first(),
            *_both(0),
            {"side": "a", "do": "close", "exchange": 1, "merged": True},
            {"side": "b", "do": "close", "exchange": 1, "merged": True},
            {"side": "a", "do": "keep"},
            {"side": "b", "do": "kill"},
            {"side": "b", "do": "close", "exchange": 1, "merged": False},
            {"side": "b", "do": "keep"},
            {"side": "a", "do": "hear"},
            {"side": "b", "do": "hear"},
            *_both(2),
        ],
        "b is killed after its checkpoint and before it could tell": [
            *_hear_first(),
            {"side": "a", "do": "close", "exchange": 0, "merged": True},
            {"side": "b", "do": "close", "exchange": 0, "merged": True},
            {"side": "b", "do": "keep"},
            {"side": "b", "do": "kill"},
            {"side": "a", "do": "keep"},
            {"side": "a", "do": "hear"},
            {"side": "b", "do": "hear"},
            *_both(1),
        ],
        "a jumps from exchange 1 to 5": [
            *_hear_first(),
            *_both(0),
            {"side": "a", "do": "close", "exchange": 4, "merged": False},
            {"side": "a", "do": "keep"},
            {"side": "b", "do": "close", "exchange": 4, "merged": False},
            {"side": "b", "do": "keep"},
            *_hear_first(),
            *_both(5),
        ],
        "an older report comes late": [
            *_hear_first(),
            *_both(0),
            *_both(1),
            {"side": "a", "do": "hear", "report": {"closed_through": 0, "merged": [], "confirmed": -1, "settled": -1}},
        ],
        "lost history: b was told that a had settled what a still has open": [
            *_hear_first(),
            *({"side": "a", "do": "close", "exchange": e, "merged": False} for e in range(3)),
            {"side": "a", "do": "hear", "report": {"closed_through": 2, "merged": [], "confirmed": -1, "settled": 2}},
            {"side": "a", "do": "close", "exchange": 3, "merged": True},
            {"side": "a", "do": "hear", "report": lost},
        ],
    }
    return {what: run_ledger(steps) for what, steps in conversations.items()}


# ---- agreeing to stop


def run_stop(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Go through the rounds of a network: counters and stop rounds of each node.

    Nodes that have jumped over a round are in "away" of it: they take no part and begin with a counter of 0.
    """
    rule = StopRule(**case["rule"])
    neighbours: list[list[int]] = case["neighbours"]
    counters, stops = [0] * len(neighbours), [NEVER] * len(neighbours)
    rows = []
    for given in case["rounds"]:
        number, away, skipped = given["round"], set(given.get("away", ())), given.get("skipped", {})
        before, known = list(counters), list(stops)
        row: dict[str, Any] = {"round": number, "d": given["d"], "norm": given["norm"], "agreed_for": [], "stop_round": []}
        row |= {key: given[key] for key in ("away", "skipped") if key in given}
        for node, near in enumerate(neighbours):
            missed = set(skipped.get(str(node), ())) | (away & set(near))
            heard = [each for each in near if each not in missed]
            if node in away:
                counters[node] = 0
            elif number >= case["training_rounds"]:
                passes = bool(rule.passes(np.array([2 * given["d"][node]]), np.array([given["norm"][node] ** 2]))[0]) and not missed
                agreed_NK = np.array([[before[each] for each in heard]], dtype=np.int64).reshape(1, -1)
                stops_NK = np.array([[known[each] for each in heard]], dtype=np.int64).reshape(1, -1)
                agreed_N = rule.consensus_counter(np.array([passes]), np.array([before[node]]), agreed_NK)
                stops[node] = int(rule.stop_round(number, agreed_N, np.array([known[node]]), stops_NK)[0])
                counters[node] = int(agreed_N[0])
            row["agreed_for"].append(counters[node])
            row["stop_round"].append(None if stops[node] == NEVER else stops[node])
        rows.append(row)
        if any(stop == number for stop in stops):
            break
    return rows


def stop() -> dict[str, Any]:
    """Networks that agree to stop, and stop rounds that a node believes or does not."""
    path, pair = [[1], [0, 2], [1]], [[1], [0]]
    path_rule = {"tolerance": 0.1, "patience": 1, "diameter": 2, "lambda_2": 1.0}
    pair_rule = {"tolerance": 0.1, "patience": 3, "diameter": 1, "lambda_2": 2.0}

    def rounds(nodes: int, count: int, changes: Mapping[int, Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
        return [{"round": r, "d": [0.0] * nodes, "norm": [1.0] * nodes, **(changes or {}).get(r, {})} for r in range(count)]

    cases: dict[str, dict[str, Any]] = {
        "path, every test passes": {"neighbours": path, "rule": path_rule, "rounds": rounds(3, 12)},
        "path, after two training rounds": {"neighbours": path, "rule": path_rule, "training_rounds": 2, "rounds": rounds(3, 12)},
        "path, the middle one skips node 2 in round 1": {
            "neighbours": path,
            "rule": path_rule,
            "rounds": rounds(3, 12, {1: {"skipped": {"1": [2]}}}),
        },
        "path, node 2 is away in rounds 1 and 2 and jumps to 3": {
            "neighbours": path,
            "rule": path_rule,
            "rounds": rounds(3, 14, {1: {"away": [2]}, 2: {"away": [2]}}),
        },
        # the bound is lambda_2 (tolerance norm)**2 = 2 * 0.01 at norm 1: just passed, and just failed
        "pair, at the bound and above it": {
            "neighbours": pair,
            "rule": pair_rule,
            "rounds": rounds(
                2, 14, {0: {"d": [0.02, 0.02]}, 1: {"d": [0.0200001, 0.0200001]}, 2: {"d": [0.0799, 0.0799], "norm": [2.0, 2.0]}}
            ),
        },
    }
    networks = {}
    for what, case in cases.items():
        full = {"training_rounds": 0, **case}
        rule = StopRule(**full["rule"])
        networks[what] = {**full, "earliest": rule.earliest(full["training_rounds"]), "rounds": run_stop(full)}
    rule = StopRule(**path_rule)
    counters = {r: r + 1 for r in range(6)} | {6: 0, 7: 1}
    claims = [
        {"stop_round": number, "believed": {True: "yes", False: "implausible_stop", None: "cannot tell"}[rule.admits(number, counters)]}
        for number in (6, 11, 12, 13, 14)
    ]
    own = {str(number): counter for number, counter in counters.items()}
    return {"networks": networks, "claims": {"rule": path_rule, "own_counters": own, "each": claims}}


# ---- averaging


def run_averaging(case: Mapping[str, Any]) -> dict[str, list[str]]:
    """Mix the nodes' vectors of a case round by round; each vector after the rounds that are asked for, in hexadecimal."""
    dtype = getattr(torch, case["dtype"])
    x = {name: torch.frombuffer(bytearray.fromhex(vector), dtype=dtype).clone() for name, vector in case["first"].items()}
    names, weights, factory, rule = list(x), case["weights"], InboxFactory(channels=DPSGD.channels), DPSGD()
    ctx = Context(round=0, local_steps=0, lr=0.1, seed=0, nodes_N=torch.arange(1), layout=Layout(tensors=()))
    owed: dict[str, torch.Tensor] = {}
    found = {}
    for number in range(max(case["after"])):
        after, flows_of = {}, {}
        for name in names:
            near = [other for other in names if weights[name].get(other, 0.0)]
            lost = {(sender, receiver) for at, sender, receiver in case["lost"] if at == number}
            messages = {other: {"x": x[other]} for other in near if (other, name) not in lost}
            inbox = factory.for_node(
                {"x": x[name][None]},
                near,
                messages,
                weights[name],
                self_weight=1 - sum(weights[name].values()),
                dtype=dtype,
                compensation={"x": owed.pop(name)[None]} if name in owed else {},
                flows={},
            )
            after[name] = rule.merge({"x": x[name][None]}, 0, inbox, ctx)["x"][0]
            assert inbox.flows is not None
            flows_of[name] = {near[slot]: amounts["x"] for (_, slot), amounts in inbox.flows.items()}
        for at, sender, receiver in case["lost"]:
            if at == number:  # the sender has merged what the receiver sent, and hears that its own did not come: it rolls back
                owed[sender] = -flows_of[sender][receiver]
        x = after
        if number + 1 in case["after"]:
            found[str(number + 1)] = {name: bytes(bytes_of(vector)).hex() for name, vector in x.items()}
    return {round_: dict(vectors) for round_, vectors in found.items()}


def averaging() -> dict[str, Any]:
    """Three nodes on a path: their vectors after rounds 1, 2 and 10, bit for bit; and with one message lost, whose flow is rolled back."""
    third = 1 / 3
    weights = {"node-0": {"node-1": third}, "node-1": {"node-0": third, "node-2": third}, "node-2": {"node-1": third}}
    found = {}
    for dtype in ("float64", "float32"):
        first = {
            name: bytes(
                bytes_of(torch.tensor([0.1 + place, -1.7 * place, 1e-3, 12345.678 / (1 + place)], dtype=getattr(torch, dtype)))
            ).hex()
            for place, name in enumerate(weights)
        }
        lost_one = [[1, "node-0", "node-1"]]
        for what, lost in (("everything comes", []), ("node-0's update of round 1 does not reach node-1", lost_one)):
            case = {"dtype": dtype, "weights": weights, "first": first, "lost": lost, "after": [1, 2, 3, 10]}
            found[f"{dtype}, {what}"] = {**case, "vectors": run_averaging(case)}
    return found
