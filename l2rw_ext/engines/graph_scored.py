"""The weighted gradient through autograd's graph of the one training forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l2rw_ext import devices
from l2rw_ext.task.task import Task

from .base import Scored


class GraphScored(Scored):
    """Scores of an engine that keeps the graph; its one backward mixes all examples.

    Args:
        task: the step.
        losses: of the training batch, attached to the graph, shape (n,).
        scores: u, shape (n,), detached.
        clean_loss: mean clean loss, shape (), detached.
    """

    cannot_exclude = True

    def __init__(self, task: Task, losses: Tensor, scores: Tensor, clean_loss: Tensor) -> None:
        self._task = task
        self._attached = losses
        self.scores = scores
        self.losses = losses.detach()
        self.clean_loss = clean_loss

    def weighted_gradients(self, weights: Tensor | None) -> list[tuple[nn.Parameter, Tensor]]:
        """Step 13 of Algorithm 1."""
        if weights is None:
            seeds = torch.zeros_like(self._attached)
        else:
            seeds = weights.to(self._attached.dtype)
        parameters = self._task.parameters
        gradients = torch.autograd.grad(
            self._attached, parameters, self._task.scaled(seeds), allow_unused=True
        )
        pairs = zip(parameters, gradients, strict=True)
        return [(p, g) for p, g in pairs if g is not None]


CANNOT_LEAVE_OUT = (
    "are not finite; this engine mixes examples in one backward and cannot leave them out"
)


def check_finite(values: Tensor, what: str) -> None:
    """Raise if some of the training examples' values are not finite.

    Raises:
        ValueError: names the first few examples.
    """
    finite = values.isfinite()
    if finite.all():
        return
    bad = (~finite).nonzero().flatten().tolist()
    raise ValueError(f"training batch: {what} of examples {bad[:8]} {CANNOT_LEAVE_OUT}")


def check_scores(task: Task, scores: Tensor) -> None:
    """Raise if some scores are not finite though others are, as :func:`check_finite` does.

    If no score is finite, the clean loss is the reason. Under a loss scale an overflow is left to
    the gradient scaler.
    """
    if task.loss_scale is None and scores.isfinite().any():
        check_finite(scores, "gradients")


def check_readable(task: Task, losses: Tensor, scores: Tensor | None = None) -> None:
    """Check values that the host can read; else the weighing calls ``is_contaminated``."""
    if devices.readable(losses):
        check_finite(losses.detach(), "losses")
        if scores is not None:
            check_scores(task, scores)


def is_contaminated(task: Task, losses: Tensor, scores: Tensor) -> Tensor:
    """Whether one of the checks above would raise, shape (); no value is read."""
    found = ~losses.isfinite().all()
    if task.loss_scale is None:
        finite = scores.isfinite()
        found = found | (finite.any() & ~finite.all())
    return found
