"""Finished gradients: what replaces them, what other ranks add, and how they get to ``p.grad``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext import devices
from l2rw_ext.distributed.group import Processes
from l2rw_ext.distributed.sums import Sums

Gradients = list[tuple[nn.Parameter, Tensor]]


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


def node_of(gradients: Gradients) -> Tensor | None:
    """A scalar whose backward adds each gradient to its parameter's ``grad``, firing hooks.

    The list is emptied, so that a parameter without a ``grad`` takes the tensor over uncopied. The
    result is None if it was empty.
    """
    parameters = [p for p, _ in gradients]
    box = [g for _, g in gradients]
    gradients.clear()
    return _AccumulateGrad.apply(box, *parameters) if parameters else None


def filled_if(condition: Tensor | None, gradients: Gradients, value: float) -> Gradients:
    """The gradients, or ``value`` in each place if the condition, shape (), holds.

    The host does not read the condition. None stands for one that does not hold.
    """
    if condition is None:
        return gradients
    return [(p, _filled_if(condition, g, value)) for p, g in gradients]


def _filled_if(condition: Tensor, g: Tensor, value: float) -> Tensor:
    if not g.is_sparse:
        return g.masked_fill(condition, value)
    values = g._values().masked_fill(condition, value)
    return torch.sparse_coo_tensor(g._indices(), values, g.shape, check_invariants=False)


def over_ranks(
    processes: Processes,
    averaged: nn.Module | None,
    parameters: Sequence[nn.Parameter],
    gradients: Gradients,
    factor: Tensor | None = None,
) -> Gradients:
    """What each rank is to deliver, so that each gets the sum over all of them.

    Args:
        processes: all of which call this in the same step.
        averaged: the module whose gradients a wrapper averages; other gradients are summed here.
        parameters: all that are trained.
        gradients: what this rank adds to the sum; the list is emptied.
        factor: by what they are still to be multiplied, shape ().
    """
    inside = set() if averaged is None else {id(p) for p in averaged.parameters()}
    delivered: Gradients = []
    own: dict[int, Tensor] = {}
    gradients.reverse()
    while gradients:
        p, g = gradients.pop()
        if id(p) in inside:
            delivered.append((p, _times(g, processes.size, factor)))
        else:
            own[id(p)] = _times(g, 1, factor)
    others = [p for p in parameters if id(p) not in inside]
    if others:
        reached = processes.any([id(p) in own for p in others])
        summed = [p for p, on_any_rank in zip(others, reached, strict=True) if on_any_rank]
        sums = Sums(processes, summed, own)
        delivered += [(p, sums[id(p)].to(p.dtype)) for p in summed]
    return delivered


def _times(g: Tensor, number: int, factor: Tensor | None) -> Tensor:
    """A gradient times both; zero where the factor is, whatever the gradient is."""
    if factor is None:
        return g * number
    if devices.synchronous(factor):
        return g * (float(factor) * number) if factor else torch.zeros_like(g)
    return _filled_if(factor == 0, g * (factor * number).to(g.dtype), 0)
