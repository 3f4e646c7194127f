"""Facts that a node tells neighbours' doctors: versions, digests, its clock, and what its first model makes of agreed numbers."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

import p2pfl
from p2pfl.errors import P2PFLError
from p2pfl.experiment.plan import Plan
from p2pfl.governance.result_contract import ARITHMETIC_REVISION, public
from p2pfl.params import sharing_parameters
from p2pfl.protocol.probes import Forward, Probes
from p2pfl.tasks.calling import described, users_code
from p2pfl.training.training_data import of_dtype
from p2pfl.wire.messages import MAX_OUTPUTS, DoctorAnswer

_ROWS, _STEP, _MODULUS = 4, 7919, 2003


def own_probes(plan: Plan, me: str, study_digest: str, take: Callable[[str, DoctorAnswer], None] = lambda _, __: None) -> Probes:
    """Put together what a node tells; the first model's outputs are computed once, when somebody asks."""
    return Probes(
        version=p2pfl.__version__,
        torch=public(version("torch")),
        arithmetic=ARITHMETIC_REVISION,
        study=bytes.fromhex(study_digest),
        layout=bytes.fromhex(plan.layout.digest),
        start=bytes.fromhex(plan.start_digest),
        clock_ms=lambda: int(1000 * time.time()),
        forward=_InThread(partial(first_outputs, plan, me)),
        take=take,
    )


def first_outputs(plan: Plan, me: str) -> Forward | None:
    """Outputs of the model that all start from, for a few rows of agreed numbers, of a site's shape; None where they are not to be had.

    The numbers are k * 7919 mod 2003 / 2003, the same bits on every machine, so that only the model and its arithmetic make a difference.
    """
    rows = next((part for part in (plan.sites[me].train, plan.sites[me].test) if part is not None), None)
    if rows is None:
        return None
    like = rows[0][:_ROWS]
    numbers = (torch.arange(like.numel(), dtype=torch.int64) * _STEP % _MODULUS).reshape(like.shape)
    inputs = of_dtype(numbers.double() / _MODULUS if like.is_floating_point() else torch.zeros_like(like), plan.layout.dtype)
    try:
        with users_code(plan.task.name, "model", inputs, site=me), torch.no_grad():
            model = sharing_parameters(plan.model).eval()  # the plan's stays as it is, and its parameters are not there twice
            model.load_state_dict(dict(plan.first_buffers or {}), strict=False)  # what a site has learnt is nobody's business
            result: object = model(inputs)
            if not isinstance(result, Tensor):
                raise TypeError(f"it returned {described(result)}: expected a tensor")
            found = result.cpu().double().flatten()
    except P2PFLError:
        return None
    first = tuple(found[:MAX_OUTPUTS].tolist())
    if not all(map(math.isfinite, first)):
        return None
    return Forward(digest=hashlib.sha256(found.numpy().astype("<f8").tobytes()).digest(), outputs=first)


class _InThread:
    """A value that is computed once, when somebody asks: in a thread where a loop would stand still meanwhile; None until it is there."""

    def __init__(self, compute: Callable[[], Forward | None]) -> None:
        self._compute = compute
        self._found: Forward | None = None
        self._is_begun = False

    def __call__(self) -> Forward | None:
        if not self._is_begun:
            self._is_begun = True
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                self._run()
            else:
                loop.run_in_executor(None, self._run)
        return self._found

    def _run(self) -> None:
        self._found = self._compute()
