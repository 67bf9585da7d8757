"""From the scores of one rank to weights normalised over the examples of all ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
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
        TypeError: losses have other dtypes on other ranks.
        ValueError: the clean batches were said to be the same on all ranks and are not; or see
            :func:`~l2rw_ext.step.weighing.weigh`, for all ranks alike.
    """
    step = computed.step
    n = [int(count) for count, *_ in told]
    check_dtypes(processes, [dtype for *_, dtype in told])
    own = torch.cat([x.double() for x in (step.scores, step.losses, step._clean_loss[None])])
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
        mixes=any(mixes for _, mixes, _ in told),
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
    """What the other ranks have to know.

    These are the number of examples, whether an engine mixes, and the dtypes of what is gathered.
    """
    step = computed.step
    mixes = step._contaminated is not None
    return step.scores.numel(), mixes, dtypes_of(step.scores, step.losses)


def dtypes_of(*tensors: Tensor) -> int:
    """A number for the dtypes of tensors."""
    return zlib.crc32(" ".join(str(x.dtype) for x in tensors).encode())


def check_dtypes(processes: Processes, dtypes: Iterable[float]) -> None:
    """Check that scores and losses have the same dtypes on all ranks.

    Args:
        processes: all of which call this at the same time.
        dtypes: what :func:`dtypes_of` says, by rank.

    Raises:
        TypeError: they have not, so that ranks would weigh the union by other roundings.
    """
    if len(set(dtypes)) > 1:
        processes.fail(
            TypeError("training batch: the losses of the ranks have not all the same dtype")
        )


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
