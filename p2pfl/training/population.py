"""N nodes as one tensor: their training, what they send and take in, their evaluation. The daemon's population has one row.

Shapes: N rows, B examples in a batch, K local steps, P parameters.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice, pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from p2pfl.algorithms import Aggregator, Algorithm, Context, Inbox, InboxFactory, Notice, State
from p2pfl.algorithms.aggregators import WeightedMean
from p2pfl.draws import LastEpoch, Purpose, batch_positions, batch_sizes, torch_seed
from p2pfl.errors import ConfigError, TaskError
from p2pfl.params import Layout, parameters_of, sharing_parameters
from p2pfl.tasks import Rows as Examples
from p2pfl.tasks import Site, SiteTable, Task
from p2pfl.tasks.calling import described, figure, users_code
from p2pfl.training.backends.compiled import Compiled, one_blas_thread
from p2pfl.training.backends.gradients import RETURN_AT_ONCE_BYTES, Gradients, outputs_of, returns_parts
from p2pfl.training.backends.layers import SgdStep
from p2pfl.training.optimizers import OptimizerSpec, OptimizerState, StackedOptimizer, clipped


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a population learns: what the experiment says, without when it ends."""

    algorithm: Algorithm
    optimizer: OptimizerSpec
    batch_size: int | Literal["full"]
    """The most examples in a batch; a site with fewer rows takes each of them once. "full": all rows of every site."""
    rounds: int
    """Training rounds, for the learning rate's schedule."""
    local_steps: int
    seed: int
    repeats_rows: bool = False
    """Whether batches have exactly `batch_size` rows, also at a site with fewer, as in files of schema 1."""
    compiled: bool = False
    """Whether local steps are those of compiled loops, which round otherwise than torch."""
    aggregator: Aggregator = field(default_factory=WeightedMean)
    """How messages are mixed."""

    @property
    def inboxes(self) -> InboxFactory:
        """The factory of every inbox that the algorithm is given."""
        return InboxFactory(channels=self.algorithm.channels, aggregator=self.aggregator)

    @property
    def mixes_in_place(self) -> bool:
        """Whether an exchange makes of all rows x <- W x and nothing else."""
        return self.algorithm.plain_gossip and self.aggregator.sums_flows

    @property
    def why_not_compiled(self) -> str | None:
        """Why its local steps are none of those that are compiled; None where they are plain SGD on x and nothing else."""
        spec = self.optimizer
        if spec.name != "sgd":
            return f"optimizer.name = {spec.name!r}: only plain sgd is compiled"
        if spec.momentum:
            return f"optimizer.momentum = {spec.momentum:g}: only plain sgd is compiled"
        if spec.clip_norm is not None:
            return f"optimizer.clip_norm = {spec.clip_norm:g}: only plain sgd is compiled"
        if self.algorithm.local_changes:
            return f"the local steps of {type(self.algorithm).__name__} are more than plain sgd, which alone is compiled"
        return None

    def batch_sizes(self, sizes_N: Tensor) -> Tensor:
        """Rows in each site's batches, int64 (N,), from the numbers of its training rows."""
        return batch_sizes(sizes_N, self.batch_size, repeating=self.repeats_rows)


Rows = Tensor | slice
"""Which rows: their numbers, or where they lie side by side."""


@dataclass(frozen=True, slots=True)
class _Trained:
    """What training has made of some rows."""

    state: Mapping[str, Tensor]
    """What of it has changed, (C, ...)."""
    optimizer_state: Mapping[str, Tensor]
    loss_C: Tensor
    finite_C: Tensor
    """bool; the others are as they were."""


@dataclass(slots=True)
class _Ahead:
    """Examples that some rows train on in rounds to come."""

    rows: Rows | None = None
    first: int = 0
    """Round."""
    rounds: int = 0
    positions: Tensor | None = None
    last: LastEpoch = field(default_factory=LastEpoch)


