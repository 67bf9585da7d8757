"""A parameter that meets data by broadcasting: x + p, x * p, a class token put in front.

The parameter is expanded to the shape in which it meets the data, and autograd differentiates the
operation itself. The gradient that arrives at the expanded parameter, summed over all dimensions
but the example's, is the per-example gradient. One mechanism serves every elementwise operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import accumulation_dtype

from .base import Layer, Roots, RowMap, Use
from .costs import Cost, Size, rates_of


class _BroadcastUse(torch.autograd.Function):
    """p.expand(shape)."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, use: Use) -> Tensor:
        ctx.use = use
        assert use.weight is not None
        return use.weight.detach().expand(use.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:
        use: Use = ctx.use
        assert use.sink is not None
        with use.sink.backward_of(use):
            use.sink.report(use, g, g)
        return None, None


class Broadcast(Layer):
    """y = p in the shape ``options`` of the data; always per example.

    It reads nothing of its input.
    """

    name = "broadcast"
    reduces = True

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: torch.Size
    ) -> Tensor:
        """The parameter in the shape of the data."""
        assert weight is not None
        return weight.expand(options)

    def term_transpose(self, g: Tensor, x: Tensor, like: Roots, options: torch.Size) -> Roots:
        """Σ g over the dimensions that p was expanded along."""
        assert like[0] is not None
        return g.to(accumulation_dtype(g.dtype)).sum_to_size(like[0].shape), None

    def data_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None, options: Any) -> Tensor:
        """Zero."""
        return torch.zeros_like(x)

    def run(self, use: Use, x: Tensor, token: Tensor) -> Tensor:
        """The expanded parameter; the root x is not data."""
        use.shape = tuple(use.options)
        out: Tensor = _BroadcastUse.apply(token, use)
        return out

    def leading(self, use: Use, g: Tensor) -> int:
        """All dimensions: the example is one of those that p was expanded along."""
        return g.dim()

    def maps(self, use: Use, g: Tensor, size: int) -> Iterator[RowMap]:
        """The row maps whose example is a dimension that p was expanded along, or a part of one.

        It is a part of one if several rows (windows of an image) belong to each example.
        """
        along = [d for d, own in enumerate(_aligned(use, g)) if own == 1]
        exact = [d for d in along if g.shape[d] == size]
        for axis in exact or [d for d in along if size and g.shape[d] % size == 0 < g.shape[d]]:
            after = math.prod(g.shape[axis + 1 :])
            each = g.shape[axis] // size
            for inner in dict.fromkeys((each, 1)):
                yield RowMap(g.numel() // (size * inner * after), size, inner * after)

    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """Per-example gradients (N, p.numel()); z is not used and is the same tensor."""
        aligned = _aligned(use, g)
        axis = None
        if not rows.whole:
            g, aligned, axis = _split_axis(g, aligned, rows)
        reduced = [d for d in range(g.dim()) if d != axis and aligned[d] == 1 and g.shape[d] != 1]
        if reduced:
            g = g.sum(reduced, keepdim=True, dtype=accumulation_dtype(g.dtype))
        g = g.reshape(1, -1) if axis is None else g.movedim(axis, 0).reshape(rows.size, -1)
        return g, g

    def costs(self, use: Use, size: Size) -> dict[str, Cost]:
        """One pass over g."""
        assert use.weight is not None
        speed = rates_of(use.weight)
        elements = math.prod(use.shape)
        width = use.weight.numel()
        item = use.weight.element_size()
        return {
            "per example": Cost(
                elements, 0.5 * size.n * width, size.n * width * item, elements * item / speed.bytes
            )
        }

    def direction(self, use: Use, z: Tensor, g: Tensor) -> Roots:
        """The sum over the clean examples."""
        return g.sum(0, dtype=accumulation_dtype(g.dtype)), None

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = <V, G_i>."""
        V, _ = direction
        assert V is not None
        return g.to(V.dtype) @ V.reshape(-1)

    def weighted_gradient(self, use: Use, z: Tensor, g: Tensor, weights: Tensor) -> Roots:
        """Σ w_i G_i, rows with w = 0 left out."""
        return ops.weighted_sum(g, weights), None


def _aligned(use: Use, g: Tensor) -> list[int]:
    """The parameter's shape with leading ones, one size for each dimension of g."""
    assert use.weight is not None
    return [1] * (g.dim() - use.weight.dim()) + list(use.weight.shape)


def _split_axis(g: Tensor, aligned: list[int], rows: RowMap) -> tuple[Tensor, list[int], int]:
    """G with a separate dimension for the example, p's shape next to it, and that dimension."""
    after = 1
    for axis in reversed(range(g.dim())):
        size = g.shape[axis]
        inner, rest = rows.inner // after, rows.inner % after  # which symbols know, too
        if aligned[axis] == 1 and not rest and size and size % (rows.size * inner) == 0:
            split = [size // (rows.size * inner), rows.size, inner]
            shape = [*g.shape[:axis], *split, *g.shape[axis + 1 :]]
            return g.reshape(shape), [*aligned[:axis], 1, 1, 1, *aligned[axis + 1 :]], axis + 1
        after *= size
    raise AssertionError(f"{rows} is no map of a gradient of shape {tuple(g.shape)}")


BROADCAST = Broadcast()

FACTORS = {"mul", "rmul", "imul", "multiply", "pow", "lerp", "addcmul"}
"""Operations that hide one operand where another is zero."""
