"""Nodes that make secure sums: every participant has the exact fit, whoever is killed, and nobody's numbers are on the way."""

from __future__ import annotations

import asyncio
import random
import shutil
from contextlib import suppress
from functools import partial, reduce

import networkx as nx
import numpy as np
import pytest
from inference_data import numbers, table
from secure_members import STATISTICS
from sum_clinics import NAMES, SumClinics, bits, planned_regression, regression, run
from test_glm import split

from p2pfl.errors import ConfigError, DataError, TransportError
from p2pfl.node.sum_node import SumSessionEnded
from p2pfl.node.sum_store import SumFolder
from p2pfl.privacy.fixed_point import added
from p2pfl.privacy.masks import SessionMasks
from p2pfl.protocol.led_sums import LedAnalysis
from p2pfl.statistics.families import FAMILIES
from p2pfl.statistics.glm import fit_glm
from p2pfl.statistics.scale import INTERCEPT
from p2pfl.statistics.sums import analyse
from p2pfl.wire.sum_codec import SumPresence, encode_sum
from virtual_time import run_virtually

HOUR_S = 120.0
GRAPHS = {"ring": nx.cycle_graph(5), "path": nx.path_graph(5), "star": nx.star_graph(4)}


def slow(*cases):
    """Cases of a test that take too long for every run."""
    return [pytest.param(*each, marks=pytest.mark.slow) for each in cases]


async def all_of(clinics, **settings):
    return await asyncio.gather(*(clinics.analyse(me, **settings) for me in range(len(clinics.names))))


def assert_exact(clinics, found):
    assert [bits(each) for each in found if each is not None] == [clinics.expected()] * len(clinics.terms.participants)


@pytest.mark.parametrize(
    ("graph", "over"), [("ring", "zeromq"), ("path", "memory"), ("star", "memory"), *slow(("path", "zeromq"), ("star", "zeromq"))]
)
def test_all_have_the_bits_of_the_fixed_point_sum(tmp_path, graph, over):
    clinics = SumClinics(tmp_path, GRAPHS[graph], over=over)
    found = run(clinics, all_of(clinics))

    assert_exact(clinics, found)
    pooled = analyse(regression(), clinics.rows)
    assert found[0].params == pytest.approx(pooled.params, rel=1e-9)
    assert len(found[0].params) == len(NAMES)


def test_three_studies_have_the_published_fit_of_their_pooled_rows(tmp_path):
    """As `test_glm` has it: gaussian LAB_TSC ~ LAB_TRIG of DataSHIELD's CNSIM."""
    rows = table("cnsim.csv")
    sites = split([numbers(rows, "LAB_TRIG")], numbers(rows, "LAB_TSC"), [row["study"] for row in rows])
    analysis = partial(fit_glm, [INTERCEPT, "LAB_TRIG"], FAMILIES["gaussian"])
    clinics = SumClinics(tmp_path, nx.path_graph(3), sums=planned_regression(2), analysis=analysis, rows=sites)
    found = run(clinics, all_of(clinics))

    assert_exact(clinics, found)
    assert found[2].params == pytest.approx([5.6971141805, 0.0752997656], abs=5e-11)
    assert found[2].bse == pytest.approx([0.0199836449, 0.0077541594], abs=5e-11)
    assert (found[2].num_rows, found[2].num_missing, found[2].deviance) == (7800, 1579, pytest.approx(8936.31974296402, rel=1e-12))


def test_altered_parts_would_be_found_and_whole_ones_pass(tmp_path):
    clinics = SumClinics(tmp_path, GRAPHS["path"], check=True)
    found = run_virtually(all_of(clinics), seed=0, at_most_s=HOUR_S)

    assert_exact(clinics, found)


def test_members_that_take_no_part_pass_on_what_others_add(tmp_path):
    clinics = SumClinics(tmp_path, GRAPHS["path"], participants=[0, 2, 4])
    found = run_virtually(all_of(clinics), seed=0, at_most_s=HOUR_S)

    assert_exact(clinics, found)
    assert [each is None for each in found] == [False, True, False, True, False]


