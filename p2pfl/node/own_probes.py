"""Facts that a node tells neighbours' doctors: versions, digests, its clock, and what its first model makes of agreed numbers."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version

import torch

import p2pfl
from p2pfl.errors import P2PFLError
from p2pfl.experiment.plan import Plan
from p2pfl.governance.result_contract import ARITHMETIC_REVISION, public
from p2pfl.params import parameters_of
from p2pfl.protocol.probes import Forward, Probes
from p2pfl.tasks.calling import users_code
from p2pfl.training.backends.gradients import outputs_of
from p2pfl.training.training_data import of_dtype
from p2pfl.wire.messages import MAX_OUTPUTS, ProbeAnswer

_ROWS, _STEP, _MODULUS = 4, 7919, 2003


def own_probes(plan: Plan, me: str, study_digest: str, take: Callable[[str, ProbeAnswer], None] = lambda _, __: None) -> Probes:
    """Put together what a node tells; the first model's outputs are computed when somebody asks for the first time."""
    return Probes(
        version=p2pfl.__version__,
        torch=public(version("torch")),
        arithmetic=ARITHMETIC_REVISION,
        study=bytes.fromhex(study_digest),
        layout=bytes.fromhex(plan.layout.digest),
        start=bytes.fromhex(plan.start_digest),
        clock_ms=lambda: int(1000 * time.time()),
        forward=cache(lambda: first_outputs(plan, me)),
        take=take,
    )


def first_outputs(plan: Plan, me: str) -> Forward | None:
    """Outputs of the model at its start for a few rows of agreed numbers, of a site's shape; None where they are not to be had.

    The numbers are k * 7919 mod 2003 / 2003, the same bits on every machine, so that only the model and its arithmetic make a difference.
    """
    rows = next((part for part in (plan.sites[me].train, plan.sites[me].test) if part is not None), None)
    if rows is None:
        return None
    like = rows[0][:_ROWS]
    numbers = (torch.arange(like.numel(), dtype=torch.int64) * _STEP % _MODULUS).reshape(like.shape)
    inputs = of_dtype(numbers.double() / _MODULUS if like.is_floating_point() else torch.zeros_like(like), plan.layout.dtype)
    try:
        with users_code(plan.task.name, "model", inputs, site=me):
            found = outputs_of(plan.model, parameters_of(plan.model), {}, inputs).double().flatten()
    except P2PFLError:
        return None
    first = tuple(found[:MAX_OUTPUTS].tolist())
    if not all(map(math.isfinite, first)):
        return None
    return Forward(digest=hashlib.sha256(found.numpy().astype("<f8").tobytes()).digest(), outputs=first)
