"""Files that a table task names: contract and agreed numbers become part of the experiment, files of sites stay on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from p2pfl.data.contract import Contract
from p2pfl.data.preprocessing import Preprocessing
from p2pfl.errors import ConfigError
from p2pfl.tasks.loading import TABLE
from p2pfl.yaml_files import shown

_AGREED = ("contract", "preprocessing")
_OWN = "sites"


def is_table(task: object) -> bool:
    """Whether the section `task` of an experiment is of a table task."""
    return isinstance(task, Mapping) and task.get("name") == TABLE


def with_table_contents(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Replace the names of a table task's contract and agreed numbers by their content, and those of sites' files by full paths.

    Raises:
        ConfigError: a file is missing or wrong.
    """
    found = dict(raw["task"])
    if isinstance(found.get("contract"), str):
        found["contract"] = Contract.load(file_beside(folder, found["contract"])).as_dict()
    if isinstance(found.get("preprocessing"), str) and isinstance(found.get("contract"), Mapping):
        contract = Contract.from_mapping(found["contract"], "task.contract")
        file = file_beside(folder, found["preprocessing"])
        if not file.exists():
            raise ConfigError("no such file; p2pfl data prepare EXPERIMENT makes it", str(file))
        found["preprocessing"] = Preprocessing.load(file, contract).as_dict()
    sites = found.get(_OWN)
    if isinstance(sites, str):
        found[_OWN] = str(file_beside(folder, sites))
    elif isinstance(sites, list):
        found[_OWN] = [str(file_beside(folder, site)) if isinstance(site, str) else site for site in sites]
    return {**raw, "task": found}


def without_site_files(task: Any) -> Any:
    """Leave a table task's files of sites out: in a study each member has its own site.yaml."""
    return {key: value for key, value in task.items() if key != _OWN} if is_table(task) else task


def faults_of_study_task(task: Any) -> Iterator[str]:
    """Find files that a study's table task names: no institution reads a file that another one names."""
    if not is_table(task):
        return
    for key in _AGREED:
        if isinstance(task.get(key), str):
            yield f"experiment.task.{key} = {shown(task[key])}: a study holds it, and names no file; make the study with p2pfl study new"
    if _OWN in task:
        yield f"experiment.task.{_OWN}: a study names no files of sites; make the study with p2pfl study new"


def faults_of_own_arguments(overrides: Mapping[str, Any]) -> Iterator[str]:
    """Find arguments of a table task that a member of a study gives for itself, where all have agreed on them."""
    for key, value in overrides.items():
        if key != _OWN:
            yield f"task.{key} = {shown(value)}: all members have agreed on it in the study: leave it out here"


def contract_of_task(task: Any) -> Contract | None:
    """Give the data contract that a study's table task holds; None where the task is another one."""
    if not is_table(task) or not isinstance(task.get("contract"), Mapping):
        return None
    return Contract.from_mapping(task["contract"], "experiment.task.contract")


def file_beside(folder: Path, file: str) -> Path:
    """Find a file beside the experiment, or where the command runs."""
    beside = folder / Path(file)
    return (beside if beside.exists() or not Path(file).exists() else Path(file)).absolute()