# ---- members that are killed


async def with_one_killed(clinics, me, after, *, pause_s=1.0, between=lambda: None):
    others = [asyncio.ensure_future(clinics.analyse(each)) for each in range(len(clinics.names)) if each != me]
    await clinics.killed(me, after=after)
    between()
    await asyncio.sleep(pause_s)
    return await asyncio.gather(*others, clinics.analyse(me))


def num_sent(clinics, me):
    with SumFolder(clinics.folders[me]) as store:
        return len(store.sent())


KILLED = [("ring", 1, 7), ("path", 2, 4), ("star", 0, 1)]
MORE_KILLED = [(graph, me, after) for graph in GRAPHS for me, after in ((2, 4), (4, 0)) if (graph, me, after) not in KILLED]


@pytest.mark.parametrize(("graph", "me", "after"), [*KILLED, *slow(*MORE_KILLED)])
def test_one_that_is_killed_and_comes_back_changes_no_bit(tmp_path, graph, me, after):
    clinics = SumClinics(tmp_path, GRAPHS[graph])
    found = run_virtually(with_one_killed(clinics, me, after), seed=me, at_most_s=HOUR_S)

    assert_exact(clinics, found)
    assert {num_sent(clinics, each) for each in range(5)} == {found[0].iterations + 5}


@pytest.mark.slow
def test_thirteen_sites_of_a_random_graph_have_the_exact_fit(tmp_path):
    clinics = SumClinics(tmp_path, nx.random_regular_graph(4, 13, seed=3))
    found = run_virtually(all_of(clinics), seed=6, at_most_s=HOUR_S, work_s=(0.0005, 0.005))

    assert_exact(clinics, found)


@pytest.mark.slow
def test_one_that_has_lost_its_totals_gets_them_from_others(tmp_path):
    clinics = SumClinics(tmp_path, GRAPHS["star"])
    remove = lambda: shutil.rmtree(clinics.folders[3] / "totals")  # noqa: E731
    found = run_virtually(with_one_killed(clinics, 3, 5, between=remove), seed=3, at_most_s=HOUR_S)

    assert_exact(clinics, found)


@pytest.mark.slow
def test_over_real_links_as_well(tmp_path):
    clinics = SumClinics(tmp_path, GRAPHS["ring"], over="zeromq")
    found = run(clinics, with_one_killed(clinics, 2, 3, pause_s=0.0))

    assert_exact(clinics, found)


async def with_one_away(clinics, me, after):
    others = [asyncio.ensure_future(clinics.analyse(each)) for each in range(len(clinics.names)) if each != me]
    await clinics.killed(me, after=after)
    return await asyncio.gather(*others, return_exceptions=True)


@pytest.mark.parametrize(("graph", "me"), [("ring", 3), ("path", 2), *slow(("path", 4), ("star", 1))])
def test_one_that_stays_away_ends_the_session_with_its_name_for_all(tmp_path, graph, me):
    clinics = SumClinics(tmp_path, GRAPHS[graph], patience_s=5.0, wait_s=0.0)
    found = run_virtually(with_one_away(clinics, me, 3), seed=0, at_most_s=HOUR_S)

    assert [type(each) for each in found] == [SumSessionEnded] * 4
    assert {(str(each), each.names) for each in found} == {(f"clinic-{me}: away", (f"clinic-{me}",))}


def test_who_was_never_there_is_named_as_well(tmp_path):
    clinics = SumClinics(tmp_path, GRAPHS["star"], patience_s=5.0, wait_s=0.0)

    async def without_the_last():
        return await asyncio.gather(*(clinics.analyse(me) for me in range(4)), return_exceptions=True)

    found = run_virtually(without_the_last(), seed=0, at_most_s=HOUR_S)

    assert {(type(each), each.names) for each in found} == {(SumSessionEnded, ("clinic-4",))}


