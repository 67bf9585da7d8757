"""The direction v: the gradient of the mean clean loss, by a plain backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .isolation import Snapshot
from .task import Task


@dataclass(frozen=True)
class Direction:
    """v, the gradient of the mean clean loss, possibly changed by an option."""

    values: dict[int, Tensor]
    """v by id of the parameter, in its shape, without the loss scale; absent if it is zero."""
    clean_loss: Tensor
    """The mean clean loss, shape (), detached."""


def clean_direction(task: Task, snapshot: Snapshot) -> Direction:
    """Compute v from one forward and backward of the clean batch, and restore the buffers.

    If no parameter reaches the clean loss, the direction is zero.
    """
    losses = task.forward_clean()
    values = {}
    if losses.requires_grad:
        seed = task.scaled(torch.full_like(losses, 1 / task.m))
        gradients = torch.autograd.grad(losses, task.parameters, seed, allow_unused=True)
        values = {
            id(p): task.unscaled(g.to_dense() if g.is_sparse else g)
            for p, g in zip(task.parameters, gradients, strict=True)
            if g is not None
        }
    snapshot.buffers.restore()
    return Direction(values, losses.detach().mean())
