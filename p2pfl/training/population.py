"""A population: N nodes as one tensor, which train, exchange and are evaluated. A daemon's population has one row.

Shapes: N rows, B examples in a batch, K local steps, P parameters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from p2pfl.algorithms import Context, Inbox, Notice, State
from p2pfl.params import Layout, parameters_of, sharing_parameters
from p2pfl.tasks import Site, SiteTable, Task
from p2pfl.training.backends.compiled import one_blas_thread
from p2pfl.training.backends.gradients import Gradients
from p2pfl.training.evaluation import Evaluation
from p2pfl.training.local_steps import LocalSteps, Trained, column, replace_rows
from p2pfl.training.optimizers import OptimizerState
from p2pfl.training.recipe import Recipe
from p2pfl.training.training_data import Rows, TrainingData


class Population:
    """The rows that live in this process.

    Args:
        sites: one for each row.
        nodes: each row's number in the roster.
        model: architecture and common start, of the population's dtype.
        gradients: as they were chosen for this model; None: chosen here, where rows train.
        loss_scale: factor on each row's loss, for `weighting: samples`.
        slots_NK: each row's neighbours, for algorithms that require fixed slots; see Context.
    """

    def __init__(
        self,
        task: Task,
        sites: Sequence[Site],
        nodes: Sequence[int],
        model: nn.Module,
        recipe: Recipe,
        gradients: Gradients | None = None,
        *,
        loss_scale: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        slots_NK: Tensor | None = None,
    ) -> None:
        self.task, self.recipe = task, recipe
        self.sites = sites if isinstance(sites, SiteTable) else tuple(sites)
        self.layout = Layout.of(model)
        self.device = torch.device(device)
        self._slots_NK = slots_NK.to(self.device) if slots_NK is not None else None
        # functional_call borrows the module: two threads must not use one
        self._model = sharing_parameters(model).to(self.device)
        self._nodes_N = torch.tensor(list(nodes), dtype=torch.int64, device=self.device)
        self._scale_N = torch.tensor(list(loss_scale or [1.0]), dtype=self.layout.dtype, device=self.device).expand(len(sites))
        self.threads = 1
        """Number of threads that train parts of the rows; one where the model's own module computes."""
        self._data = TrainingData(self.sites, recipe, self._nodes_N, self.layout.dtype, trains=task.loss is not None)
        self._steps: LocalSteps | None = None
        if len(self._data.training_rows):
            names = self.sites.names if isinstance(self.sites, SiteTable) else [site.name for site in self.sites]
            scale_N = self._scale_N if loss_scale is not None else None
            self._steps = LocalSteps(self._model, task, names, recipe, self._data, scale_N, gradients)
        own = self._steps.gradients if self._steps is not None else None
        self._evaluation = Evaluation(task, self.sites, self._model, self.device, self.layout, own)
        self._round: int | None = None
        self.diverged: tuple[str, ...] = ()
        """Sites whose last training became non-finite; they have kept what they had before it."""
        self.without_loss: tuple[str, ...] = ()
        """Sites whose last training gave finite weights, and a loss that is infinite or no number."""
        x_NP = self._starts()
        self.state: State = recipe.algorithm.init(x_NP, self.context(0, local_steps=recipe.local_steps))
        self.optimizer_state: OptimizerState = recipe.optimizer.init(x_NP)

    def replace_state(self, state: State, round: int | None = None) -> None:
        """Go on with a state that a runtime has made of this one in a round; None: in the round that it is in."""
        self.state = state
        self._round = self._round if round is None else round

    def mark_diverged(self, names: Iterable[str]) -> None:
        """Take over which sites diverged in the last training, as a checkpoint says."""
        self.diverged = tuple(names)

    def use_threads(self, threads: int) -> None:
        """Train parts of the rows at the same time in so many threads; in one where the model's own module computes."""
        self.threads = threads

    @property
    def row_by_row(self) -> str | None:
        """Why rows are computed one by one; None where they go together."""
        return self._steps.gradients.row_by_row if self._steps is not None else None

    @property
    def is_compiled(self) -> bool:
        """Whether it trains in compiled loops."""
        return self._steps is not None and self._steps.compiled is not None

    @property
    def all_diverged(self) -> bool:
        """Whether no row that has data learnt anything in its last training."""
        return self.trains and len(self.diverged) == len(self._data.training_rows)

    @property
    def trains(self) -> bool:
        """Whether any row has something to train on."""
        return self._steps is not None

    def context(self, round: int, *, local_steps: int, rows: Rows | None = None) -> Context:
        """Context that the algorithm has in a round, for some rows or for all."""
        return Context(
            round=round,
            local_steps=local_steps,
            lr=self.recipe.optimizer.lr_at(round, self.recipe.rounds),
            seed=self.recipe.seed,
            nodes_N=self._nodes_N if rows is None else self._nodes_N[rows],
            layout=self.layout,
            slots_NK=self._slots_NK if rows is None or self._slots_NK is None else self._slots_NK[rows],
        )

    def train(self, round: int, active_N: Tensor | None = None, *, in_place: bool = False) -> Tensor:
        """K local steps of every row that has data and is active; the others are not touched.

        Args:
            round: of training.
            active_N: bool, which rows take part; None: all.
            in_place: nobody else holds the state's tensors, so that they may be written over.

        Returns:
            (N,) mean loss over the steps, NaN for rows that did not train.
        """
        self._round = round
        recipe, num_rows = self.recipe, len(self.sites)
        if recipe.compiled:
            self.compile()
        self.diverged = self.without_loss = ()
        loss_N = torch.full((num_rows,), torch.nan, dtype=self.layout.dtype)
        all_rows = rows = self._data.training_rows
        if active_N is not None:
            rows = rows[active_N.to(self.device)[rows]]
        if self._steps is None or recipe.local_steps == 0 or len(rows) == 0:
            return loss_N
        groups = [
            group
            for alike in self._data.with_equal_batches(rows)
            for group in self._steps.groups(alike, self._data.batch_size(alike), self.threads)
        ]
        # a rule may hold one tensor under two names: writing x over would change the other as well
        alone = len({tensor.untyped_storage().data_ptr() for tensor in self.state.values()}) == len(self.state)
        train = partial(self._train_group, round, in_place=in_place and alone, ahead=len(rows) == len(all_rows))
        covered = len(groups) == 1 and len(groups[0]) == 1 and len(rows) == num_rows
        state, optimizer_state = dict(self.state), dict(self.optimizer_state)
        left = []
        with one_blas_thread() if self.is_compiled else nullcontext():
            for part, trained in zip(chain.from_iterable(groups), self._trained(train, groups), strict=True):
                whole = None if covered else part
                replace_rows(state, self.state, trained.state, whole, num_rows, in_place=in_place and alone)
                replace_rows(optimizer_state, self.optimizer_state, trained.optimizer_state, whole, num_rows, in_place=in_place and alone)
                loss_N[part if isinstance(part, slice) else part.cpu()] = trained.loss_C.cpu()
                if not trained.finite_C.all():
                    numbers = torch.arange(num_rows)[part] if isinstance(part, slice) else part
                    left += numbers[~trained.finite_C].tolist()
        self.state, self.optimizer_state = state, optimizer_state
        self.diverged = tuple(self.sites[row].name for row in sorted(left))
        self.without_loss = self._without_loss(loss_N, rows, left)
        return loss_N

    def _without_loss(self, loss_N: Tensor, rows: Tensor, left: list[int]) -> tuple[str, ...]:
        """Sites that trained, have finite weights and no finite loss."""
        if bool(loss_N.sum().isfinite()):
            return ()
        lost = rows[~loss_N[rows.cpu()].isfinite().to(rows.device)].tolist()
        return tuple(self.sites[row].name for row in sorted(set(lost) - set(left)))

    def _trained(self, train: Callable[[list[Rows]], list[Trained]], groups: Sequence[list[Rows]]) -> Iterator[Trained]:
        """Train each part, in their order; several groups at a time where there are threads."""
        assert self._steps is not None
        if self.threads == 1 or len(groups) == 1 or self._steps.borrows_model:
            yield from chain.from_iterable(map(train, groups))
            return
        with ThreadPoolExecutor(self.threads, thread_name_prefix="train") as pool:
            waiting: deque[Future[list[Trained]]] = deque()
            for group in groups:
                waiting.append(pool.submit(train, group))
                if len(waiting) > 2 * self.threads:  # what is done and not taken up yet takes memory
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

    def _train_group(self, round: int, parts: list[Rows], *, in_place: bool, ahead: bool) -> list[Trained]:
        """K local steps of some rows, a part of them after the other."""
        assert self._steps is not None
        ends = [part.stop - part.start if isinstance(part, slice) else len(part) for part in parts]
        if isinstance(parts[0], slice):
            rows: Rows = slice(parts[0].start, parts[0].start + sum(ends))
        else:
            rows = torch.cat([part for part in parts if isinstance(part, Tensor)])
        trained = []
        for part, positions in zip(parts, torch.split(self._data.positions(round, rows, ahead=ahead), ends), strict=True):
            ctx = self.context(round, local_steps=self.recipe.local_steps, rows=part)
            trained.append(self._steps.train(part, positions, self.state, self.optimizer_state, ctx, in_place=in_place))
        return trained

    @property
    def loads_optimizers(self) -> bool:
        """Whether torch loads its optimisers, and what they stand on, to train the rows."""
        return self._steps is not None and self._steps.loads_optimizers

    def training_bytes(self, estimate_bytes: int = 0) -> int:
        """Bytes that local steps need for each row beside its state: moved parameters, gradients, the optimiser's next state.

        Args:
            estimate_bytes: of each row's parameters at which gradients are taken, where these are other tensors than the moved ones.
        """
        if self._steps is None:
            return 0
        x_NP = self.state["x"]
        if self._steps.plain_steps is not None:
            return x_NP.nbytes // len(self.sites)
        moved = x_NP.nbytes + sum(tensor.nbytes for tensor in self.optimizer_state.values())
        return (moved + self._steps.step_bytes(x_NP, estimate_bytes * len(self.sites))) // len(self.sites)

    def compile(self) -> None:
        """From now on train in compiled loops, which differ by rounding; in torch where there are none and the recipe asks for none.

        Raises:
            ConfigError: the recipe asks for them, and this model, its rows or this machine cannot have them.
        """
        if self._steps is not None:
            self._steps.compile(self.state["x"][:1])

    def outgoing(self, round: int, phase: int, *, local_steps: int) -> dict[str, Tensor]:
        """Messages of each row in an exchange, by channel, (N, ...)."""
        return self.recipe.algorithm.outgoing(self.state, phase, self.context(round, local_steps=local_steps))

    def merge(self, round: int, phase: int, inbox: Inbox, *, local_steps: int, active_N: Tensor | None = None) -> list[Notice]:
        """Take in what came; rows that are not active stay as they are. Returns what the rule has changed of its own accord."""
        return self.merge_in_parts(round, phase, [(slice(0, len(self.sites)), inbox)], local_steps=local_steps, active_N=active_N)

    def merge_in_parts(
        self, round: int, phase: int, inboxes: Sequence[tuple[slice, Inbox]], *, local_steps: int, active_N: Tensor | None = None
    ) -> list[Notice]:
        """Merge with an inbox for each part of the rows, in their order; what comes late is waited for when its part's turn comes."""
        self._round = round
        merged, before = [], []
        for rows, inbox in inboxes:
            state = self.state if len(inboxes) == 1 else {name: tensor[rows] for name, tensor in self.state.items()}
            context = self.context(round, local_steps=local_steps, rows=None if len(inboxes) == 1 else rows)
            before.append(state)
            merged.append(self.recipe.algorithm.merge(state, phase, inbox, context))
        was = self.state
        self._take_up(merged, before, active_N)
        return self.recipe.algorithm.notices(was, self.state) if self.recipe.algorithm.has_notices else []

    def _take_up(self, merged_parts: Sequence[State], before: Sequence[State], active_N: Tensor | None) -> None:
        """Put the merged parts of the rows into the state."""
        if len(merged_parts) == 1:
            merged = merged_parts[0]
        else:
            pieces = {name: [part[name] for part in merged_parts] for name in merged_parts[0]}
            same = {name for name in pieces if all(part[name] is old.get(name) for part, old in zip(merged_parts, before, strict=True))}
            merged = {name: self.state[name] if name in same else torch.cat(parts) for name, parts in pieces.items()}
        if active_N is not None:
            merged = {name: torch.where(column(active_N.to(self.device), new), new, self.state[name]) for name, new in merged.items()}
        self.state = merged

    def estimate(self) -> Tensor:
        """The parameters to evaluate, (N, P)."""
        return self.recipe.algorithm.estimate(self.state)

    def evaluate(self, rows: Sequence[int] | None = None) -> list[dict[str, float]]:
        """Measure each row's model on its own site's test rows, by metric; empty for a site without. `rows` None: all."""
        return self._evaluation.of_rows(self.estimate(), rows, self._round)

    def metrics(self, x_P: Tensor, site: Site, row: int = 0) -> dict[str, float]:
        """Measure one parameter vector, with one row's buffers, on one site's test rows."""
        return self._evaluation.metrics(x_P, site.test, site.name, row, self._round) if site.test is not None else {}

    def outputs(
        self, x_P: Tensor, inputs: Tensor, row: int = 0, *, site: str | None = None, buffers: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Compute a model's outputs in evaluation mode, on the CPU, with a row's own buffers or others; `site` has the inputs."""
        return self._evaluation.outputs(x_P, inputs, row, self._round, site=site, buffers=buffers)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Each row's buffers, (N, ...); they never travel."""
        return self._evaluation.buffers

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, by name."""
        groups = {"state": self.state, "optimizer": self.optimizer_state, "buffers": self.buffers}
        return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave.

        Raises:
            ValueError: it is without models, or with those of another shape: nobody goes on from the first parameters unawares.
        """
        state, optimizer_state, buffers = (
            {name.removeprefix(group): tensor.to(self.device) for name, tensor in tensors.items() if name.startswith(group)}
            for group in ("state/", "optimizer/", "buffers/")
        )
        found, own = state.get("x"), self.state["x"]
        if found is None or (found.shape, found.dtype) != (own.shape, own.dtype):
            given = "none" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise ValueError(f"models: {given}, expected {own.dtype} {tuple(own.shape)}")
        # what an earlier version did not keep begins as at the start
        self.state, self.optimizer_state = {**self.state, **state}, optimizer_state
        for name, buffer in buffers.items():
            self.buffers[name].copy_(buffer)

    def take_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Replace each row's buffers, (N, ...), as saved models have them; names that the model does not know are left out."""
        for name, own in self.buffers.items():
            if name in buffers:
                own.copy_(buffers[name])

    def _starts(self) -> Tensor:
        """Where each row begins, (N, P)."""
        start_1P = parameters_of(self._model).unsqueeze(0)
        x_NP = start_1P if len(self.sites) == 1 else start_1P.repeat(len(self.sites), 1)
        for row, site in enumerate(self.sites if isinstance(self.sites, tuple) else ()):
            if site.start is not None:
                if site.start.shape != start_1P.shape[1:]:
                    shape = tuple(site.start.shape)
                    raise ValueError(f"site {site.name}: start has shape {shape}, the model has {self.layout.size} parameters")
                x_NP[row] = site.start
        return x_NP
