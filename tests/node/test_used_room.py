"""Room of updates is used again, by nobody at the same time, and there is never more of it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from networks import Network, finish, plan_of, starts
from p2pfl.node import spill, used_room
from p2pfl.node.used_room import WORTH_KEEPING_BYTES, UsedRooms
from p2pfl.params import tensor_over
from p2pfl.wire.codec import CHUNK_BYTES

SIZE_BYTES = WORTH_KEEPING_BYTES


def place(array):
    return array.__array_interface__["data"][0]


@pytest.fixture
def made(monkeypatch):
    """The sizes of rooms that the system was asked for."""
    sizes = []

    def counted(size_bytes, make=used_room.in_memory):
        sizes.append(size_bytes)
        return make(size_bytes)

    monkeypatch.setattr(used_room, "in_memory", counted)
    return sizes


def test_room_is_used_again_once_its_last_view_has_gone(made):
    rooms = UsedRooms(1)
    room = rooms.make(SIZE_BYTES)
    view = tensor_over(room[64:].view(np.float32))[3:]
    room[:] = 7
    del room

    other = rooms.make(SIZE_BYTES)
    other[:] = 8
    assert set(view.view(torch.uint8).tolist()) == {7}
    assert made == [SIZE_BYTES] * 2

    first = view.data_ptr() - 12 - 64
    del other, view  # one of them is kept: the other one was too many
    again = rooms.make(SIZE_BYTES)
    assert made == [SIZE_BYTES] * 2
    assert place(again) == first
    assert again.flags.writeable


def test_no_more_is_kept_than_there_may_be(made):
    rooms = UsedRooms(2)
    held = [rooms.make(SIZE_BYTES) for _ in range(4)]
    held.clear()
    held = [rooms.make(SIZE_BYTES) for _ in range(2)]
    assert len(made) == 4

    held.append(rooms.make(SIZE_BYTES))
    assert len(made) == 5


def test_room_of_another_size_is_given_back(made):
    rooms = UsedRooms(2)
    del (room := [rooms.make(SIZE_BYTES)])[:]
    room.append(rooms.make(2 * SIZE_BYTES))
    room.append(rooms.make(SIZE_BYTES))

    assert made == [SIZE_BYTES, 2 * SIZE_BYTES, SIZE_BYTES]
    assert [each.size for each in room] == [2 * SIZE_BYTES, SIZE_BYTES]


@pytest.mark.parametrize(("most", "size_bytes"), [(0, SIZE_BYTES), (2, SIZE_BYTES - 1)])
def test_room_that_is_not_to_be_kept_belongs_to_whoever_has_it(most, size_bytes, made):
    rooms = UsedRooms(most)
    room = rooms.make(size_bytes)

    assert made == [size_bytes]
    assert room.base is None


def test_views_may_go_in_any_thread(made):
    rooms = UsedRooms(3)

    def use(number):
        for _ in range(200):
            room = rooms.make(SIZE_BYTES)
            room[::4096] = number
            assert set(room[::4096].tolist()) == {number}
            del room  # before the next one is made

    threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 1 <= len(made) <= 3
    held = [rooms.make(SIZE_BYTES) for _ in range(3)]
    assert len(made) <= 3
    assert len({place(room) for room in held}) == 3


@pytest.mark.parametrize(("algorithm", "is_reused"), [("dpsgd", True), ("push-sum", False)])
def test_a_neighbours_update_comes_into_the_room_of_the_flow_before(algorithm, is_reused, tmp_path, made, monkeypatch):
    monkeypatch.setattr(used_room, "WORTH_KEEPING_BYTES", CHUNK_BYTES + 1)
    monkeypatch.setattr(spill, "in_memory", used_room.in_memory)  # an update that comes early counts as well
    weights = {"weights": "push-sum"} if algorithm == "push-sum" else {}
    rounds, task = 4, {"name": "averaging", "dimension": CHUNK_BYTES // 8 + 100}
    plan = plan_of(task=task, nodes=2, topology={"name": "complete"}, algorithm={"name": algorithm}, rounds=rounds, stop=None, **weights)

    async def main():
        async with Network(plan, tmp_path) as network:
            network.start()
            await network.ended()
            return network.models()

    models = finish(main())

    torch.testing.assert_close(models, starts(plan).mean(dim=0).expand_as(models), rtol=0, atol=1e-6)
    # an update that comes while the one before is still mixed needs room of its own, which happens to one of the two in a round
    assert len(made) <= 2 + rounds - 1 if is_reused else len(made) == 2 * rounds
