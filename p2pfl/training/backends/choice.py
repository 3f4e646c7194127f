"""The choice of a backend: how gradients and local steps of a population's rows are computed is decided here and nowhere else.

Shapes: N rows, C of them, K local steps, B examples in a batch, P parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from p2pfl.errors import ConfigError
from p2pfl.params import Layout, parameters_of, sharing_parameters
from p2pfl.tasks import Task
from p2pfl.tasks.calling import users_code
from p2pfl.training.backends.batched import Batched, Loss
from p2pfl.training.backends.compiled import Compiled
from p2pfl.training.backends.examples import GradientCall, example_gradients
from p2pfl.training.backends.gradients import RETURN_AT_ONCE_BYTES, ModelGradients, returns_parts
from p2pfl.training.recipe import Recipe
from p2pfl.training.training_data import Rows, TrainingData

_GROUPED = 32
CACHE_BYTES = 4 * 1024**2
"""Numbers that a core reads again and again."""

PlainSteps = Callable[[Tensor, Tensor, float, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""Takes K steps of plain SGD in place, without a gradient in between; a row that becomes non-finite keeps what it had.

Takes rows (C, P), which are changed, each step's examples (C, K, B), the learning rate, a factor on each row's gradient (None: 1), and a
tensor that is equal to the rows and not changed (None: there is none). Returns the mean loss over the steps (C,), and whether each row has
stayed finite (C,)."""


class Gradients:
    """Gradients of one model's loss for N parameter vectors, each on its own batch.

    Written out where the model's layers are known, else in one vectorised call where the model allows it. A model that draws random numbers
    (dropout), changes its buffers (BatchNorm) or cannot be vectorised goes row by row, each row under its own key and with its own buffers.

    Args:
        model: the architecture; its own parameters are not used and not changed.
        loss: (outputs, targets) -> mean over the batch.
        sample: inputs and targets of one small batch, to try the model on.
        num_rows: N.
        task: name under which a fault in model or loss is reported.
        sites: names of the rows, likewise.

    Raises:
        TaskError: the model or the loss fails on the sample.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        sample: tuple[Tensor, Tensor],
        num_rows: int,
        *,
        task: str = "",
        sites: Sequence[str] | None = None,
    ) -> None:
        self.by_torch = ModelGradients(model.train(), loss, num_rows, task, sites)
        self.buffers = self.by_torch.buffers
        self.batched: Batched | None = None
        """Written-out gradients of a model whose layers are known."""
        self._never_used_P: Tensor | None = None
        self.sample_size = len(sample[0])
        site = sites[0] if sites and len(sites) == 1 else None
        self.row_by_row: str | None = self._why_row_by_row(sample, num_rows, site)
        """Why the model cannot be vectorised over rows; None where it can."""

    def of_rows(self, model: nn.Module, sites: Sequence[str]) -> Gradients:
        """Take the choice over, without trying it again, for other rows with a module as this one and buffers of their own."""
        found = copy.copy(self)
        before = self.by_torch
        found.by_torch = ModelGradients(model.train(), before.loss, len(sites), before.task, sites, before.layout)
        found.buffers = found.by_torch.buffers
        return found

    def __call__(
        self, x_NP: Tensor, inputs_NB: Tensor, targets_NB: Tensor, *, seed: int, nodes_N: Tensor, rows_N: Tensor, round: int, step: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients (N, P) and losses (N,) of each row on its own batch, and where there is no gradient.

        The last is bool (N, P), where torch's own gradient is None and an optimiser changes nothing; None: there is one everywhere. Rows
        have the buffers of `rows_N` in the population; seed, round, step and `nodes_N` in the roster are the key of what the model draws.

        Raises:
            TaskError: the model or the loss fails at a row; of several, the first.
        """
        reason = self.row_by_row
        if reason is None:
            try:
                together = self.batched.gradients if self.batched is not None else self.by_torch.vectorised
                gradient_NP, loss_N = together(x_NP, inputs_NB, targets_NB)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # row by row finds whose fault it is; if nobody's, the vectorising's
                reason = _why(error)
            else:
                never_P = self._never_used_P
                unused_NP = None if never_P is None else never_P & (gradient_NP == 0)
                return gradient_NP.detach(), loss_N.detach(), unused_NP
        found = self.by_torch.one_by_one(x_NP, inputs_NB, targets_NB, seed=seed, nodes_N=nodes_N, rows_N=rows_N, round=round, step=step)
        self.row_by_row = reason
        return found

    def _why_row_by_row(self, sample: tuple[Tensor, Tensor], num_rows: int, site: str | None) -> str | None:
        """Try the backends on a sample, the fastest first."""
        by_torch, (inputs_B, targets_B) = self.by_torch, sample
        model = by_torch.model
        trial = sharing_parameters(model)
        before = {name: buffer.clone() for name, buffer in trial.named_buffers()}
        x_P = parameters_of(model)
        with torch.random.fork_rng(devices=[]):
            with torch.no_grad(), users_code(by_torch.task, "model", inputs_B, site=site):
                trial(inputs_B)
            copies = {name: buffer.clone() for name, buffer in before.items()}
            *expected, self._never_used_P = by_torch.alone(x_P, inputs_B, targets_B, copies, site=site)
        changed = [name for name, buffer in trial.named_buffers() if not torch.equal(before[name], buffer)]
        if changed:
            return f"the model changes its buffers while it trains ({changed[0]}); they stay at each node"
        if self._never_used_P is None:  # written-out layers know of no gradient that is none
            self.batched = Batched.of(model, by_torch.loss, sample, (expected[0], expected[1]), x_P)
        if self.batched is not None:
            return None
        del expected
        rows = min(num_rows, 2)  # a node alone needs no memory for a second one
        try:
            by_torch.vectorised(x_P.expand(rows, -1), inputs_B.expand(rows, *inputs_B.shape), targets_B.expand(rows, *targets_B.shape))
        except (Exception, SystemExit) as error:  # noqa: BLE001  # alone it went well, so the fault is the vectorising's
            return _why(error)
        return None


