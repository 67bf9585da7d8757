"""Transposed convolutions in one, two and three dimensions.

y = Wᵀ * z spreads z where a convolution of y with W would gather: G_i of W is the weight gradient
of that convolution, whose input is g and whose output gradient is z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from . import rates
from .base import Cost, Roots, RowMap, Rule, Size, Use, accumulation_dtype, handles
from .convolution import numbers

if TYPE_CHECKING:
    from ..interception import Interception


@dataclass(frozen=True)
class Geometry:
    """Stride, padding, output padding, dilation and groups of a transposed convolution."""

    stride: list[int]
    padding: list[int]
    output_padding: list[int]
    dilation: list[int]
    groups: int


class _TransposedConvolutionUse(torch.autograd.Function):
    """y = Wᵀ * z + b; only the data gradient flows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, use: Use) -> Tensor:
        ctx.use = use
        weight = use.weight
        assert weight is not None
        ctx.save_for_backward(x, weight)
        geometry: Geometry = use.options
        return torch.convolution(
            x,
            weight,
            use.bias,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            True,
            geometry.output_padding,
            geometry.groups,
        )

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        use: Use = ctx.use
        assert use.sink is not None
        with use.sink.backward_of(use):
            use.sink.report(use, x, g)
            if not ctx.needs_input_grad[0]:
                return None, None, None
            geometry: Geometry = use.options
            data_gradient, _, _ = torch.ops.aten.convolution_backward(
                g,
                x,
                weight,
                None,
                geometry.stride,
                geometry.padding,
                geometry.dilation,
                True,
                geometry.output_padding,
                geometry.groups,
                [True, False, False],
            )
            return data_gradient, None, None


class TransposedConvolution(Rule):
    """y = Wᵀ * z + b; forms: dense, per example.

    z and g are (N, frames, C, *s) and (N, frames, O, *p), with frames as the rows of dimension 0
    that one example owns. z has as many positions as the convolution of g that it stands for.
    """

    name = "transposed convolution"

    def leading(self, use: Use, g: Tensor) -> int:
        """Dimension 0 alone."""
        return 1

    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """Both with frames; zeros behind z where output padding leaves room for more positions."""
        geometry: Geometry = use.options
        missing: list[int] = []
        for extra, stride in zip(geometry.output_padding, geometry.stride, strict=True):
            missing = [0, extra // stride, *missing]
        if any(missing):
            z = F.pad(z, missing)
        return rows.arrange(z, 1), rows.arrange(g, 1)

    def costs(self, use: Use, size: Size) -> dict[str, Cost]:
        """Those of the convolution of g."""
        if use.roots[0] is None:
            return {"dense": Cost(0, 0, 0, 0)}
        assert use.weight is not None
        item = use.weight.element_size()
        product = use.weight.numel()
        pixels = math.prod(use.shape[2:])
        frames = size.positions
        n_rows, m_rows = size.n * frames * pixels, size.m * size.clean_positions * pixels
        score = (n_rows + m_rows) * product
        weighted = 0.5 * n_rows * product
        kept = size.n * frames * (math.prod(use.shape[1:]) + math.prod(use.output_shape[1:])) * item
        stored = size.n * frames * product
        return {
            "dense": Cost(score, weighted, kept, (score + weighted) / rates.EXAMPLES),
            "per example": Cost(
                score + stored,
                0.5 * stored,
                stored * item,
                score / rates.EXAMPLES + 2.5 * stored * item / rates.BYTES,
            ),
        }

    def direction(self, use: Use, z: Tensor, g: Tensor) -> Roots:
        """V = Σ_i G'_i, V_b = Σ g'."""
        weight = None if use.roots[0] is None else self._sum(use, z, g, None)
        return weight, None if use.roots[1] is None else _bias_gradients(g).sum(0)

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = Σ z·(V * g) + Σ g·V_b."""
        weight, bias = direction
        parts = []
        if weight is not None:
            geometry: Geometry = use.options
            u = ops.conv_correlation(
                *_swapped(z, g),
                weight,
                None,
                geometry.stride,
                geometry.padding,
                geometry.dilation,
                geometry.groups,
            )
            parts.append(_by_example(u, g))
        if bias is not None:
            parts.append(_bias_gradients(g) @ bias)
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def example_gradients(
        self, use: Use, z: Tensor, g: Tensor, direction: Roots | None
    ) -> tuple[Roots, Tensor]:
        """G_i, for each example its own weight gradient, and Σ_p g."""
        weight, bias = direction if direction is not None else (None, None)
        assert use.weight is not None
        geometry: Geometry = use.options
        gradients, _, u = ops.conv_example_gradients(
            *_swapped(z, g),
            list(use.weight.shape[2:]),
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
            weight,
            None,
        )
        gradients, u = _by_example(gradients, g), _by_example(u, g)
        if use.roots[1] is None:
            return (gradients, None), u
        bias_gradients = _bias_gradients(g)
        if bias is not None:
            u = u + bias_gradients @ bias
        return (gradients, bias_gradients), u

    def weighted_gradient(
        self, use: Use, z: Tensor, g: Tensor, weights: Tensor, active: Tensor
    ) -> Roots:
        """Σ w_i G_i; examples with w = 0 are never read."""
        weight = bias = None
        if use.roots[0] is not None:
            weight = self._sum(use, z, g, weights.repeat_interleave(g.shape[1]))
        if use.roots[1] is not None:
            bias = ops.weighted_sum(_bias_gradients(g), weights)
        return weight, bias

    def _sum(self, use: Use, z: Tensor, g: Tensor, weights: Tensor | None) -> Tensor:
        assert use.weight is not None
        geometry: Geometry = use.options
        gradient, _ = ops.conv_weighted_gradient(
            *_swapped(z, g),
            weights,
            list(use.weight.shape[2:]),
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
        )
        return gradient


def _swapped(z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output gradient of the convolution, all frames as rows."""
    return g.flatten(0, 1), z.flatten(0, 1)


def _by_example(rows: Tensor, g: Tensor) -> Tensor:
    frames = g.shape[1]
    return rows if frames == 1 else rows.unflatten(0, (-1, frames)).sum(1)


def _bias_gradients(g: Tensor) -> Tensor:
    """Σ over frames and pixels, (N, O)."""
    return g.flatten(3).sum((1, 3), dtype=accumulation_dtype(g.dtype))


TRANSPOSED_CONVOLUTION = TransposedConvolution()


def _arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Any, Any, Any, int, Any]:
    return input, weight, bias, stride, padding, output_padding, groups, dilation


@handles(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _transposed_convolution(
    mode: Interception, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    x, weight, bias, stride, padding, output_padding, groups, dilation = _arguments(*args, **kwargs)
    if not mode.is_use(x, weight, bias) or x.dim() != weight.dim():
        return mode.other(func, args, kwargs)
    spatial = weight.dim() - 2
    geometry = Geometry(
        numbers(stride, spatial),
        numbers(padding, spatial),
        numbers(output_padding, spatial),
        numbers(dilation, spatial),
        groups,
    )
    operation = f"conv_transpose{spatial}d"
    use = mode.use(TRANSPOSED_CONVOLUTION, operation, weight, bias, geometry, x)
    if use is None:
        return mode.other(func, args, kwargs)
    out = _TransposedConvolutionUse.apply(x, mode.token, use)
    use.output_shape = tuple(out.shape)
    return out
