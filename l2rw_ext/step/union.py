"""From the scores of one rank to weights normalised over the examples of all ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from l2rw_ext import devices
from l2rw_ext.data.batch import tensors
from l2rw_ext.distributed.group import Processes

from .weighing import Computed, Rules, weigh

_SAME_LOSS = 1e-4
"""How far mean losses of one clean batch may be off each other on ranks that computed it alike."""
_SAME_BATCH = 1e-9
"""How far sums over one clean batch may be off on processors that add in other orders."""


@dataclass(frozen=True)
class Alike:
    """What has to be the same on all ranks and is compared with the scores.

    Args:
        loss_scale: the factor of a gradient scaler, shape (); None if there is none.
        clean: the clean batch, if it was said to be the same on all ranks.
    """

    loss_scale: Tensor | None
    clean: Any = None

    @property
    def numbers(self) -> list[Tensor]:
        """The scale, and a number that other clean batches do not have; shape () each."""
        scale = torch.ones(()) if self.loss_scale is None else self.loss_scale
        if self.clean is None:
            return [scale]
        return [scale, torch.stack([_fingerprint(x) for x in tensors(self.clean)]).sum()]

    def checked(
        self, clean_losses: Tensor, scales: Tensor, fingerprints: Tensor | None = None
    ) -> Tensor:
        """The mean clean loss of all ranks, shape (); not a number if something differs.

        Args:
            clean_losses: the mean clean loss that each rank has, shape (ranks,).
            scales: the scale of each rank, shape (ranks,).
            fingerprints: the number of each rank's clean batch, shape (ranks,).

        Raises:
            ValueError: something differs, and the host need not wait to know.
        """
        found = clean_losses.max()
        differs = scales.max() != scales.min()
        if devices.synchronous(differs) and differs:
            raise ValueError(f"grad_scaler: the scales of the ranks are {scales.tolist()}")
        if fingerprints is not None:
            off = found - clean_losses.min() > _SAME_LOSS * found.abs()
            off = off | (fingerprints.max() - fingerprints.min() > _SAME_BATCH)
            if devices.synchronous(off) and off:
                raise ValueError(
                    "replicated_clean=True, but the clean batches of the ranks are not the same, "
                    "or the model draws random numbers, as in dropout; their mean losses are "
                    f"{clean_losses.tolist()}. Leave replicated_clean off"
                )
            differs = differs | off
        return found.masked_fill(differs, float("nan"))


def _fingerprint(x: Tensor) -> Tensor:
    """A sum over a tensor, relative to that of its magnitudes, shape ()."""
    x = x.to_dense() if x.layout != torch.strided else x
    x = torch.view_as_real(x) if x.is_complex() else x
    x = x.double()
    return x.sum() / x.abs().sum().clamp(min=1e-300)


def united(
    processes: Processes,
    computed: Computed,
    told: list[list[float]],
    index: Tensor | None,
    alike: Alike,
    rules: Rules,
    *,
    scaled: bool,
) -> Computed:
    """The step on the examples of all ranks, with this rank's examples, weights and gradient.

    A gradient that is there was formed with weights that sum to one over this rank's examples, or
    are all zero; so it is multiplied by the sum of their final weights. The sum over all ranks is
    then that of one process.

    Args:
        processes: all of which call this in the same step.
        computed: what this rank has computed.
        told: what :func:`about` says, by rank.
        index: the numbers of this rank's examples, shape (n,); None on all ranks or on none.
        alike: what has to be the same on all ranks.
        rules: how scores become weights.
        scaled: whether there is a loss scale.

    Raises:
        TypeError: losses have other dtypes on other ranks.
        ValueError: something is not the same on all ranks; or see
            :func:`~l2rw_ext.step.weighing.weigh`, for all ranks alike.
    """
    step = computed.step
    n = [int(count) for count, *_ in told]
    check_dtypes(processes, [dtype for *_, dtype in told])
    single = torch.stack(
        [x.to(step.scores.device, torch.float64) for x in (step._clean_loss, *alike.numbers)]
    )
    rows = [step.scores.double(), step.losses.double()]
    if step.mask is not None:
        rows.append(step.mask.double())
    own = torch.cat([*(x.flatten() for x in rows), single])
    parts = processes.gather(own, [len(rows) * count + single.numel() for count in n])
    scores, losses, *masks = (
        torch.cat([part[k * count : (k + 1) * count] for part, count in zip(parts, n, strict=True)])
        for k in range(len(rows))
    )
    clean_losses, *numbers = torch.stack([part[-single.numel() :] for part in parts]).T
    # That of a sum over ranks is the same on all, but for its dtype where there is no clean batch.
    clean_loss = alike.checked(clean_losses, *numbers)
    union = weigh(
        scores.to(step.scores.dtype),
        losses.to(step.losses.dtype),
        clean_loss.to(step._clean_loss.dtype),
        step.engine,
        rules,
        mask=masks[0] != 0 if masks else None,
        mixes=any(mixes for _, mixes, _ in told),
        scaled=scaled,
    )
    weights = union.step.weights.split(n)[processes.rank].view(step.scores.shape)
    union.gradients = computed.gradients
    union.factor = weights.sum()
    union.step = replace(step, weights=weights, _union=union.step)
    union.plan = computed.plan
    if index is not None:
        union.index = torch.cat(processes.gather(index.cpu(), n))
    return union


def about(computed: Computed) -> tuple[float, ...]:
    """What the other ranks have to know.

    These are the number of examples, whether an engine mixes, and the dtypes of what is gathered.
    """
    step = computed.step
    mixes = step._contaminated is not None
    return step.scores.numel(), mixes, dtypes_of(step.scores, step.losses, step.mask)


def dtypes_of(*tensors: Tensor | None) -> int:
    """A number for the dtypes of tensors."""
    return zlib.crc32(" ".join("" if x is None else str(x.dtype) for x in tensors).encode())


def check_dtypes(processes: Processes, dtypes: Iterable[float]) -> None:
    """Check that scores and losses have the same dtypes on all ranks.

    Args:
        processes: all of which call this at the same time.
        dtypes: what :func:`dtypes_of` says, by rank.

    Raises:
        TypeError: they have not, so that ranks would weigh the union by other roundings; or some
            have a mask and others none.
    """
    if len(set(dtypes)) > 1:
        processes.fail(
            TypeError(
                "training batch: the losses of the ranks have not all the same dtype, or not all "
                "have a mask"
            )
        )