@pytest.mark.slow
def test_after_an_ended_session_the_next_goes_on_with_the_same_totals(tmp_path):
    clinics = SumClinics(tmp_path, GRAPHS["path"], patience_s=5.0, wait_s=0.0)
    run_virtually(with_one_away(clinics, 2, 3), seed=0, at_most_s=HOUR_S)
    before = [num_sent(clinics, each) for each in range(5)]
    found = run_virtually(all_of(clinics), seed=1, at_most_s=HOUR_S)

    assert min(before) >= 3
    assert_exact(clinics, found)


async def with_the_relay_killed_between(clinics, me):
    """It has sent what its branch adds up to, and the total has not come."""
    others = [asyncio.ensure_future(clinics.analyse(each)) for each in range(len(clinics.names)) if each != me]
    nodes = []
    task = asyncio.ensure_future(clinics.analyse(me, began=nodes.append))
    is_between = lambda found: found is not None and found._sent is not None and found.total is None  # noqa: E731
    while not (nodes and is_between(nodes[0].member._sum)):  # noqa: ASYNC110 - a sum, not an event
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return await asyncio.gather(*others, clinics.analyse(me))


@pytest.mark.parametrize("me", [1, 3])
def test_one_that_only_passes_on_is_killed_and_comes_back(tmp_path, me):
    clinics = SumClinics(tmp_path, GRAPHS["path"], participants=[0, 2, 4])
    found = run_virtually(with_the_relay_killed_between(clinics, me), seed=1, at_most_s=HOUR_S)

    assert_exact(clinics, found)


async def both_relays(clinics):
    return await asyncio.gather(clinics.analyse(1), clinics.analyse(3))


def test_one_that_only_passes_on_ends_where_nobody_is_there(tmp_path):
    clinics = SumClinics(tmp_path, GRAPHS["path"], participants=[0, 2, 4], linger_s=10.0, patience_s=10.0, wait_s=0.0)
    with pytest.raises(SumSessionEnded, match="no session of sums has been opened"):
        run_virtually(both_relays(clinics), seed=0, at_most_s=HOUR_S)


# ---- links that fail


@pytest.mark.slow
def test_lost_messages_change_no_bit(tmp_path):
    draw = random.Random(5)
    clinics = SumClinics(tmp_path, GRAPHS["ring"], lost=lambda *_: draw.random() < 0.03)
    found = run_virtually(all_of(clinics), seed=0, at_most_s=HOUR_S)

    assert_exact(clinics, found)