class Backends:
    """The backends of one population: gradients row by row, vectorised or written out, and the fast ones for plain SGD.

    Gradients that were *chosen* for the model, on the CPU and a batch as large, are taken; else they are chosen on the first rows.

    Raises:
        TaskError: the model or the loss fails on a sample.
    """

    def __init__(
        self, model: nn.Module, task: Task, names: Sequence[str], recipe: Recipe, data: TrainingData, chosen: Gradients | None = None
    ) -> None:
        assert task.loss is not None
        self._recipe, self._data, self._layout = recipe, data, Layout.of(model)
        self._is_chosen = chosen is not None and chosen.sample_size == data.sample_size and data.inputs.device.type == "cpu"
        if chosen is not None and self._is_chosen:
            self.gradients = chosen.of_rows(model, names)
        else:
            self.gradients = Gradients(model, task.loss, data.sample(), len(names), task=task.name, sites=names)
        self.step_gradients: GradientCall = self.gradients
        """Gradients of a local step, which a mechanism makes where there is one."""
        if recipe.mechanism is not None:
            if self.gradients.row_by_row is not None:
                raise ConfigError(f"privacy: needs gradients of single examples, and {self.gradients.row_by_row}; take another model")
            self.step_gradients = partial(example_gradients, self.gradients, recipe.mechanism)
        self.compiled: Compiled | None = None

    @property
    def plain_steps(self) -> PlainSteps | None:
        """Takes K steps of plain SGD; None where local steps are more than these, or the model's layers are not known."""
        decay, compiled, batched, batch = self._recipe.optimizer.weight_decay, self.compiled, self.gradients.batched, self._data.batch
        if compiled is not None:
            return lambda x_CP, positions_CKB, lr, scale_C, _: compiled.sgd_steps(x_CP, positions_CKB, lr, decay, scale_C)
        if batched is None or self.gradients.row_by_row is not None or why_not_plain_sgd(self._recipe) is not None:
            return None
        return lambda x_CP, positions_CKB, lr, *others: batched.sgd_steps(x_CP, positions_CKB, batch, lr, decay, *others)

    @property
    def vectorises(self) -> bool:
        """Whether torch vectorises the gradients, because they are not written out here."""
        return self.gradients.batched is None and self.gradients.row_by_row is None

    @property
    def borrows_model(self) -> bool:
        """Whether the model's own module computes, which two threads must not use at once."""
        return self.compiled is None and self.gradients.batched is None

    def compile(self, x_1P: Tensor) -> None:
        """Compile the steps, tried at `x_1P`; they stay as they are where that cannot be done and the recipe does not ask for it.

        Raises:
            ConfigError: the recipe asks for compiled loops, and this model, its rows or this machine cannot have them.
        """
        if self.compiled is not None:
            return
        found: Compiled | str = why_not_plain_sgd(self._recipe) or "the model's gradients cannot be written out"
        if self.plain_steps is not None:
            assert self.gradients.batched is not None
            is_tried = self._is_chosen and self._recipe.compiled  # by the plan, which chose both
            found = Compiled.of(self.gradients.batched, x_1P, self._data.inputs, self._data.targets, is_tried=is_tried)
        if isinstance(found, Compiled):
            self.compiled = found
        elif self._recipe.compiled:
            raise ConfigError(f"compiled = 'on': {found}; take off")

    def groups(self, rows: Tensor, batch_size: int, threads: int) -> list[list[Rows]]:
        """Rows that are trained together, as many as stay in the cache, in groups that compute once what they have in common.

        Slices where they lie side by side.
        """
        together, count = self._rows_together(len(rows), batch_size), len(rows)
        num_groups = threads * -(-count // (threads * _GROUPED))  # each thread gets as many
        grouped = max(together, -(-count // num_groups))
        start, stop = int(rows[0]), int(rows[-1]) + 1
        side_by_side = stop - start == count
        return [
            [
                slice(start + first, start + last) if side_by_side else rows[first:last]
                for first, last in pairwise(split_evenly(begin, min(begin + grouped, count), together))
            ]
            for begin in range(0, count, grouped)
        ]

    def _rows_together(self, num_rows: int, batch_size: int) -> int:
        if self.gradients.row_by_row is not None:
            return num_rows  # its draws are torch's own: one after the other
        batched = self.gradients.batched
        kept = batched.saved_bytes * batch_size // self._data.sample_size if batched else 2 * self._data.example_bytes * batch_size
        gradients = batch_size if self._recipe.mechanism is not None else 1
        together = max(1, min(4096, CACHE_BYTES // (gradients * self._layout.size_bytes + kept)))
        return max(together, _GROUPED) if self.compiled is not None else together

    def step_bytes(self, x_NP: Tensor, *, is_scaled: bool) -> int:
        """Bytes of gradients that one local step needs for all rows, where steps are more than plain SGD."""
        gradients = 1 if self.gradients.batched is not None else 2  # of each tensor, and side by side
        corrected = "gradient" in self._recipe.algorithm.local_changes or bool(self._recipe.optimizer.weight_decay) or is_scaled
        steps = (gradients + int(corrected)) * x_NP.nbytes
        if gradients == 2 and returns_parts(x_NP):  # noqa: PLR2004  # what has been put into the whole one is given back
            largest = max(spec.size for spec in self._layout.tensors) * x_NP.element_size()
            steps -= max(0, x_NP.nbytes - RETURN_AT_ONCE_BYTES - largest)
        return steps


def split_evenly(start: int, stop: int, most: int) -> list[int]:
    """Places where parts of at most so many begin and the last one ends, each about as large."""
    parts = max(1, -(-(stop - start) // most))
    return [start + (stop - start) * part // parts for part in range(parts + 1)]


def why_not_plain_sgd(recipe: Recipe) -> str | None:
    """The reason why a recipe's local steps are more than plain SGD on x, which alone is compiled; None where they are not."""
    spec = recipe.optimizer
    if recipe.mechanism is not None:
        return "privacy needs the gradients of single examples: only plain sgd is compiled"
    if spec.name != "sgd":
        return f"optimizer.name = {spec.name!r}: only plain sgd is compiled"
    if spec.momentum:
        return f"optimizer.momentum = {spec.momentum:g}: only plain sgd is compiled"
    if spec.clip_norm is not None:
        return f"optimizer.clip_norm = {spec.clip_norm:g}: only plain sgd is compiled"
    if recipe.algorithm.local_changes:
        return f"the local steps of {type(recipe.algorithm).__name__} are more than plain sgd, which alone is compiled"
    return None


def _why(error: BaseException) -> str:
    """Why rows cannot go together, from what vectorising them raised."""
    if isinstance(error, RuntimeError) and "random" in str(error):
        return "the model draws random numbers while it trains"
    return f"the model cannot be vectorised: {(str(error) or type(error).__name__).splitlines()[0]}"
