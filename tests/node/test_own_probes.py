"""What a node tells neighbours' doctors of its first model: computed once, beside the loop, and without a second model."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import ClassVar

from torch import nn

from networks import finish, plan_of, until
from p2pfl.experiment.plan import make_plan
from p2pfl.node.own_probes import own_probes
from p2pfl.wire.messages import DoctorQuestion

DEADLINE_S = 60
STUDY = "aa" * 32
QUESTION = DoctorQuestion(number=1, pad=b"")


class Slow(nn.Linear):
    """A model whose forward pass lasts until it is told to end, once that is asked of it."""

    waits = False
    go_on, begun = threading.Event(), threading.Event()
    places: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        super().__init__(3, 1)

    def forward(self, inputs):
        if Slow.waits:
            Slow.places.add(self.weight.data_ptr())
            Slow.begun.set()
            assert Slow.go_on.wait(DEADLINE_S)
        return super().forward(inputs)


def slow_plan():
    made = plan_of(task={"name": "synthetic-logistic", "features": 3, "samples": 12}, nodes=2, topology={"name": "path"}, compiled="off")
    return make_plan(made.experiment, replace(made.task, model=Slow))


def test_questions_are_answered_while_the_forward_pass_is_computed_and_no_parameter_is_copied(monkeypatch):
    plan = slow_plan()
    probes = own_probes(plan, plan.names[0], STUDY)
    monkeypatch.setattr(Slow, "waits", True)

    async def main():
        assert probes.answer(QUESTION).forward is None
        await asyncio.to_thread(Slow.begun.wait, DEADLINE_S)
        assert probes.answer(QUESTION).forward is None
        Slow.go_on.set()
        await until(lambda: probes.answer(QUESTION).forward is not None)

    finish(main())

    assert Slow.places == {plan.model.weight.data_ptr()}


def test_without_a_loop_the_forward_pass_is_there_at_once():
    plan = slow_plan()

    assert own_probes(plan, plan.names[0], STUDY).answer(QUESTION).forward is not None
