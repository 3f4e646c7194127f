"""N nodes as one tensor: their training, what they send and take in, their evaluation. The daemon's population has one row.

Shapes: N rows, B examples in a batch, K local steps, P parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from p2pfl.algorithms import Algorithm, Context, Inbox, State
from p2pfl.draws import Purpose, batch_positions, torch_seed
from p2pfl.errors import TaskError
from p2pfl.params import Layout, parameters_of
from p2pfl.tasks import Site, Task
from p2pfl.tasks.calling import described, figure, users_code
from p2pfl.training.gradients import Gradients, outputs_of
from p2pfl.training.optimizers import OptimizerSpec, OptimizerState, StackedOptimizer, clipped


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a population learns: what the experiment says, without when it ends."""

    algorithm: Algorithm
    optimizer: OptimizerSpec
    batch_size: int
    rounds: int
    """Training rounds, for the learning rate's schedule."""
    local_steps: int
    seed: int


def build_model(task: Task, dtype: torch.dtype, seed: int) -> nn.Module:
    """The task's model with the start that every node shares: made under the experiment's seed.

    Raises:
        TaskError: it cannot be made, or its parameters are none that can be exchanged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, Purpose.START))
        with users_code(task.name, "model"):
            model: object = task.model()
    fault = None
    if not isinstance(model, nn.Module):
        fault = f"it returned {described(model)}: expected a torch.nn.Module"
    elif any(is_lazy(parameter) for parameter in (*model.parameters(), *model.buffers())):
        fault = "it has lazy layers: expected layers that are told their input's size"
    elif complex_ones := [name for name, parameter in model.named_parameters() if parameter.is_complex()]:
        fault = f"parameter {complex_ones[0]} is complex: expected a floating dtype"
    else:
        model = model.to(dtype)
        try:
            Layout.of(model)
        except ValueError as error:
            fault = str(error)
        else:
            return model
    raise TaskError(fault, task=task.name, function="model")


class Population:
    """The rows that live in this process.

    Args:
        task: model, loss and metrics.
        sites: one for each row.
        nodes: each row's number in the roster.
        model: architecture and common start, of the population's dtype.
        recipe: how they learn.
        loss_scale: factor on each row's loss, for `weighting: samples`.
        device: where everything is computed.
        slots_NK: each row's neighbours, for algorithms that require fixed slots; see Context.
    """

    def __init__(
        self,
        task: Task,
        sites: Sequence[Site],
        nodes: Sequence[int],
        model: nn.Module,
        recipe: Recipe,
        *,
        loss_scale: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        slots_NK: Tensor | None = None,
    ) -> None:
        self.task, self.sites, self.recipe = task, tuple(sites), recipe
        self.layout = Layout.of(model)
        self.device = torch.device(device)
        self._slots_NK = slots_NK.to(self.device) if slots_NK is not None else None
        self._model = copy.deepcopy(model).to(self.device)  # functional_call borrows the module: two threads must not share one
        self._nodes_N = torch.tensor(list(nodes), dtype=torch.int64, device=self.device)
        start_P = parameters_of(self._model)
        starts = [start_P if site.start is None else site.start.to(start_P) for site in sites]
        for site, start in zip(sites, starts, strict=True):
            if start.shape != start_P.shape:
                raise ValueError(f"site {site.name}: start has shape {tuple(start.shape)}, the model has {self.layout.size} parameters")
        self._scale_N = torch.tensor(list(loss_scale or [1.0] * len(sites)), dtype=start_P.dtype, device=self.device)
        self._load_data()
        self._round: int | None = None
        self.diverged: tuple[str, ...] = ()
        """Sites whose last training left the finite numbers; they have kept what they had before it."""
        x_NP = torch.stack(starts)
        self.state: State = recipe.algorithm.init(x_NP, self.context(0, local_steps=recipe.local_steps))
        self.optimizer_state: OptimizerState = recipe.optimizer.init(x_NP)

    @property
    def row_by_row(self) -> str | None:
        """Why rows are computed one by one; None where they go together."""
        return self._gradients.row_by_row if self._gradients else None

    @property
    def all_diverged(self) -> bool:
        """Whether no row that has data learnt anything in its last training."""
        with_data = {site.name for site in self.sites if site.train is not None}
        return self.trains and with_data <= set(self.diverged)

    @property
    def trains(self) -> bool:
        """Whether any row has something to train on."""
        return self._gradients is not None

    def context(self, round: int, *, local_steps: int) -> Context:
        """What the algorithm may know in this round."""
        return Context(
            round=round,
            local_steps=local_steps,
            lr=self.recipe.optimizer.lr_at(round, self.recipe.rounds),
            seed=self.recipe.seed,
            nodes_N=self._nodes_N,
            layout=self.layout,
            slots_NK=self._slots_NK,
        )

    def train(self, round: int, active_N: Tensor | None = None) -> Tensor:
        """K local steps of every row that has data and is active; the others are not touched.

        Args:
            round: of training.
            active_N: bool, which rows take part; None: all.

        Returns:
            (N,) mean loss over the steps, NaN for rows that did not train.
        """
        self._round = round
        recipe, num_rows = self.recipe, len(self.sites)
        self.diverged = ()
        nan_N = torch.full((num_rows,), torch.nan, dtype=self.layout.dtype)
        rows = self._training_rows if active_N is None else self._training_rows[active_N.to(self.device)[self._training_rows]]
        if self._gradients is None or recipe.local_steps == 0 or len(rows) == 0:
            return nan_N
        everybody = len(rows) == num_rows
        ctx = self.context(round, local_steps=recipe.local_steps)
        first_step = round * recipe.local_steps
        positions_NKB = batch_positions(
            recipe.seed, self._nodes_N[rows], self._sizes_N[rows], first_step, recipe.local_steps, recipe.batch_size
        )
        positions_NKB += self._offsets_N[rows, None, None]
        state = self.state if everybody else {name: tensor[rows] for name, tensor in self.state.items()}
        momenta = self.optimizer_state if everybody else {name: tensor[rows] for name, tensor in self.optimizer_state.items()}
        if getattr(recipe.algorithm, "resets_optimizer", False):
            momenta = recipe.optimizer.init(state["x"])
        kept = {name: buffer[rows] for name, buffer in self.buffers.items()}
        optimizer = StackedOptimizer(recipe.optimizer, state["x"], momenta, lr=ctx.lr, first_step=first_step)
        total_N = torch.zeros(len(rows), dtype=self.layout.dtype, device=self.device)
        for k in range(recipe.local_steps):
            moving = {**state, "x": optimizer.x}
            gradient_NP, loss_N = self._gradients(
                recipe.algorithm.estimate(moving),
                self._inputs[positions_NKB[:, k]],
                self._targets[positions_NKB[:, k]],
                seed=recipe.seed,
                nodes_N=self._nodes_N[rows],
                rows_N=rows,
                round=round,
                step=k,
            )
            gradient_NP = gradient_NP * self._scale_N[rows, None]
            if recipe.optimizer.clip_norm is not None:
                gradient_NP = clipped(gradient_NP, recipe.optimizer.clip_norm)
            optimizer.step(recipe.algorithm.correct(moving, gradient_NP, ctx))
            total_N += loss_N
        adapted = recipe.algorithm.adapt(state, optimizer.x, ctx)
        moved = optimizer.state
        # also the optimiser's own: Adam with an infinite second moment would stand still for ever
        finite_N = torch.stack([tensor.isfinite().all(dim=-1) for tensor in (optimizer.x, *moved.values())]).all(dim=0)
        if not finite_N.all():  # a row that has left the numbers stays where it was: what it would send is poison to all others
            adapted = {name: torch.where(_column(finite_N, new), new, state[name]) for name, new in adapted.items()}
            moved = {name: torch.where(_column(finite_N, new), new, momenta[name]) for name, new in moved.items()}
            for name, buffer in self.buffers.items():
                buffer[rows[~finite_N]] = kept[name][~finite_N]
        self.state = adapted if everybody else _put_rows(self.state, rows, adapted)
        self.optimizer_state = moved if everybody else _put_rows(self.optimizer_state, rows, moved)
        self.diverged = tuple(self.sites[row].name for row in rows[~finite_N].tolist())
        nan_N[rows.cpu()] = (total_N / recipe.local_steps).cpu()
        return nan_N

    def outgoing(self, round: int, phase: int, *, local_steps: int) -> dict[str, Tensor]:
        """What each row sends in an exchange, by channel, (N, ...)."""
        return self.recipe.algorithm.outgoing(self.state, phase, self.context(round, local_steps=local_steps))

    def merge(self, round: int, phase: int, inbox: Inbox, *, local_steps: int, active_N: Tensor | None = None) -> None:
        """Take in what came; rows that are not active stay as they are."""
        self._round = round
        merged = self.recipe.algorithm.merge(self.state, phase, inbox, self.context(round, local_steps=local_steps))
        if active_N is not None:
            merged = {name: torch.where(_column(active_N.to(self.device), new), new, self.state[name]) for name, new in merged.items()}
        self.state = merged

    def estimate(self) -> Tensor:
        """The parameters to evaluate, (N, P)."""
        return self.recipe.algorithm.estimate(self.state)

    def evaluate(self) -> list[dict[str, float]]:
        """Each row's model on its own site's test rows, by metric; empty for a site without."""
        return [self.metrics(x_P, site, row) for row, (x_P, site) in enumerate(zip(self.estimate(), self.sites, strict=True))]

    def metrics(self, x_P: Tensor, site: Site, row: int = 0) -> dict[str, float]:
        """One parameter vector, with one row's buffers, on one site's test rows."""
        if site.test is None:
            return {}
        outputs, targets = self.outputs(x_P, site.test[0], row, site=site.name), site.test[1]
        return {name: figure(self.task, name, outputs, targets, site=site.name, round=self._round) for name in self.task.metrics}

    def outputs(self, x_P: Tensor, inputs: Tensor, row: int = 0, *, site: str | None = None) -> Tensor:
        """What a model says in evaluation mode, on the CPU."""
        buffers = {name: stacked[row] for name, stacked in self.buffers.items()}
        inputs = of_dtype(inputs, self.layout.dtype).to(self.device)
        with users_code(self.task.name, "model", inputs, site=site, round=self._round):
            return outputs_of(self._model, x_P, buffers, inputs)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Each row's buffers, (N, ...); they never travel."""
        return self._gradients.buffers if self._gradients else {}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, by name."""
        groups = {"state": self.state, "optimizer": self.optimizer_state, "buffers": self.buffers}
        return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        group = {
            prefix: {n.removeprefix(prefix): t.to(self.device) for n, t in tensors.items() if n.startswith(prefix)} for prefix in _GROUPS
        }
        self.state, self.optimizer_state = group["state/"], group["optimizer/"]
        for name, buffer in group["buffers/"].items():
            self.buffers[name].copy_(buffer)

    def _load_data(self) -> None:
        """All rows' data once, one after the other; batches are drawn by index."""
        with_data = [(row, site.train) for row, site in enumerate(self.sites) if site.train is not None and self.task.loss is not None]
        self._training_rows = torch.tensor([row for row, _ in with_data], dtype=torch.int64, device=self.device)
        self._sizes_N = torch.zeros(len(self.sites), dtype=torch.int64, device=self.device)
        self._offsets_N = torch.zeros(len(self.sites), dtype=torch.int64, device=self.device)
        self._gradients: Gradients | None = None
        if not with_data or self.task.loss is None:
            return
        sizes = torch.tensor([len(train[0]) for _, train in with_data], device=self.device)
        self._sizes_N[self._training_rows] = sizes
        self._offsets_N[self._training_rows] = sizes.cumsum(0) - sizes
        self._inputs = torch.cat([of_dtype(train[0], self.layout.dtype) for _, train in with_data]).to(self.device)
        self._targets = torch.cat([of_dtype(train[1], self.layout.dtype) for _, train in with_data]).to(self.device)
        names = [site.name for site in self.sites]
        sample_B = torch.arange(self.recipe.batch_size, device=self.device) % len(self._inputs)
        sample = self._inputs[sample_B], self._targets[sample_B]
        self._gradients = Gradients(self._model, self.task.loss, sample, len(names), task=self.task.name, sites=names)


_GROUPS = ("state/", "optimizer/", "buffers/")


def of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Real numbers in the population's dtype; class numbers as they are."""
    return tensor.to(dtype) if tensor.dtype.is_floating_point else tensor


def _put_rows(whole: Mapping[str, Tensor], rows: Tensor, part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.index_copy(0, rows, part[name]) for name, tensor in whole.items()}


def _column(values_N: Tensor, like: Tensor) -> Tensor:
    return values_N.reshape(-1, *[1] * (like.dim() - 1))
