"""Algorithm 1 as printed: a backward through a backward, for anything twice differentiable."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import reference
from ..preserve import Buffers, Snapshot
from .base import Engine, Scored, Task, require_grad


class DoubleBackward(Engine):
    """Steps 4-13 of Algorithm 1; the look-ahead step has α = 1, which cancels in Eq. 9.

    At ε = 0 the look-ahead θ̂ equals θ, so the clean gradient of step 9 is taken at the model's own
    parameters: a loss function that holds one by reference is then differentiated too.
    Attention runs on the math kernel, because the fused ones have no second derivative.
    """

    name = "double_backward"

    def score(self, task: Task, snapshot: Snapshot) -> Scored:
        """Scores by Eq. 4-7; see :class:`Engine`."""
        with sdpa_kernel(SDPBackend.MATH):
            losses = task.forward_train()
            require_grad(losses)
            _check_finite(losses.detach(), "losses")
            after_training = Buffers.of(task.model)
            snapshot.buffers.restore()
            epsilon = torch.zeros(
                losses.shape,
                dtype=torch.promote_types(losses.dtype, torch.float32),
                device=losses.device,
                requires_grad=True,
            )
            stepped = list(reference.look_ahead(task.model, losses, epsilon).values())
            clean_loss = task.forward_clean().mean()
            after_training.restore()
            gradient = None
            if clean_loss.requires_grad:
                direction = torch.autograd.grad(clean_loss, task.parameters, allow_unused=True)
                moved = [(p, v) for p, v in zip(stepped, direction, strict=True) if v is not None]
                if moved:
                    (gradient,) = torch.autograd.grad(
                        [p for p, _ in moved],
                        epsilon,
                        [v for _, v in moved],
                        allow_unused=True,
                        retain_graph=True,
                    )
        scores = torch.zeros_like(epsilon) if gradient is None else -gradient
        if scores.isfinite().any():  # where none is, the clean loss is to blame
            _check_finite(scores, "gradients")
        return _Scored(task, losses, scores.detach(), clean_loss.detach())


def _check_finite(values: Tensor, what: str) -> None:
    finite = values.isfinite()
    if finite.all():
        return
    bad = (~finite).nonzero().flatten().tolist()
    raise ValueError(
        f"training batch: {what} of examples {bad[:8]} are not finite; this engine mixes examples "
        "in one backward and cannot leave them out"
    )


class _Scored(Scored):
    def __init__(self, task: Task, losses: Tensor, scores: Tensor, clean_loss: Tensor) -> None:
        self._parameters = task.parameters
        self._attached = losses
        self.scores = scores
        self.losses = losses.detach()
        self.clean_loss = clean_loss

    def weighted_gradients(self, weights: Tensor | None) -> list[tuple[nn.Parameter, Tensor]]:
        """Step 13 of Algorithm 1, through the graph of the one training forward."""
        if weights is None:
            seeds = torch.zeros_like(self._attached)
        else:
            seeds = weights.to(self._attached.dtype)
        gradients = torch.autograd.grad(
            self._attached, self._parameters, grad_outputs=seeds, allow_unused=True
        )
        pairs = zip(self._parameters, gradients, strict=True)
        return [(p, g) for p, g in pairs if g is not None]
