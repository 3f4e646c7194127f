"""Sites of an experiment: its task's rows, partitioned and held out as it says."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from p2pfl.experiment.spec import Experiment
from p2pfl.tasks import Site, SiteTable, Task, find_task, hold_out_everywhere, make_task, partition


def load_sites(experiment: Experiment, overrides: Mapping[str, Any] | None = None, *, allow_tasks: Collection[str] = ()) -> Task:
    """Load the experiment's task with the sites whose data are here, partitioned and held out as it says, sorted by name.

    Args:
        experiment: what to train on.
        overrides: a site's own arguments of the task, such as paths.
        allow_tasks: tasks that may run here beside the built-in ones, as distribution:entry or module:function.

    Raises:
        TaskNotAllowed: the task is not among them; nothing of it has been imported.
        ConfigError: the task is unknown or refuses its arguments.
    """
    arguments = {**experiment.task.options, **(overrides or {})}
    function = find_task(experiment.task.name, allow_tasks)
    accepted = inspect.signature(function).parameters
    split = {"name": experiment.partition.name, **experiment.partition.options}
    from_experiment: dict[str, Any] = {"seed": experiment.seed, "nodes": experiment.nodes, "partition": split}
    for key, value in from_experiment.items():
        if key in accepted and key not in arguments and value is not None:
            arguments[key] = value
    task = make_task(experiment.task.name, function, arguments)
    if experiment.nodes is not None and "nodes" not in accepted:
        task = partition(task, experiment.nodes, split, experiment.seed)
    sites = hold_out_everywhere(task.sites, experiment.validation, experiment.seed) if experiment.validation else task.sites
    if isinstance(sites, SiteTable):  # sorted, and not to be made one by one
        return task if sites is task.sites else replace(task, sites=sites)
    return replace(task, sites=sorted(sites, key=lambda site: site.name))


def names_of(sites: Sequence[Site]) -> tuple[str, ...]:
    """Names of all sites, in their order."""
    return sites.names if isinstance(sites, SiteTable) else tuple(site.name for site in sites)


def counts_of(sites: Sequence[Site]) -> dict[str, int]:
    """Numbers of training rows by site."""
    if isinstance(sites, SiteTable):
        return dict(zip(sites.names, sites.train.starts.diff().tolist(), strict=True))
    return {site.name: len(site.train[0]) if site.train else 0 for site in sites}