def test_a_cut_that_is_longer_than_the_patience_is_gone_on_after(tmp_path):
    cut = [False]
    clinics = SumClinics(
        tmp_path, GRAPHS["path"], lost=lambda sender, receiver, _: cut[0] and {sender, receiver} == {"clinic-2", "clinic-3"}
    )
    clinics.settings["patience_s"] = 3.0
    nodes = {}

    async def with_a_cut():
        members = [asyncio.ensure_future(clinics.analyse(me, began=lambda node, me=me: nodes.update({me: node}))) for me in range(5)]
        while len(nodes) < 5 or len(nodes[0].member.totals) < 2:  # noqa: ASYNC110 - totals, not an event
            await asyncio.sleep(0.01)
        cut[0] = True
        while not all(node.member.ended for node in nodes.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        cut[0] = False
        return await asyncio.gather(*members)

    found = run_virtually(with_a_cut(), seed=0, at_most_s=HOUR_S)

    assert_exact(clinics, found)


@pytest.mark.slow
def test_a_neighbour_that_sends_garbage_costs_nobody_else_anything(tmp_path):
    clinics = SumClinics(tmp_path, GRAPHS["ring"])
    network, draw, nodes = clinics.links.network, random.Random(2), []

    async def with_garbage():
        members = [asyncio.ensure_future(clinics.analyse(me, began=nodes.append)) for me in range(5)]
        for _ in range(200):
            await asyncio.sleep(0.01)
            transport = network.members.get("clinic-1")
            with suppress(TransportError):
                if transport is not None:
                    await transport.send("clinic-0", [draw.randbytes(draw.randrange(1, 300))], 0.1)
        return await asyncio.gather(*members)

    found = run_virtually(with_garbage(), seed=0, at_most_s=HOUR_S)

    assert_exact(clinics, found)
    assert nodes[0].counters["bad_message"] > 10


def test_a_neighbour_that_says_all_are_done_makes_nobody_leave(tmp_path):
    """Member 3 hangs at the relay between 0 and the others, and says at once that nobody needs anything."""
    graph = {0: [4], 1: [4, 2], 2: [1], 3: [4], 4: [0, 1, 3]}
    clinics = SumClinics(tmp_path, graph, participants=[0, 1, 2], linger_s=5.0, patience_s=4.0, wait_s=2.0)

    async def lies():
        async with clinics.links.member("clinic-3", ["clinic-4"]) as transport:
            while True:
                with suppress(TransportError):
                    lie = SumPresence(incarnation=5, echo=0, sent=0, lost=0, done=b"\xff")
                    await transport.send("clinic-4", next(encode_sum(lie)), 1.0)
                await asyncio.sleep(0.05)

    async def with_lies():
        liar = asyncio.ensure_future(lies())
        await asyncio.sleep(0.1)
        try:
            return await asyncio.gather(*(clinics.analyse(me) for me in (4, 0, 1, 2)))
        finally:
            liar.cancel()

    found = run_virtually(with_lies(), seed=0, at_most_s=HOUR_S)

    assert_exact(clinics, found)
    assert found[0] is None


# ---- sites that may not give their numbers


async def every_outcome_of(clinics):
    """Results and errors of all members."""
    return await asyncio.gather(*(clinics.analyse(me) for me in range(5)), return_exceptions=True)


def test_a_site_beyond_its_bound_sends_nothing_and_says_no_number(tmp_path):
    clinics = SumClinics(tmp_path, GRAPHS["path"], wait_s=0.0)
    clinics.rows[2].columns_MP[7, 1] = 1e12
    found = run_virtually(every_outcome_of(clinics), seed=0, at_most_s=HOUR_S)

    assert isinstance(found[2], ConfigError)
    assert "beyond the agreed bound" in str(found[2])
    assert num_sent(clinics, 2) == 0
    others = [each for me, each in enumerate(found) if me != 2]
    assert {str(each) for each in others} == {"clinic-2: gives no numbers to risk ~ age + dose: rows and means"}


def test_a_site_whose_data_are_at_fault_is_named_and_nobody_waits_for_it(tmp_path, monkeypatch):
    clinics = SumClinics(tmp_path, GRAPHS["star"], wait_s=0.0)
    numbers = LedAnalysis.numbers

    def at_fault(led, rows):
        if rows is clinics.rows[3] and led.position == 2:
            raise DataError("a value of 7 in column sex")
        return numbers(led, rows)

    monkeypatch.setattr(LedAnalysis, "numbers", at_fault)
    found = run_virtually(every_outcome_of(clinics), seed=0, at_most_s=HOUR_S)

    assert isinstance(found[3], DataError)
    others = {str(each) for me, each in enumerate(found) if me != 3}
    assert others == {"clinic-3: gives no numbers to risk ~ age + dose: missing rows and saturated log-likelihood"}


def test_what_totals_say_is_the_same_error_at_all_members(tmp_path):
    clinics = SumClinics(tmp_path, GRAPHS["path"], wait_s=0.0)
    for rows in clinics.rows:
        rows.outcomes_M[:] = rows.columns_MP[:, 2] > 0
    found = run_virtually(every_outcome_of(clinics), seed=0, at_most_s=HOUR_S)

    assert [type(each) for each in found] == [ConfigError] * 5
    assert {str(each) for each in found} == {"the outcome is separated by (Intercept), age, dose: their coefficients have no end"}


def test_a_restored_backup_with_other_rows_is_found_out(tmp_path):
    clinics = SumClinics(tmp_path, GRAPHS["path"], wait_s=0.0)
    backup = tmp_path / "backup"
    with SumFolder(clinics.folders[3]):
        pass
    shutil.copytree(clinics.folders[3], backup)

    def restore():
        shutil.rmtree(clinics.folders[3])
        shutil.copytree(backup, clinics.folders[3])
        clinics.rows[3].columns_MP[0, 1] += 1.0

    async def restored():
        others = [asyncio.ensure_future(clinics.analyse(each)) for each in range(5) if each != 3]
        task = asyncio.ensure_future(clinics.analyse(3))
        while b'"kind":"sent"' not in (clinics.folders[3] / "log.jsonl").read_bytes():  # noqa: ASYNC110 - a file, not an event
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        restore()
        return await asyncio.gather(*others, clinics.analyse(3), return_exceptions=True)

    found = run_virtually(restored(), seed=0, at_most_s=HOUR_S)

    assert str(found[4]) == "clinic-3: restored from a backup"
    assert [type(each) for each in found] == [SumSessionEnded] * 5
    found = run_virtually(every_outcome_of(clinics), seed=1, at_most_s=HOUR_S)

    assert isinstance(found[3], ConfigError)
    assert "this site was restored from a backup and cannot know what it has sent" in str(found[3])
    assert num_sent(clinics, 3) == 0
    assert {str(each) for each in found[:3]} == {"clinic-3: gives no numbers to risk ~ age + dose: rows and means"}


# ---- what is on the way


def words_of(values, integers):
    """All forms in which a site's numbers may be found in bytes."""
    for value in np.unique(np.abs(values[np.abs(values) > 1e-6])):
        for number in (value, -value):
            yield from (np.array(number, dtype=kind).tobytes() for kind in ("<f8", ">f8", "<f4", ">f4"))
    for limbs in integers.reshape(-1, 2):
        if limbs.any():
            for order in "<>":
                yield limbs[:1].astype(f"{order}u8").tobytes() if limbs[0] else limbs[1:].astype(f"{order}u8").tobytes()
            yield limbs.astype("<u8").tobytes()
            yield limbs[::-1].astype(">u8").tobytes()


def seen_in(clinics, sent):
    """How many forms of single sites' numbers, in all sums, are in what was sent."""
    given, analysis = [], LedAnalysis(regression(), clinics.terms.sums)
    while analysis.request is not None:
        parts = [analysis.numbers(rows) for rows in clinics.rows]
        given += parts
        analysis.take(reduce(added, [STATISTICS.encode(each) for each in parts]))
    words = {word for values in given for word in words_of(values, STATISTICS.encode(values))}
    assert len(words) > 1000
    return sum(word in sent for word in words if len(set(word)) > 3)  # a whole number as a float is mostly zeros


def recorded(clinics_of):
    sent = []
    clinics = clinics_of(lambda _sender, _receiver, frames: sent.extend(bytes(frame) for frame in frames))
    run_virtually(all_of(clinics), seed=0, at_most_s=HOUR_S)
    return clinics, b"\0".join(sent)


def test_no_number_of_a_site_is_on_the_way(tmp_path):
    clinics, sent = recorded(lambda record: SumClinics(tmp_path, GRAPHS["path"], lost=record))

    assert len(sent) > 100_000
    assert seen_in(clinics, sent) == 0


@pytest.mark.slow
def test_that_search_finds_numbers_that_are_not_masked(tmp_path, monkeypatch):
    monkeypatch.setattr(SessionMasks, "mask", lambda _, position, shape, context: np.zeros(shape, dtype=np.uint64))
    clinics, sent = recorded(lambda record: SumClinics(tmp_path, GRAPHS["path"], lost=record))

    assert seen_in(clinics, sent) > 10
