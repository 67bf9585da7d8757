"""From the scores of one rank to weights normalised over the examples of all ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from l2rw_ext import devices
from l2rw_ext.distributed.group import Processes

from .weighing import Computed, Degenerate, weigh

_SAME = 1e-4
"""How far mean losses of one clean batch may be off each other on ranks that computed it alike."""


def united(
    processes: Processes,
    computed: Computed,
    told: list[list[float]],
    index: Tensor | None,
    on_degenerate: Degenerate,
    check_finite: bool,
    *,
    scaled: bool,
    replicated_clean: bool,
) -> Computed:
    """The step on the examples of all ranks, with this rank's examples, weights and gradient.

    The gradient was formed with weights that sum to one over this rank's examples, or are all zero;
    so it is multiplied by the sum of their final weights. The sum over all ranks is then that of
    one process.

    Args:
        processes: all of which call this in the same step.
        computed: what this rank has computed.
        told: what :func:`about` says, by rank.
        index: the numbers of this rank's examples, shape (n,); None on all ranks or on none.
        on_degenerate: see :class:`~l2rw_ext.Reweighter`.
        check_finite: see :class:`~l2rw_ext.Reweighter`.
        scaled: whether there is a loss scale.
        replicated_clean: see :class:`~l2rw_ext.Reweighter`.

    Raises:
        ValueError: the clean batches were said to be the same on all ranks and are not; or see
            :func:`~l2rw_ext.step.weighing.weigh`, for all ranks alike.
    """
    step = computed.step
    n = [int(count) for count, *_ in told]
    dtype = torch.promote_types(step.scores.dtype, step.losses.dtype)
    own = torch.cat(
        [step.scores.to(dtype), step.losses.to(dtype), step._clean_loss.to(dtype)[None]]
    )
    parts = processes.gather(own, [2 * count + 1 for count in n])
    scores = torch.cat([part[:count] for part, count in zip(parts, n, strict=True)])
    losses = torch.cat([part[count:-1] for part, count in zip(parts, n, strict=True)])
    clean_losses = torch.stack([part[-1] for part in parts])
    # That of a sum over ranks is the same on all, but for its dtype where there is no clean batch.
    clean_loss = _agreed(clean_losses) if replicated_clean else clean_losses.max()
    union = weigh(
        scores.to(step.scores.dtype),
        losses.to(step.losses.dtype),
        clean_loss.to(step._clean_loss.dtype),
        step.engine,
        on_degenerate,
        check_finite,
        mixes=any(mixes for _, mixes in told),
        scaled=scaled,
    )
    weights = union.step.weights.split(n)[processes.rank]
    union.total = (union.kept if union.uniform else union.rectified).sum()
    union.gradients = computed.gradients
    union.factor = weights.sum()
    union.step = replace(step, weights=weights, _union=union.step)
    union.plan = computed.plan
    if index is not None:
        union.index = torch.cat(processes.gather(index.to(scores.device), n))
    return union


def about(computed: Computed) -> tuple[float, ...]:
    """What the other ranks have to know: the number of examples, and whether an engine mixes."""
    return computed.step.scores.numel(), computed.step._contaminated is not None


def _agreed(clean_losses: Tensor) -> Tensor:
    """The mean clean loss, of which every rank has one; not a number if they are not the same.

    Raises:
        ValueError: they are not, and the host need not wait to know.
    """
    largest = clean_losses.max()
    differ = largest - clean_losses.min() > _SAME * largest.abs()
    if devices.synchronous(differ) and differ:
        raise ValueError(
            "replicated_clean=True, but the mean clean losses of the ranks are "
            f"{clean_losses.tolist()}: their clean batches are not the same, or the model draws "
            "random numbers, as in dropout; leave replicated_clean off"
        )
    return largest.masked_fill(differ, float("nan"))
