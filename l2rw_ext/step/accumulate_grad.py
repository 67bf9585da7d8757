"""Adding gradients to ``p.grad`` the way autograd does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _AccumulateGrad(torch.autograd.Function):
    """A node whose backward gives finished gradients to the parameters' accumulators.

    The gradients go through autograd, so that tensor hooks and post-accumulate hooks fire. They go
    through a Function and not through ``torch.autograd.backward(params, grads)``, because there the
    caller's references make every accumulator copy the gradient it could have kept.
    """

    @staticmethod
    def forward(ctx: Any, box: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.box = box
        # On the device of the gradients: autograd then knows the stream they were computed on.
        return torch.empty((), device=box[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = tuple(ctx.box)
        ctx.box.clear()
        return (None, *gradients)


def accumulate_grad(gradients: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Add each gradient to its parameter's ``grad``, firing the parameter's hooks.

    The list is emptied, so that a parameter without a ``grad`` takes the tensor over uncopied.
    """
    parameters = [p for p, _ in gradients]
    box = [g for _, g in gradients]
    gradients.clear()
    if parameters:
        node = _AccumulateGrad.apply(box, *parameters)
        torch.autograd.backward(node, torch.ones_like(node))
