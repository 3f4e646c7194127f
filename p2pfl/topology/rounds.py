"""Graphs that change from round to round and reach the exact mean after finitely many of them.

A round is a list of edges with their weights. Everything here is a pure function of the number of nodes, so that every node knows every
round without asking anybody.

Shapes: N nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

Edge = tuple[int, int, float]
"""Two nodes and w_ij = w_ji."""

Round = list[Edge]


def hyper_hypercube(nodes: Sequence[int], degree: int) -> list[Round] | None:
    """Rounds after which every one of some nodes holds their mean; None where their number has a prime factor above degree + 1.

    With n = n_1 n_2 ... (each at most degree + 1, as few as possible) round j averages over digit j of the nodes' numbers in mixed radix.

    Source: Takezawa et al., "Beyond exponential graph", NeurIPS 2023 (arXiv:2305.11420), algorithm 1.
    """
    factors = fewest_factors(len(nodes), degree + 1)
    if factors is None:
        return None
    rounds, stride = [], 1
    for factor in factors:
        edges = [
            (nodes[first + a * stride], nodes[first + b * stride], 1 / factor)
            for first in range(len(nodes))
            if first // stride % factor == 0
            for a in range(factor)
            for b in range(a + 1, factor)
        ]
        rounds.append(edges)
        stride *= factor
    return rounds


@lru_cache(maxsize=4096)
def fewest_factors(number: int, largest: int) -> tuple[int, ...] | None:
    """The fewest factors from 2 to `largest` whose product is `number`, falling; None where there are none. 1 is the empty product."""
    if number == 1:
        return ()
    best: tuple[int, ...] | None = None
    for factor in range(min(largest, number), 1, -1):
        if number % factor == 0:
            rest = fewest_factors(number // factor, factor)
            if rest is not None and (best is None or len(rest) + 1 < len(best)):
                best = (factor, *rest)
    return best


def simple_base(nodes: Sequence[int], degree: int) -> list[Round]:
    """Rounds of the Simple Base-(k+1) graph, k the degree: the exact mean for any number of nodes.

    Source: Takezawa et al. 2023, algorithm 2: n is written in base k + 1, the parts of its digits average inside, then every node of the
    smaller parts gives the larger parts their share.
    """
    direct = hyper_hypercube(nodes, degree)
    if direct is not None:
        return direct
    base = degree + 1
    parts: list[list[list[int]]] = []  # V_l as its a_l blocks of base**p_l nodes, the largest power first
    start, rest = 0, len(nodes)
    while rest:
        power = base ** _log_floor(rest, base)
        count = rest // power
        parts.append([list(nodes[start + b * power : start + (b + 1) * power]) for b in range(count)])
        start, rest = start + count * power, rest - count * power
    members = [[node for block in blocks for node in block] for blocks in parts]
    inside = [hyper_hypercube(part, degree) or [] for part in members]
    blocks_inside = [[hyper_hypercube(block, degree) or [] for block in blocks] for blocks in parts]

    rounds = [[edge for cycle in inside if cycle for edge in cycle[number % len(cycle)]] for number in range(len(inside[0]))]
    total = 1 + len(blocks_inside[0][0])
    for number in range(total):
        edges: Round = []
        if number < len(parts) - 1:  # V_l gives its share to all smaller parts
            smaller = [node for part in members[number + 1 :] for node in part]
            weight = len(members[number]) / (len(members[number]) + len(smaller)) / len(parts[number])
            edges += [(block[i], node, weight) for block in parts[number] for i, node in enumerate(smaller)]
        for level in range(min(number, len(parts))):  # the parts that have given theirs average inside their blocks
            for cycle in blocks_inside[level]:
                step = number - level - 1
                if step < len(cycle):
                    edges += cycle[step]
        rounds.append(edges)
    return rounds


def base_graph(nodes: Sequence[int], degree: int) -> list[Round]:
    """Rounds of the Base-(k+1) graph: the simple one inside groups and then across them, where that is shorter.

    Source: Takezawa et al. 2023, algorithm 3.
    """
    simple = simple_base(nodes, degree)
    number = len(nodes)
    groups = math.gcd(number, math.prod(m ** _log_floor(number, m) for m in range(2, degree + 2)))
    size = number // groups
    across = [hyper_hypercube([nodes[g * size + i] for g in range(groups)], degree) for i in range(size)]
    if across[0] is None:
        return simple
    within = [simple_base(nodes[g * size : (g + 1) * size], degree) for g in range(groups)]
    rounds = [[edge for group in within for edge in group[r]] for r in range(len(within[0]))]
    rounds += [[edge for column in across if column for edge in column[r]] for r in range(len(across[0]))]
    return rounds if len(rounds) < len(simple) else simple


def _log_floor(number: int, base: int) -> int:
    power = 0
    while base ** (power + 1) <= number:
        power += 1
    return power
