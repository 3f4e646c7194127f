"""The way of an update through a daemon: it goes into the protocol once, comes out of it once, and is merged."""

from __future__ import annotations

import sys
import threading
from contextvars import ContextVar

from networks import Network, finish, plan_of
from p2pfl.paces import Held
from p2pfl.protocol.edges import DueMerge
from p2pfl.wire.update import ReceivedUpdate
from test_layers import PACKAGE

RAW = {"task": {"name": "synthetic-logistic"}, "nodes": 2, "rounds": 4, "stop": None, "baselines": [], "evaluate_every": 10}
NODE, PROTOCOL = (str(PACKAGE / "node"), (str(PACKAGE / "protocol"), str(PACKAGE / "paces")))
WATCHED: ContextVar[bool] = ContextVar("watched", default=False)


def has_update(value: object) -> bool:
    """Whether a value is an update, the frames of one, or some of them."""
    if isinstance(value, dict | tuple | list):
        return any(has_update(each) for each in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, ReceivedUpdate | Held | DueMerge | memoryview)


def test_an_update_goes_into_the_protocol_once_and_comes_out_once(tmp_path):
    plan, crossings = plan_of(**RAW), []

    def note(frame, event, result):
        code = frame.f_code
        if event not in ("call", "return") or not WATCHED.get():
            return
        if code.co_filename == str(PACKAGE / "training" / "population.py") and code.co_name == "merge" and event == "return":
            crossings.append("merged")
        is_from_node = frame.f_back is not None and frame.f_back.f_code.co_filename.startswith(NODE)
        if code.co_filename.startswith(PROTOCOL) and is_from_node:
            given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
            if has_update(result if event == "return" else given):
                crossings.append(f"{'in' if event == 'call' else 'out'}: {code.co_name}")

    async def main():
        async with Network(plan, tmp_path) as network:
            for name in plan.names:
                WATCHED.set(name == plan.names[0])
                network.start(name)
            WATCHED.set(False)
            return await network.ended()

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        assert finish(main()) == ["rounds", "rounds"]
    finally:
        sys.setprofile(None)
        threading.setprofile(None)

    assert "in: hear" in crossings
    # only after the merge is the protocol told what came of each update
    assert [each for each in crossings if each != "in: hear"] == ["out: due", "merged", "in: hold"] * plan.experiment.rounds
