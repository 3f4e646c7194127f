"""The training rows of a population on its device, and which of them each step takes.

Shapes: N rows of the population, C of them, B examples in a batch, K local steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2pfl.draws import LastEpoch, batch_positions, batch_sizes
from p2pfl.tasks import Site, SiteTable
from p2pfl.training.recipe import Recipe

Rows = Tensor | slice
"""Some rows of a population: their numbers, or where they lie side by side."""

MOST_TRIED = 256  # examples of a batch of all rows
_DRAWN = 2**14  # examples


class TrainingData:
    """All sites' training rows once, one site after the other; batches are drawn by index.

    Args:
        nodes_N: each row's number in the roster, on the device.
        trains: whether there is a loss; without one no row trains.
    """

    def __init__(self, sites: Sequence[Site], recipe: Recipe, nodes_N: Tensor, dtype: torch.dtype, *, trains: bool) -> None:
        self._recipe, self._nodes_N = recipe, nodes_N
        self._ahead: dict[int, tuple[Rows, range, Tensor, LastEpoch]] = {}
        """By the first row of a part: its rows, the rounds for which it is drawn, their examples, and where drawing goes on."""
        self._alike: list[Tensor] | None = None
        self._places: Tensor | None = None  # a row number in between where sites have rows in common
        device = nodes_N.device
        if isinstance(sites, SiteTable):
            self.training_rows = torch.arange(len(sites) if trains else 0, device=device)
            self._sizes_N = sites.train.starts.diff().to(device)
            self._offsets_N = sites.train.starts[:-1].to(device)
            if trains and sites.train.rows is not None:
                self._places = sites.train.rows.to(device)
            inputs, targets = sites.inputs, sites.targets
        else:
            with_data = [(row, site.train) for row, site in enumerate(sites) if trains and site.train is not None]
            self.training_rows = torch.tensor([row for row, _ in with_data], dtype=torch.int64, device=device)
            self._sizes_N = torch.zeros(len(sites), dtype=torch.int64, device=device)
            self._offsets_N = torch.zeros(len(sites), dtype=torch.int64, device=device)
            if with_data:
                sizes = torch.tensor([len(train[0]) for _, train in with_data], device=device)
                self._sizes_N[self.training_rows] = sizes
                self._offsets_N[self.training_rows] = sizes.cumsum(0) - sizes
                inputs, targets = (torch.cat([of_dtype(train[part], dtype) for _, train in with_data]) for part in (0, 1))
        if not len(self.training_rows):
            return
        self.inputs, self.targets = of_dtype(inputs, dtype).to(device), of_dtype(targets, dtype).to(device)
        self.example_bytes = self.inputs[0].nbytes + self.targets[0].nbytes
        self._batch_sizes_N = batch_sizes(self._sizes_N, recipe.batch_size, repeating=recipe.repeats_rows)
        largest = int(self._batch_sizes_N[self.training_rows].max())
        self.sample_size = min(largest, MOST_TRIED) if recipe.batch_size == "full" else largest

    def sample(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one batch, to try a model on."""
        sample_B = torch.arange(self.sample_size, device=self.inputs.device) % len(self.inputs)
        return self.inputs[sample_B], self.targets[sample_B]

    def batch(self, positions_CB: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets at some positions, (C, B, ...)."""
        flat = positions_CB.reshape(-1)
        return (
            self.inputs.index_select(0, flat).view(*positions_CB.shape, *self.inputs.shape[1:]),
            self.targets.index_select(0, flat).view(*positions_CB.shape, *self.targets.shape[1:]),
        )

    def batch_size(self, rows: Rows) -> int:
        """Number of examples in a batch, for rows whose batches have the same size."""
        return int(self._batch_sizes_N[rows.start if isinstance(rows, slice) else rows[0]])

    def with_equal_batches(self, rows: Tensor) -> list[Tensor]:
        """The rows whose batches have as many examples, from the fewest on: a loss is a mean over its batch, which has no padding."""
        if rows is self.training_rows and self._alike is not None:
            return self._alike
        alike = self._grouped(rows)
        if rows is self.training_rows:  # as in all rounds where nobody is left out
            self._alike = alike
        return alike

    def _grouped(self, rows: Tensor) -> list[Tensor]:
        sizes_C = self._batch_sizes_N[rows]
        if bool((sizes_C == sizes_C[0]).all()):
            return [rows]
        order = sizes_C.argsort(stable=True)
        changes = sizes_C[order].diff().nonzero().flatten() + 1
        return list(torch.tensor_split(rows[order], changes.tolist()))

    def positions(self, round: int, rows: Rows, *, ahead: bool) -> Tensor:
        """Positions of the examples that rows train on in a round, (C, K, B); of a few rows drawn for several rounds at once.

        Rows have batches of as many examples; `ahead`: they will be asked for together in the rounds to come.
        """
        recipe, steps, batch_size = self._recipe, self._recipe.local_steps, self.batch_size(rows)
        if not ahead and not isinstance(rows, slice):
            return self._drawn(rows, round * steps, steps, None)
        key = rows.start if isinstance(rows, slice) else int(rows[0])
        drawn_rows, rounds, positions, last = self._ahead.get(key, (None, range(0), None, LastEpoch()))
        if not _are_the_same(rows, drawn_rows):
            rounds, last = range(0), LastEpoch()
        if positions is None or round not in rounds:
            count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
            rounds = range(round, round + max(1, min(recipe.rounds - round, _DRAWN // (count * steps * batch_size))))
            positions = self._drawn(rows, round * steps, len(rounds) * steps, last)
            self._ahead[key] = rows, rounds, positions, last
        first = (round - rounds.start) * steps
        return positions[:, first : first + steps]

    def _drawn(self, rows: Rows, first_step: int, num_steps: int, last: LastEpoch | None) -> Tensor:
        """Draw the positions that rows train on in any steps, (C, num_steps, B)."""
        recipe, which = self._recipe, (self._nodes_N[rows], self._sizes_N[rows], first_step, num_steps, self.batch_size(rows))
        positions_CKB = batch_positions(recipe.seed, *which, last, repeating=recipe.repeats_rows)
        if positions_CKB.stride(1) == 0:  # every step has all rows: one step's positions stand for all
            positions_CKB = positions_CKB[:, :1]
        positions_CKB = positions_CKB + self._offsets_N[rows, None, None]
        places_CKB = positions_CKB if self._places is None else self._places[positions_CKB]
        return places_CKB.expand(-1, num_steps, -1)


def of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert real numbers to the population's dtype; class numbers keep theirs."""
    return tensor.to(dtype) if tensor.dtype.is_floating_point else tensor


def _are_the_same(rows: Rows, others: Rows | None) -> bool:
    if isinstance(rows, Tensor):
        return isinstance(others, Tensor) and torch.equal(rows, others)
    return rows == others if isinstance(others, slice) else False
