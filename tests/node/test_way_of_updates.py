"""The way of an update through a daemon: it goes into the protocol once, comes out of it once, and is merged."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextvars import ContextVar
from pathlib import Path

from networks import Network, finish, plan_of
from p2pfl.algorithms import Inbox
from p2pfl.protocol.edges import DueMerge, Held
from p2pfl.transports import Received
from p2pfl.wire.link import ReceivedMessage
from p2pfl.wire.messages import Update
from p2pfl.wire.update import ReceivedUpdate
from test_layers import PACKAGE

RAW = {"task": {"name": "synthetic-logistic"}, "nodes": 2, "rounds": 4, "stop": None, "baselines": [], "evaluate_every": 10}
NODE, PROTOCOL = (str(PACKAGE / "node"), (str(PACKAGE / "protocol"), str(PACKAGE / "paces")))
WATCHED: ContextVar[bool] = ContextVar("watched", default=False)


def has_update(value: object) -> bool:
    """Whether a value is an update, the frames of one, or some of them."""
    if type(value) in (dict, tuple, list):
        return any(has_update(each) for each in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Received | memoryview | Update | ReceivedMessage | ReceivedUpdate | Held | DueMerge | Inbox)


def is_sending() -> bool:
    """Whether the running task sends this node's own updates."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # a thread that trains or merges
        return False
    return task is not None and task.get_name().startswith("send to")


FILES = [
    "transports/memory.py",
    "node/daemon.py",
    "protocol/protocol.py",
    "wire/link.py",
    "wire/codec.py",
    "wire/update.py",
    "node/mixing.py",
    "algorithms/inbox.py",
]
"""Files that hold an update on its way from the socket to the merge of the row; below them is what the rule makes of its inbox."""


def test_an_update_goes_into_the_protocol_once_and_comes_out_once(tmp_path):
    plan, crossings, files = plan_of(**RAW), [], set()

    def note(frame, event, result):
        code = frame.f_code
        if event not in ("call", "return") or not WATCHED.get() or is_sending():
            return
        given = result if event == "return" else [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
        if code.co_filename.startswith(str(PACKAGE)) and "merged" not in crossings and has_update(given):
            files.add(str(Path(code.co_filename).relative_to(PACKAGE)))
        if code.co_filename.startswith(str(PACKAGE / "algorithms")) and code.co_name == "merge" and event == "return":
            crossings.append("merged")
        is_from_node = frame.f_back is not None and frame.f_back.f_code.co_filename.startswith(NODE)
        if code.co_filename.startswith(PROTOCOL) and is_from_node and has_update(given):
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

    files.discard("params.py")  # the bytes of this node's own start
    assert {file for file in files if not file.startswith("algorithms/") or file in FILES} == set(FILES)
    assert len(files) == len(FILES) + 1  # the rule's own
    assert "in: hear" in crossings
    # only after the merge is the protocol told what came of each update
    assert [each for each in crossings if each != "in: hear"] == ["out: due", "merged", "in: hold"] * plan.experiment.rounds
