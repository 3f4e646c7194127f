"""Sharing the rows of a task out among nodes, and a site's own rows between training and choices.

Every draw is a function of the seed (and of the node's number or the site's name): the same call gives the same rows.

Shapes: M rows, N nodes.
"""

from __future__ import annotations

import inspect
import logging
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2pfl.errors import ConfigError, ValidationRowsError
from p2pfl.tasks.base import Task
from p2pfl.tasks.sites import Site, SiteTable, Split
from p2pfl.tasks.streams import generator_of, generators_of

log = logging.getLogger(__name__)

MIN_ROWS = 10
"""Rows that a rule leaves to every node at least, where there are as many; otherwise an equal part."""

MIN_OF_CLASS = 5
DRAWS = 100

_OWNERS, _SPLIT, _HOLD_OUT, _DRAWN, _DEALT = 1, 2, 3, 4, 5
_MAX_CLASSES = 100
_AT_ONCE = 2**20  # rows


def iid(classes_M: np.ndarray, num_nodes: int, rng: np.random.Generator) -> np.ndarray:
    """Rows shuffled and dealt out; sizes differ by one at most."""
    return rng.permutation(np.arange(len(classes_M)) % num_nodes)


def dirichlet(classes_M: np.ndarray, num_nodes: int, rng: np.random.Generator, *, alpha: float = 0.5) -> np.ndarray:
    """Each class shared out in proportions drawn from a symmetric Dirichlet distribution: the smaller alpha, the less alike the nodes.

    Drawn again until every node has MIN_ROWS rows and MIN_OF_CLASS of each class, so that its test rows can show every class. Where none of
    DRAWS does, as with many classes or a very small alpha, it is the first one, and nodes below MIN_ROWS get rows from the largest.

    Source: Hsu, Qi & Brown 2019 (arXiv:1909.06335); by class as in Yurochkin et al. 2019.
    """
    _above_zero("alpha", alpha)
    floor = _floor(classes_M, num_nodes)
    first_M: np.ndarray | None = None
    for _ in range(DRAWS):
        owners_M = np.empty(len(classes_M), dtype=np.int64)
        enough = True
        for label in np.unique(classes_M):
            rows = rng.permutation(np.flatnonzero(classes_M == label))
            cuts = np.round(rng.dirichlet(np.full(num_nodes, alpha)).cumsum() * len(rows)).astype(np.int64)
            owners_M[rows] = np.searchsorted(cuts[:-1], np.arange(len(rows)), side="right")
            enough = enough and np.diff(cuts, prepend=0).min() >= MIN_OF_CLASS
        if enough and np.bincount(owners_M, minlength=num_nodes).min() >= floor:
            return owners_M
        if first_M is None:
            first_M = owners_M
    assert first_M is not None
    sizes_N = np.bincount(first_M, minlength=num_nodes)
    while sizes_N.min() < floor:
        giver, taker = sizes_N.argmax(), sizes_N.argmin()
        first_M[rng.choice(np.flatnonzero(first_M == giver))] = taker
        sizes_N[giver] -= 1
        sizes_N[taker] += 1
    return first_M


def unequal(
    classes_M: np.ndarray, num_nodes: int, rng: np.random.Generator, *, sizes: str | Sequence[float] = "geometric", ratio: float = 0.5
) -> np.ndarray:
    """Rows shuffled and dealt out in unequal numbers, the first node the largest.

    Every node gets MIN_ROWS first; `sizes` is followed in what is left: "geometric" (node i as ratio**i), "linear" (as N - i), or a list of
    N numbers.
    """
    _above_zero("ratio", ratio)
    if ratio > 1:
        raise ConfigError(f"partition.ratio = {ratio!r}: expected a number above 0, at most 1")
    numbers = np.arange(num_nodes)
    if isinstance(sizes, str):
        shapes = {"geometric": ratio**numbers, "linear": num_nodes - numbers}
        if sizes not in shapes:
            raise ConfigError(f"partition.sizes = {sizes!r}: one of {', '.join(shapes)}, or a list of {num_nodes} numbers")
        share_N = np.asarray(shapes[sizes], dtype=np.float64)
    else:
        try:
            share_N = np.asarray(sizes, dtype=np.float64)
        except (TypeError, ValueError):
            share_N = np.empty(0)
        if share_N.shape != (num_nodes,) or not (share_N > 0).all() or not np.isfinite(share_N.sum()):
            raise ConfigError(f"partition.sizes = {sizes!r}: expected {num_nodes} numbers above 0, geometric or linear")
    floor = _floor(classes_M, num_nodes)
    cuts_N = np.round(share_N.cumsum() / share_N.sum() * (len(classes_M) - floor * num_nodes)).astype(np.int64)
    sizes_N = floor + np.diff(cuts_N, prepend=0)
    return rng.permutation(np.repeat(numbers, sizes_N))


