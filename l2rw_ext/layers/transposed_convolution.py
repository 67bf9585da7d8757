"""Transposed convolutions in one, two and three dimensions.

y = Wᵀ * z spreads z where a convolution of y with W would gather. So G_i of W is the weight
gradient of that convolution, whose input is g and whose output gradient is z.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import accumulation_dtype

from .base import Call, Function, Roots, RowMap, Single, Use
from .convolution import Convolution, Geometry, correlate, examples_of, gathered, numbers


class TransposedConvolution(Convolution):
    """y = Wᵀ * z + b; forms: dense, per example.

    z and g are (N, frames, C, *s) and (N, frames, O, *p), where frames counts the rows of dimension
    0 that belong to one example. z has as many positions as the convolution of g that replaces the
    call.
    """

    name = "transposed convolution"
    functions: ClassVar[tuple[Function, ...]] = (
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
    )

    def bind(  # type: ignore[override]  # torch's own order: groups before dilation
        self,
        func: Function,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Call | None:
        """A single example without a batch is not covered."""
        if input.dim() != weight.dim():
            return None
        spatial = weight.dim() - 2
        geometry = Geometry(
            numbers(stride, spatial),
            numbers(padding, spatial),
            numbers(dilation, spatial),
            groups,
            numbers(output_padding, spatial),
        )
        return Call(f"conv_transpose{spatial}d", input, weight, bias, geometry)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Geometry
    ) -> Tensor:
        """Wᵀ * x + b."""
        assert weight is not None
        assert options.output_padding is not None
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
        stride, padding, dilation, groups = options.of_operator()
        return function(x, weight, bias, stride, padding, options.output_padding, groups, dilation)

    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """Arrange both with frames; pad z where output padding makes room for positions."""
        geometry: Geometry = use.options
        missing: list[int] = []
        assert geometry.output_padding is not None
        for extra, stride in zip(geometry.output_padding, geometry.stride, strict=True):
            missing = [0, extra // stride, *missing]
        if any(missing):
            z = F.pad(z, missing)
        return rows.arrange(z, 1), rows.arrange(g, 1)

    def _pixels(self, use: Use) -> int:
        """The number of output pixels of the convolution of g."""
        return math.prod(use.shape[2:])

    def direction(self, use: Use, z: Tensor, g: Tensor) -> Roots:
        """V = Σ_i G'_i, V_b = Σ g'."""
        V = None if use.roots[0] is None else gathered(use, *_swapped(z, g), None)[0]
        return V, None if use.roots[1] is None else _bias_gradients(g).sum(0)

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = Σ z·(V * g) + Σ g·V_b."""
        V, V_b = direction
        parts = []
        if V is not None:
            u = correlate(use, *_swapped(z, g), V, None)
            parts.append(_by_example(u, g))
        if V_b is not None:
            G_b = _bias_gradients(g)
            parts.append(G_b @ V_b.to(G_b.dtype))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def example_gradients(
        self, use: Use, z: Tensor, g: Tensor, direction: Roots | None
    ) -> tuple[Roots, Tensor]:
        """G_i, for each example its own weight gradient, and Σ_p g."""
        V, V_b = direction if direction is not None else (None, None)
        G, _, u = examples_of(use, *_swapped(z, g), V, None)
        G, u = _by_example(G, g), _by_example(u, g)
        if use.roots[1] is None:
            return (G, None), u
        G_b = _bias_gradients(g)
        return (G, G_b), (u if V_b is None else u + G_b @ V_b.to(G_b.dtype))

    def single_gradients(
        self, use: Use, z: Tensor, g: Tensor
    ) -> tuple[Single | None, Single | None]:
        """G_i."""
        return self.example_gradients(use, z, g, None)[0]

    def weighted_gradient(self, use: Use, z: Tensor, g: Tensor, weights: Tensor) -> Roots:
        """Σ w_i G_i; examples with w = 0 are never read."""
        W = W_b = None
        if use.roots[0] is not None:
            W, _ = gathered(use, *_swapped(z, g), weights.repeat_interleave(g.shape[1]))
        if use.roots[1] is not None:
            W_b = ops.weighted_sum(_bias_gradients(g), weights)
        return W, W_b


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
