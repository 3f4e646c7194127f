"""Tasks, sites, and ways to partition rows among sites."""

from __future__ import annotations

from p2pfl.tasks.base import MetricFunction, Task
from p2pfl.tasks.loading import TABLE, TASKS, check_may_run, find_task, load_task, make_task
from p2pfl.tasks.metrics import Metric, accuracy, auroc, balanced_accuracy, log_loss
from p2pfl.tasks.partition import PARTITIONS, hold_out, hold_out_everywhere, partition
from p2pfl.tasks.permission import task
from p2pfl.tasks.sites import Rows, Site, SitesByName, SiteTable, Split

__all__ = [
    "PARTITIONS",
    "TABLE",
    "TASKS",
    "Metric",
    "MetricFunction",
    "Rows",
    "Site",
    "SiteTable",
    "SitesByName",
    "Split",
    "Task",
    "accuracy",
    "auroc",
    "balanced_accuracy",
    "check_may_run",
    "find_task",
    "hold_out",
    "hold_out_everywhere",
    "load_task",
    "log_loss",
    "make_task",
    "partition",
    "task",
]