class _Writing:
    """A population's tensors while parts of the rows are replaced.

    Args:
        state: as it is.
        optimizer_state: as it is.
        first: any part: it says which tensors change.
        covered: that part is all there is.
        in_place: the tensors may be written over.
    """

    def __init__(self, state: State, optimizer_state: OptimizerState, first: _Trained, *, covered: bool, in_place: bool) -> None:
        self._covered = covered
        self.state, self.optimizer_state = dict(state), dict(optimizer_state)
        if covered:
            return
        for tensors, changed in ((self.state, first.state), (self.optimizer_state, first.optimizer_state)):
            for name, part in changed.items():
                if name not in tensors:
                    tensors[name] = part.new_zeros((len(state["x"]), *part.shape[1:]))
                elif not in_place:
                    tensors[name] = tensors[name].clone()

    def take(self, rows: Rows, trained: _Trained) -> None:
        """Put a part into its place."""
        for tensors, changed in ((self.state, trained.state), (self.optimizer_state, trained.optimizer_state)):
            for name, part in changed.items():
                if self._covered:
                    tensors[name] = part
                else:
                    tensors[name][rows] = part


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
        self.task, self.recipe = task, recipe
        self.sites = sites if isinstance(sites, SiteTable) else tuple(sites)
        self.layout = Layout.of(model)
        self.device = torch.device(device)
        self._slots_NK = slots_NK.to(self.device) if slots_NK is not None else None
        # functional_call borrows the module: two threads must not share one
        self._model = sharing_parameters(model).to(self.device)
        self._nodes_N = torch.tensor(list(nodes), dtype=torch.int64, device=self.device)
        self._is_scaled = loss_scale is not None
        self._scale_N = torch.tensor(list(loss_scale or [1.0]), dtype=self.layout.dtype, device=self.device).expand(len(sites))
        self.threads = 1
        """Parts of the rows are trained at the same time in so many threads; one where the model's own module computes."""
        self._compiled: Compiled | None = None
        self._drawn_ahead: dict[int, _Ahead] = {}  # by the first row of a part
        self._load_data()
        self._round: int | None = None
        self.diverged: tuple[str, ...] = ()
        """Sites whose last training became non-finite; they have kept what they had before it."""
        self.without_loss: tuple[str, ...] = ()
        """Sites whose last training gave finite weights, and a loss that is infinite or no number."""
        x_NP = self._starts()
        self.state: State = recipe.algorithm.init(x_NP, self.context(0, local_steps=recipe.local_steps))
        self.optimizer_state: OptimizerState = recipe.optimizer.init(x_NP)

    @property
    def row_by_row(self) -> str | None:
        """Why rows are computed one by one; None where they go together."""
        return self._gradients.row_by_row if self._gradients else None

    @property
    def is_compiled(self) -> bool:
        """Whether it trains in compiled loops."""
        return self._compiled is not None

    @property
    def all_diverged(self) -> bool:
        """Whether no row that has data learnt anything in its last training."""
        return self.trains and len(self.diverged) == len(self._training_rows)

    @property
    def trains(self) -> bool:
        """Whether any row has something to train on."""
        return self._gradients is not None

    def context(self, round: int, *, local_steps: int, rows: Rows | None = None) -> Context:
        """What the algorithm may know in this round, of some rows or of all."""
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
        rows = self._training_rows if active_N is None else self._training_rows[active_N.to(self.device)[self._training_rows]]
        if self._gradients is None or recipe.local_steps == 0 or len(rows) == 0:
            return loss_N
        groups = [group for alike in self._with_equal_batches(rows) for group in self._groups(alike)]
        # a rule may hold one tensor under two names: writing x over would change the other as well
        alone = len({tensor.untyped_storage().data_ptr() for tensor in self.state.values()}) == len(self.state)
        everybody = len(rows) == len(self._training_rows)
        train = partial(self._train_group, round, in_place=in_place and alone, ahead=everybody)
        covered = len(groups) == 1 and len(groups[0]) == 1 and len(rows) == num_rows
        new: _Writing | None = None
        left = []
        with one_blas_thread() if self._compiled is not None else nullcontext():
            for part, trained in zip(chain.from_iterable(groups), self._trained(train, groups), strict=True):
                if new is None:
                    new = _Writing(self.state, self.optimizer_state, trained, covered=covered, in_place=in_place and alone)
                new.take(part, trained)
                loss_N[part if isinstance(part, slice) else part.cpu()] = trained.loss_C.cpu()
                if not trained.finite_C.all():
                    numbers = torch.arange(num_rows)[part] if isinstance(part, slice) else part
                    left += numbers[~trained.finite_C].tolist()
        assert new is not None
        self.state, self.optimizer_state = new.state, new.optimizer_state
        self.diverged = tuple(self.sites[row].name for row in sorted(left))
        self.without_loss = self._without_loss(loss_N, rows, left)
        return loss_N

    def _without_loss(self, loss_N: Tensor, rows: Tensor, left: list[int]) -> tuple[str, ...]:
        """Sites that trained, have finite weights and no finite loss."""
        if bool(loss_N.sum().isfinite()):
            return ()
        lost = rows[~loss_N[rows.cpu()].isfinite().to(rows.device)].tolist()
        return tuple(self.sites[row].name for row in sorted(set(lost) - set(left)))

    def _with_equal_batches(self, rows: Tensor) -> list[Tensor]:
        """The rows whose batches have as many examples, from the fewest on: a loss is a mean over its batch, which has no padding."""
        sizes_C = self._batch_sizes_N[rows]
        if bool((sizes_C == sizes_C[0]).all()):
            return [rows]
        order = sizes_C.argsort(stable=True)
        changes = sizes_C[order].diff().nonzero().flatten() + 1
        return list(torch.tensor_split(rows[order], changes.tolist()))

    def _batch_size(self, rows: Rows) -> int:
        """Examples in a batch of rows that have as many."""
        return int(self._batch_sizes_N[rows.start if isinstance(rows, slice) else rows[0]])

    def _groups(self, rows: Tensor) -> list[list[Rows]]:
        """Rows that are trained together, as many as stay in the cache, in groups that share what is worked out but once.

        Slices where they lie side by side.
        """
        assert self._gradients is not None
        batched = self._gradients.batched
        batch_size = self._batch_size(rows)
        kept_bytes = batched.saved_bytes * batch_size // self._sample_size if batched is not None else 2 * self._example_bytes * batch_size
        together = rows_together(self.layout.size_bytes, kept_bytes)
        if self._compiled is not None:
            together = max(together, _GROUPED)
        if self._gradients.row_by_row is not None:
            together = len(rows)  # its draws are torch's own: one after the other
        count = len(rows)
        shares = self.threads * -(-count // (self.threads * _GROUPED))  # each thread gets as many
        grouped = max(together, -(-count // shares))
        start, stop = int(rows[0]), int(rows[-1]) + 1
        side_by_side = stop - start == count
        return [
            [
                slice(start + first, start + last) if side_by_side else rows[first:last]
                for first, last in pairwise(shared_out(begin, min(begin + grouped, count), together))
            ]
            for begin in range(0, count, grouped)
        ]

    def _trained(self, train: Callable[[list[Rows]], list[_Trained]], groups: Sequence[list[Rows]]) -> Iterator[_Trained]:
        """What training makes of each part, in their order; several groups at a time where there are threads."""
        assert self._gradients is not None
        borrows = self._compiled is None and self._gradients.batched is None  # the module, whose tensors functional_call swaps
        if self.threads == 1 or len(groups) == 1 or borrows:
            yield from chain.from_iterable(map(train, groups))
            return
        with ThreadPoolExecutor(self.threads, thread_name_prefix="train") as pool:
            waiting: deque[Future[list[_Trained]]] = deque()
            for group in groups:
                waiting.append(pool.submit(train, group))
                if len(waiting) > 2 * self.threads:  # what is done and not taken up yet takes memory
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

    def _train_group(self, round: int, parts: list[Rows], *, in_place: bool, ahead: bool) -> list[_Trained]:
        """K local steps of some rows, a part of them after the other."""
        ends = [part.stop - part.start if isinstance(part, slice) else len(part) for part in parts]
        if isinstance(parts[0], slice):
            rows: Rows = slice(parts[0].start, parts[0].start + sum(ends))
        else:
            rows = torch.cat([part for part in parts if isinstance(part, Tensor)])
        return [
            self._train_rows(round, part, positions, in_place=in_place)
            for part, positions in zip(parts, torch.split(self._examples(round, rows, ahead=ahead), ends), strict=True)
        ]

    def _examples(self, round: int, rows: Rows, *, ahead: bool) -> Tensor:
        """Where the examples are that rows train on in a round, (C, K, B); of a few rows drawn for several rounds at once.

        Args:
            round: of training.
            rows: with batches of as many examples.
            ahead: these rows will be asked for together in the rounds to come.
        """
        recipe, steps, batch_size = self.recipe, self.recipe.local_steps, self._batch_size(rows)
        if not ahead and not isinstance(rows, slice):
            return self._drawn(rows, round * steps, steps, None)
        drawn = self._drawn_ahead.setdefault(rows.start if isinstance(rows, slice) else int(rows[0]), _Ahead())
        if not _are_the_same(rows, drawn.rows):
            drawn.rows, drawn.positions, drawn.last = rows, None, LastEpoch()
        if drawn.positions is None or not 0 <= round - drawn.first < drawn.rounds:
            count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
            drawn.first = round
            drawn.rounds = max(1, min(recipe.rounds - round, _DRAWN // (count * steps * batch_size)))
            drawn.positions = self._drawn(rows, round * steps, drawn.rounds * steps, drawn.last)
        first = (round - drawn.first) * steps
        return drawn.positions[:, first : first + steps]

    def _drawn(self, rows: Rows, first_step: int, num_steps: int, last: LastEpoch | None) -> Tensor:
        """Where the examples are that rows train on in any steps, (C, num_steps, B)."""
        recipe, which = self.recipe, (self._nodes_N[rows], self._sizes_N[rows], first_step, num_steps, self._batch_size(rows))
        positions_CKB = batch_positions(recipe.seed, *which, last, repeating=recipe.repeats_rows)
        if positions_CKB.stride(1) == 0:  # every step has all rows: one step's places stand for all
            positions_CKB = positions_CKB[:, :1]
        positions_CKB = positions_CKB + self._offsets_N[rows, None, None]
        places_CKB = positions_CKB if self._places is None else self._places[positions_CKB]
        return places_CKB.expand(-1, num_steps, -1)

    def _train_rows(self, round: int, rows: Rows, positions_CKB: Tensor, *, in_place: bool) -> _Trained:
        """K local steps of some rows: on a copy of them, or where they are if that is allowed."""
        recipe = self.recipe
        assert self._gradients is not None
        nodes_C = self._nodes_N[rows]
        ctx = self.context(round, local_steps=recipe.local_steps, rows=rows)
        first_step = round * recipe.local_steps
        state = {name: tensor[rows] for name, tensor in self.state.items()}
        momenta = {name: tensor[rows] for name, tensor in self.optimizer_state.items()}
        if recipe.algorithm.resets_optimizer:
            momenta = recipe.optimizer.init(state["x"])
        scale_C = self._scale_N[rows] if self._is_scaled else None
        if self._compiled is not None:
            return self._compiled_steps(state["x"], positions_CKB, ctx.lr, scale_C, in_place=in_place and isinstance(rows, slice))
        if self._steps_down_only:
            with suppress(Exception, SystemExit):  # a loss of the user's own: what comes below finds whose fault it is
                return self._written_out_steps(state["x"], positions_CKB, ctx.lr, scale_C, in_place=in_place and isinstance(rows, slice))
        numbers = torch.arange(len(self.sites), device=self.device)[rows] if isinstance(rows, slice) else rows
        kept = {name: buffer[rows].clone() for name, buffer in self.buffers.items()}
        optimizer = StackedOptimizer(recipe.optimizer, state["x"], momenta, lr=ctx.lr, first_step=first_step)
        total_C = torch.zeros(len(nodes_C), dtype=self.layout.dtype, device=self.device)
        for k in range(recipe.local_steps):
            moving = {**state, "x": optimizer.x}
            gradient_CP, loss_C, unused_CP = self._gradients(
                recipe.algorithm.estimate(moving),
                *self._batch(positions_CKB[:, k]),
                seed=recipe.seed,
                nodes_N=nodes_C,
                rows_N=numbers,
                round=round,
                step=k,
            )
            if scale_C is not None:
                gradient_CP = gradient_CP * scale_C[:, None]
            if recipe.optimizer.clip_norm is not None:
                gradient_CP = clipped(gradient_CP, recipe.optimizer.clip_norm)
            optimizer.step(recipe.algorithm.correct(moving, gradient_CP, ctx), unused_CP)
            del gradient_CP, unused_CP  # of the next step there is one more
            total_C += loss_C
        adapted = recipe.algorithm.adapt(state, optimizer.x, ctx)
        moved = optimizer.state
        # also the optimiser's own: Adam with an infinite second moment would stand still for ever
        made = [new for name, new in adapted.items() if new is not state.get(name) and new.is_floating_point() and new.numel()]
        finite_C = torch.stack([_are_finite(tensor.flatten(1)) for tensor in (optimizer.x, *moved.values(), *made)]).all(dim=0)
        if not finite_C.all():  # a row that has left the numbers stays where it was: what it would send is poison to all others
            adapted = {name: torch.where(_column(finite_C, new), new, state[name]) for name, new in adapted.items()}
            moved = {name: torch.where(_column(finite_C, new), new, momenta[name]) for name, new in moved.items()}
            for name, buffer in self.buffers.items():
                buffer[numbers[~finite_C]] = kept[name][~finite_C]
        changed = {name: new for name, new in adapted.items() if new is not state.get(name)}
        return _Trained(changed, moved, total_C / recipe.local_steps, finite_C)

    def _batch(self, positions_CB: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets at some places, (C, B, ...)."""
        flat = positions_CB.reshape(-1)
        return (
            self._inputs.index_select(0, flat).view(*positions_CB.shape, *self._inputs.shape[1:]),
            self._targets.index_select(0, flat).view(*positions_CB.shape, *self._targets.shape[1:]),
        )

    @property
    def _steps_down_only(self) -> bool:
        """Whether a local step is one of plain SGD on x and nothing else, which needs no gradient in between."""
        assert self._gradients is not None
        knows_layers = self._gradients.batched is not None and self._gradients.row_by_row is None
        return knows_layers and self.recipe.why_not_compiled is None

    def _written_out_steps(self, x_CP: Tensor, positions_CKB: Tensor, lr: float, scale_C: Tensor | None, *, in_place: bool) -> _Trained:
        """The same for plain SGD on a chain of known layers."""
        assert self._gradients is not None
        assert self._gradients.batched is not None
        copy_CP = x_CP.clone(memory_format=torch.contiguous_format)
        before_CP, x_CP = (copy_CP, x_CP) if in_place else (x_CP, copy_CP)
        total_C = torch.zeros(len(x_CP), dtype=self.layout.dtype, device=self.device)
        step = SgdStep(x_CP, lr, self.recipe.optimizer.weight_decay)
        try:
            for positions_CB in positions_CKB.unbind(1):
                total_C += self._gradients.batched.run(x_CP, *self._batch(positions_CB), step, scale_C)
        except BaseException:  # an interruption, too, leaves rows as they were
            if in_place:
                x_CP.copy_(before_CP)
            raise
        finite_C = _are_finite(x_CP)
        if not finite_C.all():
            x_CP.copy_(torch.where(finite_C[:, None], x_CP, before_CP))
        return _Trained({} if in_place else {"x": x_CP}, {}, total_C / self.recipe.local_steps, finite_C)

    def _compiled_steps(self, x_CP: Tensor, positions_CKB: Tensor, lr: float, scale_C: Tensor | None, *, in_place: bool) -> _Trained:
        """The same in compiled loops."""
        assert self._compiled is not None
        in_place = in_place and x_CP.is_contiguous()
        if not in_place:
            x_CP = x_CP.clone(memory_format=torch.contiguous_format)
        loss_C, finite_C = self._compiled.sgd_steps(x_CP, positions_CKB, lr, self.recipe.optimizer.weight_decay, scale_C)
        return _Trained({} if in_place else {"x": x_CP}, {}, loss_C, finite_C)

    @property
    def vectorises(self) -> bool:
        """Whether torch vectorises the gradients, because they are not written out here."""
        return self._gradients is not None and self._gradients.batched is None and self._gradients.row_by_row is None

    @property
    def training_bytes(self) -> int:
        """What a round of local steps needs for each row beside the row itself: moved parameters, gradients, the optimiser's next state."""
        if self._gradients is None:
            return 0
        moved = [self.state["x"]]
        if self._steps_down_only:
            return moved[0].nbytes // len(self.sites)
        changes, gradients = self.recipe.algorithm.local_changes, 2  # of each tensor, and side by side
        if self._gradients.batched is not None:
            gradients = 1
        corrected = "gradient" in changes or bool(self.recipe.optimizer.weight_decay) or self._is_scaled
        moved += [*self.optimizer_state.values()]
        changed = sum(tensor.nbytes for name, tensor in self.state.items() if name != "x") if "state" in changes else 0
        steps = (gradients + int(corrected)) * self.state["x"].nbytes
        if gradients == 2 and returns_parts(self.state["x"]):  # noqa: PLR2004  # what has been put into the whole one is given back
            largest = max(spec.size for spec in self.layout.tensors) * self.state["x"].element_size()
            steps -= max(0, self.state["x"].nbytes - RETURN_AT_ONCE_BYTES - largest)
        return (sum(tensor.nbytes for tensor in moved) + max(steps, changed)) // len(self.sites)

    def compile(self) -> None:
        """From now on train in compiled loops, the same but for rounding; in torch where there are none and the recipe asks for none.

        Raises:
            ConfigError: the recipe asks for them, and this model, its rows or this machine cannot have them.
        """
        if self._compiled is not None or self._gradients is None:
            return
        found: Compiled | str = self.recipe.why_not_compiled or "the model's gradients cannot be written out"
        if self._steps_down_only:
            assert self._gradients.batched is not None
            found = Compiled.of(self._gradients.batched, self.state["x"][:1], self._inputs, self._targets)
        if isinstance(found, Compiled):
            self._compiled = found
        elif self.recipe.compiled:
            raise ConfigError(f"compiled = 'on': {found}; take off")

    def outgoing(self, round: int, phase: int, *, local_steps: int) -> dict[str, Tensor]:
        """What each row sends in an exchange, by channel, (N, ...)."""
        return self.recipe.algorithm.outgoing(self.state, phase, self.context(round, local_steps=local_steps))

    def merge(self, round: int, phase: int, inbox: Inbox, *, local_steps: int, active_N: Tensor | None = None) -> list[Notice]:
        """Take in what came; rows that are not active stay as they are. Returns what the rule has changed of its own accord."""
        return self.merge_in_parts(round, phase, [(slice(0, len(self.sites)), inbox)], local_steps=local_steps, active_N=active_N)

    def merge_in_parts(
        self, round: int, phase: int, inboxes: Sequence[tuple[slice, Inbox]], *, local_steps: int, active_N: Tensor | None = None
    ) -> list[Notice]:
        """The same with an inbox for each part of the rows, in their order; what comes late is waited for when its part's turn comes."""
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
        """What a merge has made of each part of the rows."""
        if len(merged_parts) == 1:
            merged = merged_parts[0]
        else:
            pieces = {name: [part[name] for part in merged_parts] for name in merged_parts[0]}
            same = {name for name in pieces if all(part[name] is old.get(name) for part, old in zip(merged_parts, before, strict=True))}
            merged = {name: self.state[name] if name in same else torch.cat(parts) for name, parts in pieces.items()}
        if active_N is not None:
            merged = {name: torch.where(_column(active_N.to(self.device), new), new, self.state[name]) for name, new in merged.items()}
        self.state = merged

    def estimate(self) -> Tensor:
        """The parameters to evaluate, (N, P)."""
        return self.recipe.algorithm.estimate(self.state)

    def evaluate(self, rows: Sequence[int] | None = None) -> list[dict[str, float]]:
        """Each row's model on its own site's test rows, by metric; empty for a site without.

        Args:
            rows: which; None: all.
        """
        x_NP, found = self.estimate(), list[dict[str, float]]()
        tests = ((row, self._test_of(row)) for row in (range(len(self.sites)) if rows is None else rows))  # each made once
        for shape, alike in groupby(tests, lambda pair: pair[1][0].shape if pair[1] is not None else None):
            together = 1 if shape is None else max(1, _CACHE_BYTES // (self.layout.size_bytes + 4 * math.prod(shape)))
            while some := list(islice(alike, together)):
                with_rows = [(row, test) for row, test in some if test is not None]
                found += self._evaluate_alike(x_NP, with_rows) if with_rows else [{} for _ in some]
        return found

    def _test_of(self, row: int) -> Examples | None:
        """A row's own test rows; of a table, which is checked already, without making the site."""
        return self.sites.test_of(row) if isinstance(self.sites, SiteTable) else self.sites[row].test

    def _name_of(self, row: int) -> str:
        return self.sites.names[row] if isinstance(self.sites, SiteTable) else self.sites[row].name

    def _evaluate_alike(self, x_NP: Tensor, tests: list[tuple[int, Examples]]) -> list[dict[str, float]]:
        """As `evaluate`, of rows with as many test rows each."""
        batched = self._gradients.batched if self._gradients else None
        if batched is not None and batched.evaluates:
            inputs_CB = torch.stack([of_dtype(inputs, self.layout.dtype) for _, (inputs, _) in tests])
            outputs_CB = None
            with suppress(Exception, SystemExit):  # one by one tells whose fault it is
                outputs_CB = batched.outputs(_some_of(x_NP, [row for row, _ in tests]), inputs_CB.to(self.device)).cpu()
            if outputs_CB is not None:
                return [
                    self._figures(outputs_B, targets, self._name_of(row))
                    for outputs_B, (row, (_, targets)) in zip(outputs_CB, tests, strict=True)
                ]
        return [self._metrics_on(x_NP[row], test, self._name_of(row), row) for row, test in tests]

    def _figures(self, outputs: Tensor, targets: Tensor, site: str) -> dict[str, float]:
        """Of outputs on one site's test rows."""
        return {name: figure(self.task, name, outputs, targets, site=site, round=self._round) for name in self.task.metrics}

    def metrics(self, x_P: Tensor, site: Site, row: int = 0) -> dict[str, float]:
        """One parameter vector, with one row's buffers, on one site's test rows."""
        return self._metrics_on(x_P, site.test, site.name, row) if site.test is not None else {}

    def _metrics_on(self, x_P: Tensor, test: Examples, site: str, row: int) -> dict[str, float]:
        inputs, targets = test
        return self._figures(self.outputs(x_P, inputs, row, site=site), targets, site)

    def outputs(
        self, x_P: Tensor, inputs: Tensor, row: int = 0, *, site: str | None = None, buffers: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Outputs of a model in evaluation mode, on the CPU.

        Args:
            x_P: its parameters.
            inputs: of some rows.
            row: whose buffers it has.
            site: whose rows they are.
            buffers: instead of a row's own.
        """
        if buffers is None:
            buffers = {name: stacked[row] for name, stacked in self.buffers.items()}
        buffers = {name: tensor.to(self.device) for name, tensor in buffers.items()}
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
        """Take up what `tensors` gave.

        Raises:
            ValueError: it is without models, or with those of another shape: nobody goes on from the first parameters unawares.
        """
        group = {
            prefix: {n.removeprefix(prefix): t.to(self.device) for n, t in tensors.items() if n.startswith(prefix)} for prefix in _GROUPS
        }
        found, own = group["state/"].get("x"), self.state["x"]
        if found is None or (found.shape, found.dtype) != (own.shape, own.dtype):
            given = "none" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise ValueError(f"models: {given}, expected {own.dtype} {tuple(own.shape)}")
        # what an earlier version did not keep begins as at the start
        self.state, self.optimizer_state = {**self.state, **group["state/"]}, group["optimizer/"]
        for name, buffer in group["buffers/"].items():
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

    def _load_data(self) -> None:
        """All rows' data once, one after the other; batches are drawn by index."""
        self._gradients: Gradients | None = None
        self._places: Tensor | None = None
        if isinstance(self.sites, SiteTable):
            self._load_table(self.sites)
            return
        with_data = [(row, site.train) for row, site in enumerate(self.sites) if site.train is not None and self.task.loss is not None]
        self._training_rows = torch.tensor([row for row, _ in with_data], dtype=torch.int64, device=self.device)
        self._sizes_N = torch.zeros(len(self.sites), dtype=torch.int64, device=self.device)
        self._offsets_N = torch.zeros(len(self.sites), dtype=torch.int64, device=self.device)
        if not with_data or self.task.loss is None:
            return
        sizes = torch.tensor([len(train[0]) for _, train in with_data], device=self.device)
        self._sizes_N[self._training_rows] = sizes
        self._offsets_N[self._training_rows] = sizes.cumsum(0) - sizes
        self._inputs = torch.cat([of_dtype(train[0], self.layout.dtype) for _, train in with_data]).to(self.device)
        self._targets = torch.cat([of_dtype(train[1], self.layout.dtype) for _, train in with_data]).to(self.device)
        self._try_gradients([site.name for site in self.sites])

    def _load_table(self, table: SiteTable) -> None:
        """The table's own tensors; a row number in between where sites share rows."""
        self._training_rows = torch.arange(len(table), device=self.device)
        self._sizes_N = table.train.starts.diff().to(self.device)
        self._offsets_N = table.train.starts[:-1].to(self.device)
        if self.task.loss is None:
            self._training_rows = self._training_rows[:0]
            return
        if table.train.rows is not None:
            self._places = table.train.rows.to(self.device)
        self._inputs, self._targets = (
            of_dtype(table.inputs, self.layout.dtype).to(self.device),
            of_dtype(table.targets, self.layout.dtype).to(self.device),
        )
        self._try_gradients(table.names)

    def _try_gradients(self, names: Sequence[str]) -> None:
        """How this model's gradients are computed, found out on a batch."""
        assert self.task.loss is not None
        self._example_bytes = self._inputs[0].nbytes + self._targets[0].nbytes
        self._batch_sizes_N = self.recipe.batch_sizes(self._sizes_N)
        largest = int(self._batch_sizes_N[self._training_rows].max())
        self._sample_size = min(largest, _MOST_TRIED) if self.recipe.batch_size == "full" else largest
        sample_B = torch.arange(self._sample_size, device=self.device) % len(self._inputs)
        sample = self._inputs[sample_B], self._targets[sample_B]
        self._gradients = Gradients(self._model, self.task.loss, sample, len(names), task=self.task.name, sites=names)


_GROUPS = ("state/", "optimizer/", "buffers/")


def _are_finite(rows_CP: Tensor) -> Tensor:
    """Whether all of each row is, (C,); a finite sum says so many times as fast as looking at each number does."""
    finite_C = rows_CP.sum(dim=-1).isfinite()
    if not finite_C.all():  # or the sum was too large
        finite_C = rows_CP.amin(dim=-1).isfinite() & rows_CP.amax(dim=-1).isfinite()
    return finite_C


def _are_the_same(rows: Rows, others: Rows | None) -> bool:
    if isinstance(rows, Tensor):
        return isinstance(others, Tensor) and torch.equal(rows, others)
    return rows == others if isinstance(others, slice) else False


_GROUPED = 32
_MOST_TRIED = 256  # examples of a batch of all rows
_DRAWN = 2**14  # examples
_CACHE_BYTES = 4 * 1024**2


def rows_together(row_bytes: int, kept_bytes: int) -> int:
    """How many rows are computed together so that they, and what a step keeps of them, stay in the cache."""
    return max(1, min(4096, _CACHE_BYTES // (row_bytes + kept_bytes)))


def shared_out(start: int, stop: int, most: int) -> list[int]:
    """Where parts of at most so many begin and the last one ends, each about as large."""
    parts = max(1, -(-(stop - start) // most))
    return [start + (stop - start) * part // parts for part in range(parts + 1)]


def of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Real numbers in the population's dtype; class numbers as they are."""
    return tensor.to(dtype) if tensor.dtype.is_floating_point else tensor


def _some_of(x_NP: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows; a view where they lie side by side."""
    side_by_side = rows[-1] - rows[0] == len(rows) - 1 and all(after - before == 1 for before, after in pairwise(rows))
    return x_NP[rows[0] : rows[-1] + 1] if side_by_side else x_NP[list(rows)]


def _column(values_N: Tensor, like: Tensor) -> Tensor:
    return values_N.reshape(-1, *[1] * (like.dim() - 1))
