"""Which of the links that institutions can have to use, with what weights, and which new one would help most: by the clock.

How long a round lasts: every node sends its model over all its links in use at once. A link delivers after its latency plus the model's
bits over its bandwidth, both as the file says, in both directions at the same time and whatever the node's other links carry. The round is
over when the slowest link in use has delivered; what nodes compute is not counted. Where the links in use change from round to round,
nobody starts a round before all have ended the one before: daemons, which wait for their own neighbours only, are faster.

Shapes: N nodes, E links, B choices of links.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from p2pfl.errors import MissingExtraError, TopologyError
from p2pfl.topology.graph import FloatArray, IntArray, Topology
from p2pfl.topology.matcha import matchings
from p2pfl.topology.schedule import ACCURACY, disagreement_left, make_schedule
from p2pfl.topology.spectrum import rounds_at, rounds_to
from p2pfl.topology.weights import weighted

BoolArray = NDArray[np.bool_]

RULES = ("metropolis", "max-degree", "lazy", "best-constant")
"""Weights that are tried on every choice of links; fdla is tried where it can be better."""

BUDGETS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Communication budget of MATCHA."""

_MAX_NODES = 128
_MAX_SEARCHED_LINKS = 15  # 2**15 choices of links
_MAX_THRESHOLDS = 64
_MAX_THINNED = 10**7  # links times N**3
_MAX_RANDOM_NODES = 64
_MAX_OPTIMISED_NODES = 32
_MAX_TURNED = 8  # thresholds for which matchings are followed in turns
_MAX_NEW_LINKS = 400
_MAX_NEW_NUMBERS = 2 * 10**6  # new links times N**2
_THOROUGH_NEW_LINKS = 4
_BETTER_AT_RANDOM = 0.01
_SIMPLEST_FIRST = ("metropolis", "max-degree", "best-constant", "lazy", "given", "fdla", "1/2", "its own")
_BATCH_NUMBERS = 2**22
_CONNECTED = 1e-9
_NAMED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to use the links."""

    use: Literal["links", "matchings", "matcha"]
    """All of them in every round; their matchings in turns; their matchings at random."""

    weights: str
    """A rule, or the schedule's own."""

    links: tuple[tuple[int, int], ...]
    """Those that are ever used, the smaller node first."""

    round_s: float
    """Seconds that a round lasts, on average."""

    rounds: int
    """Until `ACCURACY` is left: for the worst start; with MATCHA for the worst start on average over the draws."""

    seconds: float
    bytes_sent: float
    """By a node until then, on average over the nodes."""

    budget: float | None = None
    """Communication budget of MATCHA."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkCosts:
    """Links that advice may choose from, with what a message takes over each."""

    num_nodes: int
    pairs: IntArray
    """(E, 2), the smaller node first, sorted."""

    seconds_E: FloatArray
    """Seconds that one message takes."""

    size_bytes: float
    """Size of a message."""

    given: Topology | None = None
    """The graph with the weights that its file gives."""

    def only(self, mask_E: BoolArray) -> Topology:
        """The graph of some of them."""
        ends = self.pairs[mask_E]
        return Topology.from_edges("some links", self.num_nodes, ends[:, 0], ends[:, 1])

    def thresholds(self) -> list[BoolArray]:
        """Masks of all links that are at least so fast, from the fastest that connect everybody to all of them; some of very many."""
        from scipy.sparse.csgraph import connected_components

        limits = np.unique(self.seconds_E)[::-1]
        masks = [self.seconds_E <= limit for limit in limits[:: -(-len(limits) // _MAX_THRESHOLDS)][::-1]]
        return [mask_E for mask_E in masks if connected_components(self.only(mask_E).adjacency(), directed=False)[0] == 1]


def link_costs(topology: Topology, size_bytes: float) -> LinkCosts:
    """Compute the costs of the links of a graph whose edges have latency and bandwidth.

    Raises:
        TopologyError: they have not, links go one way, or there are too many nodes.
    """
    if topology.directed:
        raise TopologyError(f"topology {topology.name} is directed; advice is for links that go both ways")
    if topology.num_nodes > _MAX_NODES:
        raise TopologyError(f"topology {topology.name} of {topology.num_nodes} nodes: advice is for at most {_MAX_NODES}")
    once = topology.senders > topology.receivers
    pairs = np.stack([topology.receivers[once], topology.senders[once]], axis=1)
    missing = [key for key in ("latency_ms", "bandwidth_mbps") if getattr(topology, key) is None]
    if missing:
        first = [f"{topology.label(i)} - {topology.label(j)}" for i, j in pairs[:_NAMED].tolist()]
        more = ", ..." if len(pairs) > _NAMED else ""
        remedy = " and ".join(f"--{key.replace('_', '-')}" for key in missing)
        raise TopologyError(
            f"topology {topology.name}: its {len(pairs)} links have no {' and no '.join(missing)} ({', '.join(first)}{more});"
            f" write it on each, {{between: [a, b], {missing[0]}: 10}}, or give {remedy} for all"
        )
    assert topology.latency_ms is not None
    assert topology.bandwidth_mbps is not None
    seconds_E = message_seconds(topology.latency_ms[once], topology.bandwidth_mbps[once], size_bytes)
    return LinkCosts(
        num_nodes=topology.num_nodes,
        pairs=pairs,
        seconds_E=seconds_E,
        size_bytes=size_bytes,
        given=topology if topology.weights is not None else None,
    )


def message_seconds(latency_ms: FloatArray, bandwidth_mbps: FloatArray, size_bytes: float) -> FloatArray:
    """Latency, and the bits over the bandwidth."""
    return np.asarray(latency_ms / 1e3 + size_bytes * 8 / (bandwidth_mbps * 1e6))


def options(links: LinkCosts) -> list[Option]:
    """The best choice of links for each rule, all links for each rule, matchings in turns, MATCHA; the fastest first."""
    everything_E = np.ones(len(links.pairs), dtype=np.bool_)
    rules = RULES if links.given is None else (*RULES, "given")
    found = [option for rule in rules for option in _static(links, everything_E, rule)]
    found += best_links(links)
    found += fastest_weights(links, min((option.seconds for option in found), default=math.inf))
    found += in_turns(links)
    found += at_random(links)
    return sorted({(o.use, o.weights, o.links, o.budget): o for o in found}.values(), key=_rank)


def recommended(found: Sequence[Option]) -> Option:
    """The fastest; MATCHA, whose seconds are an average, only where it saves more than a hundredth."""
    certain = min((option for option in found if option.use != "matcha"), key=_rank)
    fastest = min(found, key=_rank)
    return fastest if fastest.seconds < (1 - _BETTER_AT_RANDOM) * certain.seconds else certain


def is_exhaustive(links: LinkCosts) -> bool:
    """Whether every choice of links is looked at."""
    return len(links.pairs) <= _MAX_SEARCHED_LINKS


def best_links(links: LinkCosts, rules: Sequence[str] = RULES) -> list[Option]:
    """For each rule the links with which it takes the fewest seconds, used in every round.

    With at most 15 links every choice that connects everybody is tried. With more, all links up to each speed, and then, unless the graph
    is large, again and again without the one link without which it is fastest.
    """
    found = []
    if is_exhaustive(links):
        masks_BE = (np.arange(2 ** len(links.pairs))[:, None] >> np.arange(len(links.pairs)) & 1).astype(np.bool_)
        masks_BE = masks_BE[masks_BE.sum(axis=1) >= links.num_nodes - 1]
    else:
        masks_BE = np.array(links.thresholds())
    rounds = _rounds_of(links, masks_BE)
    for rule in rules:
        best_E, best = _fastest(links, masks_BE, rounds[rule])
        while not is_exhaustive(links) and len(links.pairs) * links.num_nodes**3 <= _MAX_THINNED:
            thinner_BE = best_E & ~np.eye(len(best_E), dtype=np.bool_)[best_E]
            thinner_E, thinner = _fastest(links, thinner_BE, _rounds_of(links, thinner_BE)[rule])
            if thinner >= best:
                break
            best_E, best = thinner_E, thinner
        found += _static(links, best_E, rule)
    return found


def fastest_weights(links: LinkCosts, to_beat_s: float) -> list[Option]:
    """Weights fdla on the links that are at least so fast, wherever that may take fewer seconds than something else does.

    More links never make it slower but for their own time, because a weight may be 0: what it takes on all links bounds the rounds.
    """
    if links.num_nodes > _MAX_OPTIMISED_NODES:
        return []
    found: list[Option] = []
    least_rounds = 1
    try:
        for mask_E in links.thresholds()[::-1]:
            if found and links.seconds_E[mask_E].max() * least_rounds >= to_beat_s:
                continue
            for option in _static(links, mask_E, "fdla"):
                least_rounds = max(least_rounds, option.rounds)
                to_beat_s = min(to_beat_s, option.seconds)
                found.append(option)
    except MissingExtraError:
        return []
    best = min(found, key=_rank, default=None)
    return [option for option in found if option is best or len(option.links) == len(links.pairs)]


def in_turns(links: LinkCosts) -> list[Option]:
    """Matchings one after the other, of all links that are at least so fast; the best of these."""
    thresholds = links.thresholds()
    step = -(-len(thresholds) // _MAX_TURNED)
    found = []
    for mask_E in thresholds[::-1][::step]:
        schedule = make_schedule("matchings", links.num_nodes, base=links.only(mask_E))
        period = [schedule.at(number) for number in range(schedule.period or 1)]
        slowest_s = [_slowest(links, graph.receivers, graph.senders) for graph in period]
        left = list(disagreement_left(schedule))
        rounds = len(left)
        if left[-1] <= ACCURACY:
            seconds = sum(slowest_s[number % len(period)] for number in range(rounds))
            sent = sum(2 * period[number % len(period)].num_edges for number in range(rounds)) / links.num_nodes * links.size_bytes
            found.append(_option(links, mask_E, "matchings", "1/2", rounds, seconds / rounds, sent))
    return [min(found, key=_rank)] if found else []


def at_random(links: LinkCosts) -> list[Option]:
    """MATCHA on all links; the best budget of some."""
    if links.num_nodes > _MAX_RANDOM_NODES:
        return []
    everything_E = np.ones(len(links.pairs), dtype=np.bool_)
    base = links.only(everything_E)
    groups = matchings(base)
    slowest_s = [_slowest(links, *group.T) for group in groups]
    found = []
    for budget in BUDGETS:
        schedule = make_schedule("matcha", links.num_nodes, base=base, budget=budget)
        left, p_M = schedule.facts["squared_left"], schedule.agreed["probabilities"]
        rounds = rounds_at(1 - left, ACCURACY**2)
        if rounds is None:
            continue
        round_s, none_slower = 0.0, 1.0  # the slowest in use decides: none of the slower ones is in use, and this one is
        for second, p in sorted(zip(slowest_s, p_M, strict=True), reverse=True):
            round_s, none_slower = round_s + second * p * none_slower, none_slower * (1 - p)
        sent = sum(2 * len(group) * p for group, p in zip(groups, p_M, strict=True)) / links.num_nodes * rounds * links.size_bytes
        found.append(replace(_option(links, everything_E, "matcha", "its own", rounds, round_s, sent), budget=budget))
    return [min(found, key=_rank)] if found else []


def best_new_link(links: LinkCosts, second: float) -> tuple[tuple[int, int] | None, Option | None, int]:
    """The link that is not there and would save most, if one message over it took so long; the best with it; and how many were tried.

    Without MATCHA. On a small graph everything else is tried for every pair; otherwise the pairs are ranked by what their link would do for
    plain rules, and the first four are looked at closely. Of many pairs only those are tried that the slowest mode keeps furthest apart.
    """
    there = {tuple(pair) for pair in links.pairs.tolist()}
    pairs = [pair for pair in combinations(range(links.num_nodes), 2) if pair not in there]
    most = min(_MAX_NEW_LINKS, _MAX_NEW_NUMBERS // links.num_nodes**2)
    if len(pairs) > most:
        slowest_N = np.linalg.eigh(links.only(np.ones(len(links.pairs), dtype=np.bool_)).laplacian().toarray())[1][:, 1]
        pairs = sorted(pairs, key=lambda pair: (-round(abs(float(slowest_N[pair[0]] - slowest_N[pair[1]])), 9), pair))[:most]
    seconds_E = np.append(links.seconds_E, second)
    with_link = {pair: replace(links, pairs=np.vstack([links.pairs, pair]), seconds_E=seconds_E, given=None) for pair in pairs}
    if not all(map(is_exhaustive, with_link.values())):
        pairs = sorted(pairs, key=lambda pair: (_quick(with_link[pair]), pair))[:_THOROUGH_NEW_LINKS]
    found: list[tuple[tuple[int, int], Option]] = []
    for pair in pairs:
        tried = best_links(with_link[pair]) + in_turns(with_link[pair])
        tried += fastest_weights(with_link[pair], min(option.seconds for option in (*tried, *(best for _, best in found))))
        found.append((pair, min(tried, key=_rank)))
    if not found:
        return None, None, 0
    pair, best = min(found, key=lambda new: (_rank(new[1]), new[0]))
    return pair, best, len(with_link)


def _quick(links: LinkCosts) -> float:
    """Seconds with plain rules on the links that are at least so fast."""
    masks_BE = np.array(links.thresholds())
    return min(_fastest(links, masks_BE, rounds)[1][0] for rounds in _rounds_of(links, masks_BE).values())


def _static(links: LinkCosts, mask_E: BoolArray, rule: str) -> list[Option]:
    """The option to use some links in every round with the weights of a rule; none where nobody ever agrees by it."""
    graph = links.given if rule == "given" and links.given is not None else links.only(mask_E)
    rounds = rounds_to(weighted(graph, rule), ACCURACY)
    if rounds is None:
        return []
    sent = rounds * 2 * int(mask_E.sum()) / links.num_nodes * links.size_bytes
    return [_option(links, mask_E, "links", rule, rounds, float(links.seconds_E[mask_E].max()), sent)]


def _option(
    links: LinkCosts,
    mask_E: BoolArray,
    use: Literal["links", "matchings", "matcha"],
    weights: str,
    rounds: int,
    round_s: float,
    sent: float,
) -> Option:
    used = tuple((i, j) for i, j in links.pairs[mask_E].tolist())
    return Option(use=use, weights=weights, links=used, round_s=round_s, rounds=rounds, seconds=rounds * round_s, bytes_sent=sent)


def _rank(option: Option) -> tuple[float, float, int, int]:
    """The smaller the better: seconds, bytes; of equals the one with more links, which a lost one hurts less, then the simplest weights."""
    return round(option.seconds, 12), round(option.bytes_sent, 6), -len(option.links), _SIMPLEST_FIRST.index(option.weights)


def _fastest(links: LinkCosts, masks_BE: BoolArray, rounds_B: FloatArray) -> tuple[BoolArray, tuple[float, float]]:
    """The mask with the fewest seconds, then the fewest messages, and these two."""
    seconds_B = np.where(masks_BE, links.seconds_E, 0).max(axis=1) * rounds_B
    messages_B = masks_BE.sum(axis=1) * rounds_B
    best = np.lexsort((messages_B, np.round(seconds_B, 12)))[0]
    return masks_BE[best], (float(seconds_B[best]), float(messages_B[best]))


def _rounds_of(links: LinkCosts, masks_BE: BoolArray) -> dict[str, FloatArray]:
    """Rounds by rule for each choice of links (B,), as `rounds_to` of `weighted` finds them; infinite where it does not connect all."""
    batch = max(1, _BATCH_NUMBERS // links.num_nodes**2)
    parts = [_contractions(links, masks_BE[first : first + batch]) for first in range(0, len(masks_BE), batch)]
    return {
        rule: np.array(
            [math.inf if (rounds := rounds_at(1 - c, ACCURACY)) is None else rounds for part in parts for c in part[rule].tolist()]
        )
        for rule in RULES
    }


def _contractions(links: LinkCosts, masks_BE: BoolArray) -> dict[str, FloatArray]:
    """max(|lambda_2|, |lambda_min|) of W by rule, (B,); 1 where links do not connect everybody."""
    n, (i_E, j_E) = links.num_nodes, links.pairs.T
    adjacency = np.zeros((len(masks_BE), n, n))
    adjacency[:, i_E, j_E] = adjacency[:, j_E, i_E] = masks_BE
    degrees_BN = adjacency.sum(axis=2)
    diagonal = np.arange(n)
    laplacian = -adjacency
    laplacian[:, diagonal, diagonal] = degrees_BN
    metropolis = adjacency / (1 + np.maximum(degrees_BN[:, :, None], degrees_BN[:, None, :]))
    metropolis[:, diagonal, diagonal] = 1 - metropolis.sum(axis=2)
    values_BN, mixing_BN = np.linalg.eigvalsh(laplacian), np.linalg.eigvalsh(metropolis)
    slow_B, fast_B = values_BN[:, 1], values_BN[:, -1]
    scale_B = 1 + degrees_BN.max(axis=1)
    found = {
        "metropolis": np.maximum(np.abs(mixing_BN[:, -2]), np.abs(mixing_BN[:, 0])),
        "max-degree": np.maximum(np.abs(1 - slow_B / scale_B), np.abs(1 - fast_B / scale_B)),
        "lazy": np.maximum(np.abs(1 + mixing_BN[:, -2]), np.abs(1 + mixing_BN[:, 0])) / 2,
        "best-constant": (fast_B - slow_B) / np.maximum(fast_B + slow_B, _CONNECTED),
    }
    return {rule: np.where(slow_B > _CONNECTED, left_B, 1.0) for rule, left_B in found.items()}


def _slowest(links: LinkCosts, one: IntArray, other: IntArray) -> float:
    """Seconds of the slowest of the links between some pairs of nodes."""
    used_E = np.isin(links.pairs @ [links.num_nodes, 1], np.minimum(one, other) * links.num_nodes + np.maximum(one, other))
    return float(links.seconds_E[used_E].max())
