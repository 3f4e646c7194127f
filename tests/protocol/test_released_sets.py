"""No totals over several sets, however they are added and subtracted, give a sum over few members."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from p2pfl.errors import ConfigError
from p2pfl.protocol.released_sets import atoms, check_sets, fewest_in_atom

FEWEST = fewest_in_atom(3, 1)
NAMES = {str(number): f"clinic {number}" for number in range(10)}


def a_set(digits):
    return frozenset(digits)


def test_pairs_of_sets_are_not_enough():
    with pytest.raises(ConfigError, match="the sum over clinic 3 alone would be known"):
        check_sets("count", a_set("1245"), [a_set("123"), a_set("345")], fewest=1 + 1, names=NAMES)


def test_the_same_set_may_be_asked_again_and_one_without_a_member_may_not():
    check_sets("count", a_set("1234"), [a_set("1234")], fewest=FEWEST)
    with pytest.raises(ConfigError, match=r"count has been asked over other members: .* clinic 4 alone"):
        check_sets("count", a_set("123"), [a_set("1234")], fewest=FEWEST, names=NAMES)


def test_large_atoms_and_consent_let_another_set_through():
    check_sets("count", a_set("123456"), [a_set("123")], fewest=FEWEST)
    check_sets("count", a_set("123"), [a_set("1234")], fewest=FEWEST, consenting="4")
    with pytest.raises(ConfigError, match="clinic 4, clinic 5 alone"):
        check_sets("count", a_set("123"), [a_set("12345")], fewest=FEWEST, consenting="4", names=NAMES)


@given(st.lists(st.frozensets(st.sampled_from("0123456789"), min_size=1), min_size=1, max_size=6))
def test_what_totals_span_never_isolates_part_of_an_atom(sets):
    members = sorted(frozenset().union(*sets))
    assume(len(members) > 1)
    found = atoms(sets)
    totals = np.array([[member in each for member in members] for each in sets], dtype=float)

    assert sorted(member for atom in found for member in atom) == members
    for atom in found:  # every combination of totals weighs the members of an atom alike
        columns = totals[:, [members.index(member) for member in sorted(atom)]]
        assert (columns == columns[:, :1]).all()
