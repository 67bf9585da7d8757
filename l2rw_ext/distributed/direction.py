"""The direction of all ranks' clean batches: v = Σ_r m_r v_r / Σ_r m_r."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from l2rw_ext import devices
from l2rw_ext.task.task import Direction, Task, check_clean_loss

from .group import Processes
from .sums import Sums


def union_direction(
    processes: Processes, task: Task, of_clean_batch: Callable[[], Direction]
) -> Direction:
    """The direction of the union of all ranks' clean batches, which arrives in the background.

    Args:
        processes: all of which call this in the same step.
        task: the step; a rank that has no clean batch takes part with none.
        of_clean_batch: computes the direction of this rank's clean batch.
    """
    with processes.owing(lambda: _sums(processes, task, None)):
        own = None if task.clean_size is None else of_clean_batch()
        if own is not None and devices.synchronous(own.clean_loss) and own.count != 0:
            check_clean_loss(own.clean_loss)  # while it is known whose it is
    return _sums(processes, task, own)


def _sums(processes: Processes, task: Task, own: Direction | None) -> Direction:
    """Add up over ranks what this one has, which is nothing without a direction."""
    m: int | Tensor = 0
    if own is not None:
        m = task.m if own.count is None else own.count
    device = task.parameters[0].device
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    if own is not None:
        counts[0] = m
        counts[1] = m * own.clean_loss
        if own.count is not None:
            counts[1].masked_fill_(own.count == 0, 0)
    work = dist.all_reduce(counts, group=processes.group, async_op=True)
    values = Sums(processes, task.parameters, {} if own is None else own.values, m)
    work.wait()
    values.divisor = counts[0].clamp(min=1)  # there is none, if a rank failed that had them all
    dtype = task.parameters[0].dtype if own is None else own.clean_loss.dtype
    return Direction(values, (counts[1] / counts[0]).to(dtype))


def said_of(processes: Processes, *, replicated_clean: bool) -> str:
    """How many ranks there are and how they get the direction, for ``explain()``."""
    how = (
        "replicated_clean=True, so that nothing is sent for the direction"
        if replicated_clean
        else "the directions of their clean batches are added up, in a merged backward or "
        "during the training forward"
    )
    return f"process_group: {processes.size} ranks are weighed together; {how}"
