"""The direction v: the gradient of the mean clean loss, by a plain backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .isolation import Snapshot
from .task import Task


@dataclass(frozen=True)
class Direction:
    """v, the gradient of the mean clean loss, or what an option makes of it."""

    values: dict[int, Tensor]
    """By id of the parameter, in its shape; absent where zero. Without the loss scale."""
    clean_loss: Tensor
    """The mean clean loss, shape (), detached."""


def clean_direction(task: Task, snapshot: Snapshot) -> Direction:
    """Get v of the clean batch from one forward and backward; buffers go back to the snapshot's.

    A clean loss that no parameter reaches has the direction zero.
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
