"""Combinations of a checked sum are exact modulo 2^128, and what does not fit is named."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.privacy.fixed_point import added
from p2pfl.protocol.secure_tree import sum_tree
from p2pfl.protocol.sum_check import MODULUS, alterations, coefficients, combination
from p2pfl.wire.secure_messages import CheckValue

NUMBERS = st.integers(0, MODULUS - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1, 2**64, 2**127, MODULUS - 1])
TREE = sum_tree([set(graph) for _, graph in nx.path_graph(4).adjacency()], range(4))


def limbs(numbers):
    return np.array([[number & (2**64 - 1), number >> 64] for number in numbers], dtype=np.uint64).reshape(-1, 2)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20))
def test_a_combination_is_the_inner_product_modulo_two_to_the_128(pairs):
    weights, numbers = [weight for weight, _ in pairs], [number for _, number in pairs]
    expected = sum(weight * number for weight, number in pairs) % MODULUS

    assert combination(limbs(weights), limbs(numbers)) == expected


def test_coefficients_are_other_ones_for_another_total_digest_or_session():
    total, digests = limbs([1, 2, 3]), {0: bytes(32), 1: bytes(32)}
    found = [
        coefficients(bytes(32), digests, total),
        coefficients(b"\x01" * 32, digests, total),
        coefficients(bytes(32), {**digests, 1: b"\x01" * 32}, total),
        coefficients(bytes(32), digests, added(total, limbs([0, 0, 1]))),
    ]

    assert {each.shape for each in found} == {(3, 2)}
    assert len({each.tobytes() for each in found}) == 4


def values():
    """What four members on a path say, the last one first, when nobody has altered anything."""
    own = [5, 7, MODULUS - 1, 11]
    found = {}
    for member in (3, 2, 1, 0):
        received = ((member + 1, found[member + 1].sent),) if member < 3 else ()
        sent = (own[member] + sum(value for _, value in received)) % MODULUS
        found[member] = CheckValue(
            member=member, transcript=bytes(32), sum_id="", position=0, own=own[member], received=received, sent=sent
        )
    return found


@pytest.mark.parametrize(
    ("member", "changed", "named"),
    [
        (1, {"sent": 0}, (1,)),  # it sent another subtotal than its parts
        (1, {"received": ()}, (1,)),  # it left its child out
        (1, {"received": ((2, 0),)}, (1,)),
        (1, {"received": ((2, 17), (2, 17))}, (1,)),
        (2, {"own": 3, "sent": 14}, (1, 2)),  # it says that it sent what its parent has not received
        (0, {"own": 6, "sent": 23}, (0,)),  # the root's parts are not the total
    ],
)
def test_who_alters_a_part_is_named(member, changed, named):
    said = values()
    total = said[0].sent
    assert alterations(TREE, said, total) == []

    said[member] = replace(said[member], **changed)

    assert [each.members for each in alterations(TREE, said, total)] == [named]


def test_a_member_that_takes_no_part_has_nothing_of_its_own():
    tree = sum_tree([{1}, {0, 2}, {1, 3}, {2}], {0, 2, 3})
    assert [each.members for each in alterations(tree, values(), values()[0].sent)] == [(1,)]
