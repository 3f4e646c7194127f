"""Running statistics, as of BatchNorm, for a model that nobody trained: the mean of all nodes' models.

Shapes: N nodes, M rows, P parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from p2pfl.draws import Purpose, torch_seed
from p2pfl.errors import TaskError
from p2pfl.params import load_parameters
from p2pfl.tasks import Task
from p2pfl.tasks.calling import users_code

MOST_ROWS = 2**16
"""Training rows that statistics are computed from; of more, so many are drawn."""

_BATCH = 256
_NOBODY = 2**32 - 1  # a number that no node has
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recalibrated(
    task: Task, model: nn.Module, x_P: Tensor, buffers: Mapping[str, Tensor], inputs_M: Tensor, seed: int
) -> dict[str, Tensor] | str:
    """Compute the buffers that belong to a parameter vector, by forward passes over training rows.

    Layers of running statistics see batches of some 256 rows that are drawn from all sites, and keep the average over the batches; all
    other layers are in evaluation mode. Buffers that are the same at every node stay as they are.

    Args:
        task: its model runs.
        model: architecture; not changed.
        x_P: trained parameters.
        buffers: every node's own, (N, ...).
        inputs_M: training rows of all sites, of the model's dtype.
        seed: of the experiment, for the order of the rows.

    Returns:
        The buffers by name, or why there are none.
    """
    with users_code(task.name, "copy of the model"):
        model = copy.deepcopy(model).cpu().eval()
    load_parameters(model, x_P.cpu())
    layers = {
        prefix: layer for prefix, layer in model.named_modules() if isinstance(layer, _NormBase) and _has_moved(prefix, layer, buffers)
    }
    computed = {f"{prefix}.{name}" if prefix else name for prefix in layers for name in _STATISTICS}
    for name, rows_N in buffers.items():
        if name not in computed and not bool((rows_N == rows_N[:1]).all()):
            return f"buffer {name} differs from node to node, and nobody knows how the mean model would have it"
        if name not in computed:
            model.get_buffer(name).copy_(rows_N[0])
    if layers:
        if len(inputs_M) < 2:  # noqa: PLR2004  # a variance takes two
            return "its running statistics need training rows"
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None  # torch: a cumulative average
            layer.train()
        generator = torch.Generator().manual_seed(torch_seed(seed, Purpose.RESAMPLE, node=_NOBODY))
        order_M = torch.randperm(len(inputs_M), generator=generator)[:MOST_ROWS]
        try:
            with torch.no_grad(), users_code(task.name, "model", inputs_M):
                for rows in order_M.tensor_split(max(1, round(len(order_M) / _BATCH))):
                    model(inputs_M[rows])
        except TaskError as error:
            return f"its running statistics cannot be computed: {error.fault}"
    found = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    broken = [name for name, buffer in found.items() if name in computed and not bool(buffer.isfinite().all())]
    return f"its running statistics are not finite ({broken[0]})" if broken else found


def _has_moved(prefix: str, layer: _NormBase, buffers: Mapping[str, Tensor]) -> bool:
    """Whether a layer's running statistics are other ones than before training, at any node; those that a task keeps fixed are not."""
    own = {f"{prefix}.{name}" if prefix else name: buffer for name, buffer in layer.named_buffers(recurse=False)}
    return any(name in buffers and not bool((buffers[name] == buffer).all()) for name, buffer in own.items())
