"""Steps on a model in DistributedDataParallel.

The wrapper runs each step as its forward, around a module that is the step, and sees in its output
a graph that leads to the parameters with finished gradients. So buckets, communication hooks,
buffers, ``no_sync`` and the search for unused parameters work as in plain training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from l2rw_ext.errors import NotExactError
from l2rw_ext.tracing.members import Members

from .group import Processes


class _Step(nn.Module):
    """Takes the place of the module in the wrapper while a step runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.instead_of = (module,)  # in a tuple, so that it is not a child

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The buffers of the module, which the wrapper sends to the other ranks."""
        return self.instead_of[0].named_buffers(*args, **kwargs)

    def forward(self, step: Callable[[], Tensor | None]) -> Tensor | None:
        """Run the step, and return the node whose backward delivers its gradients."""
        return step()


def wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper around a whole model, which may be compiled."""
    compiled = getattr(model, "_orig_mod", model)
    return compiled if isinstance(compiled, DistributedDataParallel) else None


def inside(model: nn.Module) -> nn.Module:
    """The model in a wrapper, or the model itself.

    Raises:
        TypeError: the wrapper keeps copies of the parameters in another dtype.
    """
    wrapper = wrapper_of(model)
    if wrapper is None:
        return model
    if wrapper.mixed_precision is not None:
        raise TypeError(
            "DistributedDataParallel(mixed_precision=...) computes with copies of the parameters, "
            "which no engine supports; use torch.autocast"
        )
    module: nn.Module = wrapper.module
    return module.instead_of[0] if isinstance(module, _Step) else module


def check_wrappers(
    members: Members, wrapper: DistributedDataParallel | None, processes: Processes | None
) -> None:
    """Check that no more is shared between ranks than a step knows of.

    Args:
        members: of the model inside of the wrapper.
        wrapper: around the model, if there is one.
        processes: the ranks that the step spans.

    Raises:
        TypeError, RuntimeError, ValueError: the wrapper, or one inside of the model, is used in a
            way that a step over several processes cannot follow.
        NotExactError: batch statistics are those of all ranks.
    """
    for name, module in members.modules:
        if isinstance(module, nn.SyncBatchNorm) and module.training and _shared(module):
            raise NotExactError(
                f"SyncBatchNorm {name!r} in train mode shares statistics between ranks, which no "
                "engine differentiates; use BatchNorm, whose statistics are those of each rank"
            )
        if processes is not None and isinstance(module, DistributedDataParallel):
            raise TypeError(
                f"DistributedDataParallel {name!r} is inside of the model; wrap the whole model, "
                "or give process_group=None for a step of each process alone"
            )
    if processes is None or wrapper is None:
        return
    if wrapper._join_config.enable:
        raise RuntimeError(
            "Join does not know the collectives of a reweighted step; let all ranks make the same "
            "number of steps"
        )
    others = set(dist.get_process_group_ranks(processes.group))
    if not others.issubset(dist.get_process_group_ranks(wrapper.process_group)):
        raise ValueError(
            "process_group: DistributedDataParallel does not average gradients over all of its "
            "ranks; leave process_group='auto'"
        )
    ignored = wrapper.parameters_to_ignore
    for name, p in members.parameters:
        if p.requires_grad and name in ignored:
            raise TypeError(
                f"DistributedDataParallel ignores parameter {name!r}, so that it may be another "
                "one on each rank; give process_group=None for a step of each process alone"
            )
    trained = [
        p
        for name, p in wrapper.module.named_parameters()
        if p.requires_grad and name not in ignored
    ]
    known = wrapper._get_ddp_logging_data()
    counts = len(trained), sum(p.numel() * p.element_size() for p in trained)
    held = set(map(id, wrapper._module_parameters))
    if (known["num_parameter_tensors"], known["total_parameter_size_bytes"]) != counts or any(
        id(p) not in held for p in trained
    ):
        raise TypeError(
            "DistributedDataParallel was made when other parameters were trained, or of another "
            "dtype, and does not average the present ones; wrap the model again"
        )


def _shared(module: nn.SyncBatchNorm) -> bool:
    """Whether the layer has statistics of more than one rank."""
    return dist.is_initialized() and dist.get_world_size(module.process_group) > 1


def forget_forwards(wrapper: DistributedDataParallel) -> None:
    """Let the next forward send buffers, as after a step that has ended.

    If a micro-batch failed, it has begun on some ranks and ended on others, so that they would
    disagree on whether buffers have been sent.
    """
    wrapper.require_forward_param_sync = True


def as_forward(
    wrapper: DistributedDataParallel, step: Callable[[], Tensor | None]
) -> Tensor | None:
    """Run a step as the wrapper's forward, and return the output."""
    module = wrapper.module
    wrapper.module = _Step(module)
    try:
        output: Tensor | None = wrapper(step)  # it fails without any input where it moves inputs
    finally:
        wrapper.module = module
    return output
