"""DistributedDataParallel around a model whose forward is a graph."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from l2rw_ext.errors import NotCompilableError


class _Nothing(nn.Module):
    """Takes the place of a module whose forward is not to run."""

    def forward(self, *_: Any, **__: Any) -> None:
        """Return nothing."""


def inside(model: nn.Module) -> nn.Module:
    """The model in a wrapper, or the model itself.

    Raises:
        NotCompilableError: the wrapper searches the graph of the outputs.
    """
    if not isinstance(model, DistributedDataParallel):
        return model
    if model.find_unused_parameters and not model.static_graph:
        raise NotCompilableError(
            "DistributedDataParallel searches the outputs for unused parameters; leave "
            "find_unused_parameters off"
        )
    module: nn.Module = model.module
    return module


def announce_backward(model: nn.Module) -> None:
    """Let a wrapper do what it does in each forward besides the forward.

    It sends buffers to other processes, and makes itself ready for the gradients.
    """
    if isinstance(model, DistributedDataParallel):
        module = model.module
        model.module = _Nothing()
        try:
            model()
        finally:
            model.module = module
