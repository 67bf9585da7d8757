"""Algorithm 1 as printed: a backward through a backward, for anything twice differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from l2rw_ext import reference
from l2rw_ext.errors import NotExactError
from l2rw_ext.layers import corrections
from l2rw_ext.task.isolation import Snapshot
from l2rw_ext.task.task import Direction, Task, check_losses
from l2rw_ext.tracing.fast_path import StepMode
from l2rw_ext.tracing.graph import nodes_from

from .base import Engine, GraphScored, Scored
from .explanation import Explanation
from .proof import Proofs


class DoubleBackward(Engine):
    """Steps 4-13 of Algorithm 1; the look-ahead step has α = 1, which cancels in Eq. 9.

    At ε = 0 the look-ahead θ̂ equals θ, so the clean gradient of step 9 is taken at the model's
    parameters themselves: a loss function that holds a parameter by reference is then
    differentiated too. Attention runs on the math kernel, because the fused kernels have no second
    derivative. Functions whose second derivative is wrong in torch run as corrections.
    """

    name = "double_backward"

    def __init__(self) -> None:
        self._proofs = Proofs()

    def score(self, task: Task, snapshot: Snapshot, direction: Direction | None = None) -> Scored:
        """Scores by Eq. 4-7; see :class:`Engine`."""
        return self._proofs.along(task, snapshot, direction, _score)


def _score(task: Task, snapshot: Snapshot, direction: Direction, given: bool) -> Scored:
    with sdpa_kernel(SDPBackend.MATH):
        with _Corrected():
            losses = task.forward_train()
        snapshot.keep_trained()
        check_losses(losses, task)
        epsilon = torch.zeros(
            losses.shape,
            dtype=torch.promote_types(losses.dtype, torch.float32),
            device=losses.device,
            requires_grad=True,
        )
        stepped = reference.look_ahead(task.parameters, losses, task.scaled(epsilon))
        values = [direction.values.get(id(p)) for p in task.parameters]
        moved = [(p, v) for p, v in zip(stepped, values, strict=True) if v is not None]
        gradient = _second(moved, epsilon) if moved else None
    scores = torch.zeros_like(epsilon) if gradient is None else -task.unscaled(gradient)
    explanation = Explanation.of_graph(
        DoubleBackward.name,
        task,
        "works for anything twice differentiable",
        "a training forward, a backward with graph, a backward through it",
        forwards=10,
        given=given,
    )
    return GraphScored(task, losses, scores.detach(), direction.clean_loss, explanation)


def _second(moved: list[tuple[Tensor, Tensor]], epsilon: Tensor) -> Tensor | None:
    """The derivative in ε of Σ <θ̂, v>.

    Raises:
        NotExactError: a custom function has no second derivative.
    """
    seen: set[Any] = set()
    for p, _ in moved:
        if any(node.name() == "torch::autograd::Error" for node in nodes_from(p, seen)):
            # No path from ε leads to its node, so that torch would leave its part out silently.
            raise NotExactError(
                "the backward of a custom autograd function is marked once_differentiable"
            )
    (gradient,) = torch.autograd.grad(
        [p for p, _ in moved],
        epsilon,
        [v for _, v in moved],
        allow_unused=True,
        retain_graph=True,
    )
    return gradient


_REPLACED: dict[Any, Callable[..., Any]] = {
    F.prelu: corrections.prelu,
    Tensor.prelu: corrections.prelu,
    F.layer_norm: corrections.layer_norm,
}


class _Corrected(StepMode):
    """Replaces functions whose second derivative is wrong in torch by their corrections."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        replaced = _REPLACED.get(func)
        if replaced is not None:
            return replaced(*args, **kwargs)
        if func is F.embedding and kwargs.get("scale_grad_by_freq", len(args) > 5 and args[5]):
            raise NotExactError(
                "embedding with scale_grad_by_freq divides gradients by counts over the whole "
                "batch, which no second derivative knows"
            )
        return func(*args, **kwargs)
