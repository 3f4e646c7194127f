"""The result contract that this machine can keep, and its differences from a study's."""

from __future__ import annotations

from importlib.metadata import version

import p2pfl
from p2pfl.errors import ConfigError
from p2pfl.governance.result_contract import ARITHMETIC_REVISION, AgreedTask, Difference, ResultContract, differences, public
from p2pfl.wire.messages import SCHEMA


def contract_here(task: str) -> ResultContract:
    """The contract that this machine can keep for an experiment with a task; one whose code is not here has no digest in it."""
    return ResultContract(
        p2pfl=p2pfl.__version__, wire=SCHEMA, arithmetic=ARITHMETIC_REVISION, torch=public(version("torch")), task=_task_here(task)
    )


def differences_here(agreed: ResultContract | None, task: str) -> list[Difference]:
    """Differences of this machine from the contract agreed on in a study; none where the study has none."""
    return [] if agreed is None else differences(agreed, contract_here(task))


def _task_here(name: str) -> AgreedTask | None:
    """The code of a task on this machine; without a digest where it is not here."""
    from p2pfl.tasks.provenance import task_code

    try:
        return task_code(name)
    except ConfigError:
        return AgreedTask(name=name)
