"""From scores to weights: Eq. 8-9, and the steps for which they give no usable weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from l2rw_ext import devices, ops
from l2rw_ext.engines.base import Scored
from l2rw_ext.engines.graph_scored import check_finite as refuse_nonfinite
from l2rw_ext.engines.graph_scored import check_scores, is_contaminated
from l2rw_ext.task.isolation import BelowAutograd
from l2rw_ext.task.task import Task

from .result import Step, clean_loss_error

Degenerate = Literal["zero", "uniform", "skip"]

Gradients = list[tuple[nn.Parameter, Tensor]]


@dataclass(frozen=True)
class Weighed:
    """The weights of one batch, and how its gradient is to be formed."""

    step: Step
    for_gradient: Tensor | None
    """Weights of the gradient, shape (n,); None where all are zero."""
    uniform: bool
    """Whether no score was positive and equal weights are used instead."""
    skip: bool
    """Whether no score was positive and no gradient is to be accumulated."""
    excluded: Tensor | None
    """Examples left out because their loss or score is not finite, shape (n,); None for none."""
    overflow: Tensor | None
    """Whether gradients overflowed under a loss scale, shape (); None if that was not checked."""
    contaminated: Tensor | None
    """Whether values that are not finite reached every example through one backward, shape ()."""

    @property
    def rectified(self) -> Tensor:
        """Eq. 8: max(u, 0), zero where excluded, shape (n,)."""
        scores = self.step.scores
        if self.excluded is not None:
            scores = scores.masked_fill(self.excluded, 0)
        return scores.clamp(min=0)

    @property
    def kept(self) -> Tensor:
        """One for each example that is not excluded, shape (n,)."""
        if self.excluded is None:
            return torch.ones_like(self.step.scores)
        return (~self.excluded).to(self.step.scores.dtype)


def weigh(
    task: Task, scored: Scored, engine: str, *, on_degenerate: Degenerate, check_finite: bool
) -> Weighed:
    """Eq. 8-9 of the scores.

    On CUDA nothing here waits for the device, unless ``check_finite`` or an ``on_degenerate`` other
    than "zero" needs a decision.

    Raises:
        ValueError: the clean loss is not finite, or no score is although the losses are.
    """
    clean_loss, losses, scores = scored.clean_loss, scored.losses, scored.scores
    readable = devices.readable(clean_loss)
    deferred = not readable and not check_finite
    if not deferred and not math.isfinite(clean_loss.item()):
        raise clean_loss_error(clean_loss)
    if scored.cannot_exclude and check_finite and not readable:
        refuse_nonfinite(losses, "losses")
        check_scores(task, scores)
    with BelowAutograd():
        overflow = contaminated = None
        if not deferred and math.isfinite((losses.sum() + scores.sum()).item()):
            excluded = None
            weights = ops.normalize_weights(scores)
        else:
            excluded = ~(losses.isfinite() & scores.isfinite())
            if task.loss_scale is not None:
                overflow = (excluded & losses.isfinite()).any()
            elif not deferred and bool((excluded & losses.isfinite()).all()):
                raise ValueError(
                    "no score is finite, although the losses are: the gradient of the clean "
                    "loss overflowed. No gradient was accumulated"
                )
            if scored.cannot_exclude and deferred:
                contaminated = is_contaminated(task, losses, scores)
                excluded = excluded | contaminated
            weights = ops.normalize_weights(scores.masked_fill(excluded, 0))
        if deferred:
            weights = weights.where(clean_loss.isfinite(), torch.zeros_like(weights))
        for_gradient: Tensor | None = weights
        uniform = skip = False
        waits = on_degenerate != "zero" or readable
        if waits and not weights.any():
            for_gradient = None
            skip = on_degenerate == "skip" and not (overflow is not None and bool(overflow))
            if on_degenerate == "uniform":
                kept = torch.ones_like(weights) if excluded is None else (~excluded)
                if kept.any():
                    weights = for_gradient = kept.to(weights.dtype) / kept.sum()
                    uniform = True
    step = Step(weights, scores, losses, engine, clean_loss, excluded, contaminated)
    return Weighed(step, for_gradient, uniform, skip, excluded, overflow, contaminated)


def zero_if(contaminated: Tensor | None, gradients: Gradients) -> Gradients:
    """The gradients, set to zero if examples that are not finite contaminated them."""
    if contaminated is None:
        return gradients
    return [
        (
            p,
            torch.sparse_coo_tensor(g._indices(), g._values().masked_fill(contaminated, 0), g.shape)
            if g.is_sparse
            else g.masked_fill(contaminated, 0),
        )
        for p, g in gradients
    ]


def infinite_if(overflow: Tensor | None, gradients: Gradients) -> Gradients:
    """The gradients, infinite if some overflowed, so that a gradient scaler skips its step."""
    if overflow is None:
        return gradients
    return [
        # ``masked_fill`` takes no sparse gradient; dividing by zero also gives no finite number.
        (p, g / (~overflow).to(g.dtype))
        if g.is_sparse
        else (p, g.masked_fill(overflow, float("inf")))
        for p, g in gradients
    ]
