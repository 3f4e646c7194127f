"""Tasks, which say what is learnt, with which model, loss and metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from p2pfl.errors import DataError
from p2pfl.tasks.sites import Rows, Site, SiteTable, describe

MetricFunction = Callable[[Tensor, Tensor], float]
"""(outputs, targets) -> a figure, on detached CPU tensors of one site's test rows; NaN where it is undefined."""

DTYPES = ("float32", "float64")


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A learning task: a model, a loss, metrics and the sites whose rows are on this machine.

    Raises:
        DataError: a field is not of its type; two sites have one name, rows of two sites differ in shape or dtype, a site has no rows to
            train on; all faults at once.
    """

    name: str

    model: Callable[[], nn.Module]
    """Called once under the experiment's seed, so that every node starts from the same parameters."""
    loss: Callable[[Tensor, Tensor], Tensor] | None
    """(outputs, targets) -> the mean over the batch, a scalar; None where there is nothing to train."""
    metrics: Mapping[str, MetricFunction]
    """By name; a `p2pfl.Metric` also says what it measures."""
    sites: Sequence[Site]

    features: tuple[str, ...] | None = None
    """The columns that ``Site.prepare`` takes, in order."""
    read: Callable[[Path], Tensor] | None = None
    """Model inputs (M, ...) of the rows in a user's file of new rows; with it a task may have no sites, for predictions alone."""
    probabilities: Callable[[Tensor], Tensor] | None = None
    """Outputs to probabilities, of the same shape."""
    dtype: str = "float32"
    """Dtype of parameters and inputs, where the experiment names none."""
    losses: frozenset[str] = frozenset()
    """The metrics of which less is better."""
    compares_rows: bool = False
    """Whether the loss compares the rows of a site with each other, so that a batch must have all of them."""
    notes: tuple[str, ...] = ()
    """Notes for readers of the figures about the rows, one sentence each."""

    def __post_init__(self) -> None:
        # the types first: what follows relies on them
        findings = _faults_of_fields(self)
        if findings:
            raise DataError(findings, place=f"task {self.name!r}")
        if not (self.sites.names if isinstance(self.sites, SiteTable) else self.sites) and self.read is None:
            findings.append("sites is empty: expected at least one")
        if isinstance(self.sites, list | tuple):  # a table of sites has looked at itself
            findings += _faults_of_sites(self.sites, needs_rows=self.loss is not None)
        findings += [
            f"losses names {name!r}: expected one of {', '.join(self.metrics)}" for name in sorted(self.losses - set(self.metrics))
        ]
        if self.dtype not in DTYPES:
            findings.append(f"dtype = {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if findings:
            raise DataError(findings, place=f"task {self.name!r}")

    @property
    def lower_is_better(self) -> frozenset[str]:
        """The metrics of which less is better, as `losses` or the metrics themselves say."""
        return self.losses | {name for name, metric in self.metrics.items() if getattr(metric, "less_is_better", False)}


def _faults_of_sites(sites: Sequence[Site], *, needs_rows: bool) -> list[str]:
    """Faults of sites that do not go together."""
    counts = Counter(site.name for site in sites)
    findings = [f"{count} sites are called {name!r}: expected names that differ" for name, count in sorted(counts.items()) if count > 1]
    if needs_rows:
        findings += [f"site {site.name!r} has train = None: a task with a loss needs rows to train on" for site in sites if not site.train]
    for part in ("train", "test"):
        findings += _faults_between_sites(part, sites)
    return findings


def _faults_of_fields(task: Task) -> list[str]:
    """Fields of a task that are not of their type."""
    function = "expected a function"
    expected: list[tuple[str, object, bool, str]] = [
        ("name", task.name, isinstance(task.name, str), "expected a text"),
        ("model", task.model, callable(task.model) and not isinstance(task.model, nn.Module), f"{function} that makes a torch.nn.Module"),
        ("loss", task.loss, task.loss is None or callable(task.loss), f"{function} of outputs and targets, or None"),
        ("metrics", task.metrics, isinstance(task.metrics, Mapping), "expected a mapping of names to functions"),
        ("sites", task.sites, isinstance(task.sites, SiteTable) or _is_list_of(Site, task.sites), "expected a list of p2pfl.tasks.Site"),
        ("features", task.features, task.features is None or _is_list_of(str, task.features), "expected a tuple of names, or None"),
        ("read", task.read, task.read is None or callable(task.read), f"{function} of a path, or None"),
        ("probabilities", task.probabilities, task.probabilities is None or callable(task.probabilities), f"{function}, or None"),
        ("losses", task.losses, isinstance(task.losses, AbstractSet), "expected a frozenset of metrics' names"),
        ("compares_rows", task.compares_rows, isinstance(task.compares_rows, bool), "expected True or False"),
        ("notes", task.notes, _is_list_of(str, task.notes), "expected a tuple of sentences"),
    ]
    findings = [f"{name} is {_kind(value)}: {remedy}" for name, value, is_right, remedy in expected if not is_right]
    if isinstance(task.metrics, Mapping):
        findings += [
            f"metrics[{name!r}] is {_kind(metric)}: {function} of outputs and targets"
            for name, metric in task.metrics.items()
            if not callable(metric)
        ]
        findings += [f"metrics has the key {name!r}: expected a text" for name in task.metrics if not isinstance(name, str)]
    return findings


def _is_list_of(kind: type, values: object) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(isinstance(value, kind) for value in values)


def _kind(value: object) -> str:
    """A type, and of a list also what is in it."""
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(sorted({type(item).__name__ for item in value})) or 'nothing'}"
    return "None" if value is None else type(value).__name__


def _faults_between_sites(part: str, sites: Sequence[Site]) -> list[str]:
    """Rows that do not fit together with the first site's."""
    findings: list[str] = []
    first: Site | None = None
    for site in sites:
        rows: Rows | None = getattr(site, part)
        if rows is None:
            continue
        if first is None:
            first, (first_inputs, first_targets) = site, rows
            continue
        for kind, mine, theirs in (("inputs", rows[0], first_inputs), ("targets", rows[1], first_targets)):
            if mine.shape[1:] != theirs.shape[1:] or mine.dtype != theirs.dtype:
                findings.append(f"{part} {kind} of site {site.name!r} are {describe(mine)}, of site {first.name!r} {describe(theirs)}")
    return findings
