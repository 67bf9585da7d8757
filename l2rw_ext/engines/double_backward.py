"""Algorithm 1 as printed: a backward through a backward, for anything twice differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from l2rw_ext import reference
from l2rw_ext.errors import NotExactError
from l2rw_ext.task.clean_gradient import Direction, clean_direction
from l2rw_ext.task.isolation import Buffers, Snapshot
from l2rw_ext.task.task import Task, require_grad

from .base import Engine, Scored
from .corrected import Corrected
from .explanation import Explanation
from .graph_scored import GraphScored, check_readable


class DoubleBackward(Engine):
    """Steps 4-13 of Algorithm 1; the look-ahead step has α = 1, which cancels in Eq. 9.

    At ε = 0 the look-ahead θ̂ equals θ, so the clean gradient of step 9 is taken at the model's
    parameters themselves: a loss function that holds a parameter by reference is then
    differentiated too. Attention runs on the math kernel, because the fused kernels have no second
    derivative. Functions whose second derivative is wrong in torch run as corrections.
    """

    name = "double_backward"

    def score(self, task: Task, snapshot: Snapshot, direction: Direction | None = None) -> Scored:
        """Scores by Eq. 4-7; see :class:`Engine`."""
        with sdpa_kernel(SDPBackend.MATH):
            with Corrected():
                losses = task.forward_train()
            snapshot.trained = Buffers.of(task.model)
            require_grad(losses)
            check_readable(task, losses)
            epsilon = torch.zeros(
                losses.shape,
                dtype=torch.promote_types(losses.dtype, torch.float32),
                device=losses.device,
                requires_grad=True,
            )
            stepped = list(reference.look_ahead(task.model, losses, task.scaled(epsilon)).values())
            if direction is None:
                snapshot.buffers.restore()
                direction = clean_direction(task, snapshot)
                snapshot.restore_trained()
            values = [direction.values.get(id(p)) for p in task.parameters]
            moved = [(p, v) for p, v in zip(stepped, values, strict=True) if v is not None]
            gradient = None
            if moved:
                gradient = _second(moved, epsilon)
        scores = torch.zeros_like(epsilon) if gradient is None else -task.unscaled(gradient)
        check_readable(task, losses, scores)
        return GraphScored(task, losses, scores.detach(), direction.clean_loss)

    def explain(
        self, task: Task, snapshot: Snapshot, direction: Direction | None = None
    ) -> Explanation:
        """See :class:`Engine`."""
        clean = "a clean forward and backward, " if direction is None else ""
        passes = f"a training forward, a backward with graph, {clean}a backward through it"
        return Explanation.of_graph(
            self.name, task, "works for anything twice differentiable", passes, forwards=10
        )


def _second(moved: list[tuple[Tensor, Tensor]], epsilon: Tensor) -> Tensor | None:
    """The derivative in ε of Σ <θ̂, v>.

    Raises:
        NotExactError: torch has no second derivative of some operation.
    """
    try:
        (gradient,) = torch.autograd.grad(
            [p for p, _ in moved],
            epsilon,
            [v for _, v in moved],
            allow_unused=True,
            retain_graph=True,
        )
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        raise NotExactError(
            f"torch lacks a second derivative: {str(error).splitlines()[0]}"
        ) from error
    return gradient
