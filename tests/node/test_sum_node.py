"""Nodes that make secure sums: every participant has the exact fit, whoever is killed, and nobody's numbers are on the way."""

from __future__ import annotations

import asyncio

import networkx as nx
import pytest
from sum_clinics import NAMES, SumClinics, bits, regression, run

from p2pfl.statistics.sums import analyse

GRAPHS = {"ring": nx.cycle_graph(5), "path": nx.path_graph(5), "star": nx.star_graph(4)}


async def all_of(clinics, **settings):
    return await asyncio.gather(*(clinics.analyse(me, **settings) for me in range(len(clinics.names))))


def assert_exact(clinics, found):
    assert [bits(each) for each in found if each is not None] == [clinics.expected()] * len(clinics.terms.participants)


@pytest.mark.parametrize("over", ["memory", "zeromq"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_all_have_the_bits_of_the_fixed_point_sum(tmp_path, graph, over):
    clinics = SumClinics(tmp_path, GRAPHS[graph], over=over)
    found = run(clinics, all_of(clinics))

    assert_exact(clinics, found)
    pooled = analyse(regression(), clinics.rows)
    assert found[0].params == pytest.approx(pooled.params, rel=1e-9)
    assert len(found[0].params) == len(NAMES)
