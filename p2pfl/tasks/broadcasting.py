"""Finding a loss or a metric that compares each row's output with every row's target, in silence.

Outputs (B, 1) and targets (B,) are brought to (B, B) by the rules of tensors: the loss is a number, and a wrong one.

Shapes: B rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from p2pfl.tasks.sites import describe

_OUTPUTS, _TARGETS = 1, 2
_BY_ROW = frozenset({F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss, F.kl_div, F.soft_margin_loss})


class Watch(TorchFunctionMode):
    """Follows what is computed from outputs and targets, and remembers the first operation that pairs all rows with all."""

    def __init__(self, outputs: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.fault: str | None = None
        """One sentence with both shapes."""
        self._from: dict[int, tuple[Tensor, int]] = {id(outputs): (outputs, _OUTPUTS), id(targets): (targets, _TARGETS)}
        self._outputs, self._targets = outputs, targets

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        traces = [self._from.get(id(value), (value, 0))[1] for value in operands]
        together = 0
        for trace in traces:
            together |= trace
        if together and isinstance(result, Tensor):
            self._from[id(result)] = (result, together)
        if self.fault is None and sorted(traces[:2]) == [_OUTPUTS, _TARGETS]:
            self._judge(func, operands[:2], result)
        return result

    def _judge(self, func: Callable[..., Any], operands: Sequence[Tensor], result: object) -> None:
        first, second = sorted(operands, key=Tensor.dim)
        if first.dim() != 1 or second.dim() != 2 or second.shape[1] != 1 or len(first) != len(second) or len(first) < 2:  # noqa: PLR2004
            return
        every_pair = isinstance(result, Tensor) and result.shape == (len(first), len(first))
        if every_pair or func in _BY_ROW:
            self.fault = _fault(self._outputs, self._targets)


def _fault(outputs: Tensor, targets: Tensor) -> str:
    remedy = "give both the same shape, by outputs.squeeze(1) or targets.unsqueeze(1)"
    shapes = f"outputs are {describe(outputs)}, targets {describe(targets)}"
    return f"{shapes}: every row's output is compared with every row's target; {remedy}"


def pairing_in(metric: Callable[[Tensor, Tensor], float], outputs: Tensor, targets: Tensor) -> str | None:
    """One sentence where a metric's figure is another one for equal shapes, also where it does not compute with tensors.

    Looks at outputs (B, 1) with targets (B,), or the reverse. A metric that means its shapes, as one that takes outputs[..., 0], has
    another figure for flat outputs than for two columns; one that raises says nothing of pairs.
    """
    if {tuple(outputs.shape), tuple(targets.shape)} != {(len(outputs),), (len(outputs), 1)}:
        return None
    probes = (
        [outputs, outputs - outputs.mean()] if outputs.is_floating_point() else [outputs]
    )  # an untrained model may say one class of all
    for probe in probes:
        try:
            given = metric(probe, targets)
            flat = metric(probe.reshape(-1), targets.reshape(-1))
            columns = metric(probe.reshape(-1, 1), targets.reshape(-1, 1))
        except Exception:  # noqa: BLE001, S112  # it minds the shape
            continue
        if _is_same(flat, columns) and not _is_same(given, flat):
            return _fault(outputs, targets)
    return None


def _is_same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-9) or (math.isnan(one) and math.isnan(other))


@contextmanager
def watched(outputs: Tensor, targets: Tensor) -> Iterator[Watch]:
    """A block in which a function is called with outputs and targets; ask for the fault behind it."""
    watch = Watch(outputs, targets)
    with watch:
        yield watch