PARTITIONS: dict[str, Callable[..., np.ndarray]] = {"iid": iid, "dirichlet": dirichlet, "unequal": unequal}
"""Each takes (classes_M, num_nodes, rng, **options) and returns the owner of every row, (M,) in range(num_nodes)."""


def split_rows(
    classes_M: np.ndarray, num_nodes: int, rule: Mapping[str, Any], seed: int, *, test_share: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each node's (training rows, test rows) as sorted row numbers; every row is used once.

    "dirichlet" looks at the classes (M,) int64, and each node's test rows are stratified by them: a class of which a node has two rows or
    more is in both its parts. The rule is {"name": one of PARTITIONS, and its options}; a *test_share* of 0 takes no test rows.

    Raises:
        ConfigError: an unknown rule or option, or fewer than two rows a node.
    """
    options = dict(rule)
    name = options.pop("name", None)
    if name not in PARTITIONS:
        raise ConfigError(f"partition.name = {name!r}: one of {', '.join(PARTITIONS)}")
    allowed = [key for key, p in inspect.signature(PARTITIONS[name]).parameters.items() if p.kind is p.KEYWORD_ONLY]
    unknown = [
        f"partition.{key} = {options[key]!r}: {name} takes {', '.join(allowed) or 'no options'}" for key in options if key not in allowed
    ]
    if unknown:
        raise ConfigError(unknown)
    if not 1 <= num_nodes <= len(classes_M) // 2:
        raise ConfigError(f"nodes = {num_nodes}: expected 1 to {len(classes_M) // 2}, two of the {len(classes_M)} rows for each")
    owners_M = PARTITIONS[name](classes_M, num_nodes, generator_of(seed, _OWNERS), **options)
    by_node = np.split(np.argsort(owners_M, kind="stable"), np.cumsum(np.bincount(owners_M, minlength=num_nodes))[:-1])
    parts = []
    for node, rows in enumerate(by_node):
        is_test = stratified(classes_M[rows], test_share, generator_of(seed, _SPLIT, node))
        parts.append((rows[~is_test], rows[is_test]))
    return parts


def drawn(num_rows: int, num_drawn: int, seed: int) -> np.ndarray:
    """Some of the rows, without repetition: sorted row numbers, (num_drawn,)."""
    return np.sort(generator_of(seed, _DRAWN).permutation(num_rows)[:num_drawn])


def dealt(classes_M: np.ndarray, num_nodes: int, seed: int) -> list[np.ndarray]:
    """Rows that nodes shall be measured on alike: each node's, as sorted row numbers; every row is used once.

    Sizes differ by one at most, and so do the numbers of rows of each class.
    """
    shuffled = generator_of(seed, _DEALT).permutation(len(classes_M))
    by_class = shuffled[np.argsort(classes_M[shuffled], kind="stable")]
    return [np.sort(by_class[node::num_nodes]) for node in range(num_nodes)]


def node_names(prefix: str, num_nodes: int) -> list[str]:
    """prefix-0, prefix-1, … padded with zeros, so that sorting keeps the order."""
    width = len(str(num_nodes - 1))
    return [f"{prefix}-{node:0{width}}" for node in range(num_nodes)]


def partition(task: Task, num_nodes: int, rule: Mapping[str, Any], seed: int) -> Task:
    """The task with all its rows, training and test, pooled and shared out afresh.

    Each node's test rows are as large a share as they are of the whole task. Where every site's `prepare` is the same object it is kept;
    `groups` belong to the old test rows and go.

    Raises:
        ConfigError: the task has no rows to share out, too few, or no classes where the rule needs them.
    """
    trains, tests = ([rows for site in task.sites if (rows := getattr(site, part)) is not None] for part in ("train", "test"))
    if not trains or any(site.start is not None for site in task.sites):
        raise ConfigError(
            f"nodes = {num_nodes}: task {task.name!r} has no rows that could be shared out; set the number in the task itself"
        )
    if any(len(set(ids)) < len(ids) for site in task.sites for ids in (site.train_patients, site.test_patients) if ids is not None):
        raise ConfigError(f"nodes = {num_nodes}: patients of task {task.name!r} have several rows, which would part; leave nodes out")
    inputs_M, targets_M = (torch.cat([rows[axis] for rows in [*trains, *tests]]) for axis in (0, 1))
    classes_M = classes_of(targets_M)
    if classes_M is None:
        if rule.get("name") == "dirichlet":
            raise ConfigError(f"partition.name = 'dirichlet': the targets of task {task.name!r} are not classes; one of iid, unequal")
        classes_M = np.zeros(len(targets_M), dtype=np.int64)
    test_share = sum(len(rows[0]) for rows in tests) / len(targets_M)
    prepare = task.sites[0].prepare
    sites = [
        Site(
            name=name,
            train=(inputs_M[train], targets_M[train]),
            test=(inputs_M[test], targets_M[test]) if len(test) else None,
            prepare=prepare if all(site.prepare is prepare for site in task.sites) else None,
        )
        for name, (train, test) in zip(
            node_names("hospital", num_nodes), split_rows(classes_M, num_nodes, rule, seed, test_share=test_share), strict=True
        )
    ]
    return replace(task, sites=sites, notes=missing_classes(sites))


def missing_classes(sites: Sequence[Site]) -> tuple[str, ...]:
    """One sentence for each site whose test rows lack a class that the task has; they are logged as a warning, too."""
    if isinstance(sites, SiteTable) and (known := _codes_of(sites)) is not None:
        return _noted(_missing_in(sites, *known))
    classes = {site.name: found for site in sites if site.test and (found := classes_of(site.test[1])) is not None}
    trained = [found for site in sites if site.train and (found := classes_of(site.train[1])) is not None]
    if not classes:
        return ()
    everywhere = np.unique(np.concatenate([*classes.values(), *trained]))
    absent = ((name, np.setdiff1d(everywhere, found).tolist(), len(np.unique(found))) for name, found in classes.items())
    return _noted((name, missing, number) for name, missing, number in absent if missing)


def _noted(absent: Iterable[tuple[str, list[int], int]]) -> tuple[str, ...]:
    """Sentences, and a warning, on sites by name: the classes that their test rows lack, and how many they have."""
    notes = tuple(
        f"site {name!r} has no test row of class {', '.join(map(str, missing))}: AUROC and balanced accuracy there "
        + ("are undefined" if number == 1 else "are means over the other classes")
        for name, missing, number in absent
    )
    if notes:
        shown = 5
        more = f" (and {len(notes) - shown} more sites)" if len(notes) > shown else ""
        log.warning("%s%s", "; ".join(notes[:shown]), more)
    return notes


def _codes_of(table: SiteTable) -> tuple[int, np.ndarray] | None:
    """The least class, and how far each row's class is above it, (M,) uint8; None where each site's own rows have to be looked at."""
    targets = table.targets.reshape(-1)
    if not len(targets) or targets.numel() != len(table.targets):
        return None
    least, most = targets.min().item(), targets.max().item()
    if not (math.isfinite(least) and math.isfinite(most) and most - least < _MAX_CLASSES):
        return None
    codes_M = np.empty(len(targets), dtype=np.uint8)
    for first in range(0, len(targets), _AT_ONCE):
        part = targets[first : first + _AT_ONCE]
        if not bool((part == part.round()).all()):
            return None
        codes_M[first : first + _AT_ONCE] = (part - least).numpy()
    return int(least), codes_M


def _at(codes_M: np.ndarray, split: Split) -> np.ndarray:
    """Codes at a split's places, one site after the other."""
    places = slice(int(split.starts[0]), int(split.starts[-1]))
    return codes_M[places] if split.rows is None else codes_M[split.rows[places].numpy()]


def _missing_in(table: SiteTable, least: int, codes_M: np.ndarray) -> Iterator[tuple[str, list[int], int]]:
    """Sites whose test rows lack a class of the task: name, classes, and how many they have. Shapes: S sites with test rows, C classes."""
    if table.test is None:
        return
    sizes = table.test.starts.diff().numpy()
    there_S = np.flatnonzero(sizes)
    codes_R, trained_R = _at(codes_M, table.test), _at(codes_M, table.train)
    num_codes = int(max(codes_R.max(initial=0), trained_R.max(initial=0))) + 1
    present_SC = np.zeros((len(there_S), num_codes), dtype=np.bool_)
    present_SC[np.repeat(np.arange(len(there_S)), sizes[there_S]), codes_R] = True
    trained_C = np.array([bool((trained_R == code).any()) for code in range(num_codes)])
    everywhere_C = np.logical_or(present_SC.any(axis=0), trained_C)
    for place in np.flatnonzero((present_SC != everywhere_C).any(axis=1)).tolist():
        missing = np.flatnonzero(everywhere_C & ~present_SC[place]) + least
        yield table.names[there_S[place]], missing.tolist(), int(present_SC[place].sum())


def hold_out(site: Site, fraction: float, seed: int) -> Site:
    """Take validation rows out of a site's training rows and put them in the place of its test rows, which are set aside.

    For choices such as hyper-parameters, which must never see the test rows. They are a fraction of the training rows, stratified by class,
    and follow from the seed and the site's name alone. A site without training rows has no validation rows. Inputs stay as they were
    prepared, with the statistics of all the site's training rows.

    Raises:
        ConfigError: the fraction is not between 0 and 1.
        ValidationRowsError: the site has one training row only.
    """
    _check_fraction(fraction)
    if site.train is None:
        return site if site.test is None else replace(site, test=None, set_aside=site.test, groups={}, test_patients=None)
    inputs, targets = site.train
    rng = generator_of(seed, _HOLD_OUT, zlib.crc32(site.name.encode()))
    held_out = _held_out(site.name, targets, classes_of(targets), fraction, rng, site.train_patients)
    chosen = torch.from_numpy(held_out)
    validation = inputs[chosen], targets[chosen]
    patients = _patients_apart(site, held_out)
    return replace(site, train=(inputs[~chosen], targets[~chosen]), test=validation, set_aside=site.test, groups={}, **patients)


def hold_out_everywhere(sites: Sequence[Site], fraction: float, seed: int) -> Sequence[Site]:
    """`hold_out` at every site; of a table of sites without making them one by one."""
    _check_fraction(fraction)
    if not isinstance(sites, SiteTable):
        return [hold_out(site, fraction, seed) for site in sites]
    known, split = _codes_of(sites), sites.train
    first = int(split.starts[0])
    codes_R = _at(known[1], split) if known is not None else None
    rows_R = np.arange(first, int(split.starts[-1])) if split.rows is None else split.rows[first : int(split.starts[-1])].numpy()
    rows_R = rows_R.astype(np.int32 if len(sites.targets) <= np.iinfo(np.int32).max else np.int64)
    chosen_R = np.zeros(len(rows_R), dtype=np.bool_)
    numbers = [zlib.crc32(name.encode()) for name in sites.names]
    ends = pairwise((split.starts - first).tolist())
    for name, (start, stop), rng in zip(sites.names, ends, generators_of(seed, _HOLD_OUT, numbers=numbers), strict=True):
        targets = sites.targets[torch.from_numpy(rows_R[start:stop]).long()] if codes_R is None else sites.targets[: stop - start]
        classes_M = codes_R[start:stop] if codes_R is not None else classes_of(targets)
        chosen_R[start:stop] = _held_out(name, targets, classes_M, fraction, rng)
    return sites.with_validation(*(_kept(split.starts - first, rows_R, kept_R) for kept_R in (~chosen_R, chosen_R)))


def _kept(starts: Tensor, rows_R: np.ndarray, kept_R: np.ndarray) -> Split:
    """Some of the rows at each place, sites in between as they were."""
    counts_R = np.concatenate([[0], np.cumsum(kept_R)])
    return Split(starts=torch.from_numpy(counts_R)[starts], rows=torch.from_numpy(rows_R[kept_R]))


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ConfigError(f"validation = {fraction}: expected a number above 0 and below 1")


def _held_out(
    name: str,
    targets: Tensor,
    classes_M: np.ndarray | None,
    fraction: float,
    rng: np.random.Generator,
    patients_M: Sequence[str] | None = None,
) -> np.ndarray:
    """Which of a site's training rows are held out, (M,) bool; where patients are known, all rows of each or none."""
    if len(targets) < 2:  # noqa: PLR2004
        raise ValidationRowsError(f"one training row: validation = {fraction} needs at least two", place=f"site {name!r}")
    classes_M = np.zeros(len(targets)) if classes_M is None else classes_M
    if patients_M is None:
        return stratified(classes_M, fraction, rng)
    if len(set(patients_M)) < 2:  # noqa: PLR2004
        raise ValidationRowsError(f"one training patient: validation = {fraction} needs at least two", place=f"site {name!r}")
    return chosen_patients(patients_M, classes_M, fraction, rng)


def _patients_apart(site: Site, held_out_M: np.ndarray) -> dict[str, Any]:
    """Patients of the rows that are still trained on, and of those that are held out."""
    if site.train_patients is None:
        return {"test_patients": None}
    patients = np.asarray(site.train_patients, dtype=str)
    return {"train_patients": tuple(patients[~held_out_M].tolist()), "test_patients": tuple(patients[held_out_M].tolist())}


def chosen_patients(patients_M: Sequence[str] | np.ndarray, classes_M: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Choose the rows of a fraction of the patients, (M,) bool; stratified by each patient's largest class, in the order of their ids."""
    ids, number_M = np.unique(np.asarray(patients_M, dtype=str), return_inverse=True)
    number_M = number_M.reshape(-1)
    largest = np.full(len(ids), -np.inf)
    np.maximum.at(largest, number_M, classes_M)
    if len(ids) < 2:  # noqa: PLR2004  # one patient cannot be on both sides
        return np.zeros(len(number_M), dtype=bool)
    chosen: np.ndarray = stratified(largest, fraction, rng)[number_M]
    return chosen


def classes_of(targets: Tensor) -> np.ndarray | None:
    """Targets as classes (M,) int64; None where they are not: several columns, values between the integers, or very many different ones."""
    if targets.numel() != len(targets):
        return None
    values = targets.reshape(-1)
    if not bool((values == values.round()).all()) or len(np.unique(values.numpy())) > _MAX_CLASSES:
        return None
    return np.asarray(values.long().numpy())


def stratified(classes_M: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Which rows are chosen, (M,) bool: of each class the rounded fraction, of a class with two rows or more at least one and never all."""
    chosen_M = np.zeros(len(classes_M), dtype=bool)
    if fraction == 0:
        return chosen_M
    for label in np.unique(classes_M):
        rows = rng.permutation(np.flatnonzero(classes_M == label))
        if len(rows) > 1:
            chosen_M[rows[: min(max(round(fraction * len(rows)), 1), len(rows) - 1)]] = True
    if not chosen_M.any():
        chosen_M[rng.integers(len(classes_M))] = True
    return chosen_M


def _floor(classes_M: np.ndarray, num_nodes: int) -> int:
    return min(MIN_ROWS, len(classes_M) // num_nodes)


def _above_zero(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"partition.{key} = {value!r}: expected a number above 0")
