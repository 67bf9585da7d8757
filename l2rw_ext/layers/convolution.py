"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import accumulation_dtype

from .base import Call, Function, Layer, Roots, RowMap, Single, Use
from .costs import Cost, Size, rates_of


@dataclass(frozen=True)
class Geometry:
    """Stride, padding (the same on both sides), dilation and groups of a convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    output_padding: list[int] | None = None
    """The output padding of a transposed convolution; None for any other convolution."""
    sides: tuple[int, ...] = ()
    """What ``F.pad`` adds beforehand, where the two sides of a dimension differ."""
    mode: str = "constant"
    """The mode of that ``F.pad``."""

    def arguments(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        """The arguments of ``torch.convolution``."""
        transposed = self.output_padding is not None
        output_padding = self.output_padding or [0] * len(self.stride)
        return self.stride, self.padding, self.dilation, transposed, output_padding, self.groups

    def of_operator(self) -> tuple[list[int], list[int], list[int], int]:
        """The last arguments of this package's operators."""
        return self.stride, self.padding, self.dilation, self.groups


def numbers(value: int | Sequence[int], count: int) -> list[int]:
    """An argument as one number for each spatial dimension."""
    if isinstance(value, int):
        return [value] * count
    given = [int(v) for v in value]
    return given * count if len(given) == 1 else given


def sides_of(padding: str, kernel: Sequence[int], dilation: list[int]) -> list[tuple[int, int]]:
    """What ``valid`` and ``same`` add before and after each dimension.

    ``same`` adds d(k-1) in all; where that is odd, the larger half goes behind, as in torch.
    """
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def beforehand(
    sides: Sequence[tuple[int, int]], *, always: bool = False
) -> tuple[list[int], tuple[int, ...]]:
    """What the convolution itself pads, and what ``F.pad`` does: all, if two sides differ."""
    if always or any(before != after for before, after in sides):
        return [0] * len(sides), tuple(amount for side in reversed(sides) for amount in side)
    return [before for before, _ in sides], ()


class Convolution(Layer):
    """y = W * z + b; forms: dense, per example.

    z and g are (N, C, *s) and (N, O, *p). Where one example owns several rows of dimension 0
    (frames of a video), they are (N, frames, C, *s).
    """

    name = "convolution"
    functions: ClassVar[tuple[Function, ...]] = (F.conv1d, F.conv2d, F.conv3d)
    linear_in_x = True

    def bind(
        self,
        func: Function,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Call | None:
        """Every padding that torch takes; a single example without a batch is not covered."""
        if input.dim() != weight.dim():
            return None
        spatial = weight.dim() - 2
        strides, dilations = numbers(stride, spatial), numbers(dilation, spatial)
        sides: tuple[int, ...] = ()
        if isinstance(padding, str):
            if padding == "same" and any(s != 1 for s in strides):
                return None  # torch's own error
            paddings, sides = beforehand(sides_of(padding, weight.shape[2:], dilations))
        else:
            paddings = numbers(padding, spatial)
        geometry = Geometry(strides, paddings, dilations, groups, sides=sides)
        return Call(f"conv{spatial}d", input, weight, bias, geometry)

    def enter(self, x: Tensor, options: Geometry) -> Tensor:
        """Pad where the two sides of a dimension differ, or other values than zeros are added."""
        return F.pad(x, options.sides, options.mode) if options.sides else x

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Geometry
    ) -> Tensor:
        """W * x + b, by a function that autocast knows."""
        assert weight is not None
        function = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return function(x, weight, bias, *options.of_operator())

    def term_transpose(self, g: Tensor, x: Tensor, like: Roots, options: Geometry) -> Roots:
        """The ordinary weight and bias gradients."""
        weight, bias = like
        if weight is not None:
            weight = torch.ops.aten.convolution_backward(
                g, x, weight.to(x.dtype), None, *options.arguments(), [False, True, False]
            )[1]
        others = [d for d in range(g.dim()) if d != 1]
        return weight, None if bias is None else g.sum(others, dtype=accumulation_dtype(g.dtype))

    def data_gradient(
        self, g: Tensor, x: Tensor, weight: Tensor | None, options: Geometry
    ) -> Tensor:
        """The convolution of g that undoes the shape of the call."""
        gradient: Tensor = torch.ops.aten.convolution_backward(
            g, x, weight, None, *options.arguments(), [True, False, False]
        )[0]
        return gradient

    def leading(self, use: Use, g: Tensor) -> int:
        """Only dimension 0."""
        return 1

    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """(N, frames, C, *s) and (N, frames, O, *p), without frames if an example has one row."""
        if rows.positions == 1:
            return z, g
        return rows.arrange(z, 1), rows.arrange(g, 1)

    def costs(self, use: Use, size: Size) -> dict[str, Cost]:
        """The costs of both forms; per example needs fewer operations once ρT > 2."""
        if use.roots[0] is None:
            return {"dense": Cost(0, 0, 0, 0)}
        assert use.weight is not None
        speed = rates_of(use.weight)
        item = use.weight.element_size()
        product = use.weight.numel()
        pixels = self._pixels(use)
        frames = size.positions
        n_rows, m_rows = size.n * frames * pixels, size.m * size.clean_positions * pixels
        score = (n_rows + m_rows) * product
        weighted = 0.5 * n_rows * product
        kept = size.n * frames * (math.prod(use.shape[1:]) + math.prod(use.output_shape[1:])) * item
        stored = size.n * frames * product
        return {
            "dense": Cost(score, weighted, kept, (score + weighted) / speed.examples),
            "per example": Cost(
                score + stored,
                0.5 * stored,
                stored * item,
                score / speed.examples + 2.5 * stored * item / speed.bytes,
            ),
        }

    def _pixels(self, use: Use) -> int:
        """The number of positions that every element of the kernel meets."""
        return math.prod(use.output_shape[2:])

    def direction(self, use: Use, z: Tensor, g: Tensor) -> Roots:
        """V = Σ_i G'_i, the ordinary weight gradient of the clean rows."""
        z, g, _ = _frames_as_rows(use, z, g)
        return self._sum(use, z, g, None)

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = Σ_p g·(V * z + V_b)."""
        V, V_b = direction
        z, g, frames = _frames_as_rows(use, z, g)
        if V is None:
            assert V_b is not None
            u = g.flatten(2).sum(2, dtype=V_b.dtype) @ V_b
        else:
            u = correlate(use, z, g, V, V_b)
        return u if frames == 1 else u.view(-1, frames).sum(1)

    def example_gradients(
        self, use: Use, z: Tensor, g: Tensor, direction: Roots | None
    ) -> tuple[Roots, Tensor]:
        """G_i, the weight gradient of each example."""
        V, V_b = direction if direction is not None else (None, None)
        z, g, frames = _frames_as_rows(use, z, g)
        G, G_b, u = examples_of(use, z, g, V, V_b)
        if frames > 1:
            G, G_b = (x.unflatten(0, (-1, frames)).sum(1) for x in (G, G_b))
            u = u.view(-1, frames).sum(1)
        return (G, G_b if use.roots[1] is not None else None), u

    def single_gradients(
        self, use: Use, z: Tensor, g: Tensor
    ) -> tuple[Single | None, Single | None]:
        """G_i; in two dimensions as products, Σ over pixels, if the patches of z are the smaller.

        That is so in deep layers, which have many channels and few pixels.
        """
        weight, geometry = use.roots[0], use.options
        if weight is None or weight.dim() != 4 or geometry.groups > 1:
            return super().single_gradients(use, z, g)
        pixels = g[0].numel() // weight.shape[0]
        if pixels * (weight.shape[0] + weight[0].numel()) > weight.numel():
            return super().single_gradients(use, z, g)
        z, g, frames = _frames_as_rows(use, z, g)
        kernel, (stride, padding, dilation, _) = weight.shape[2:], geometry.of_operator()
        rows = g.flatten(2), F.unfold(z, kernel, dilation, padding, stride)
        a, b = (x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2).mT for x in rows)
        return (a, b), a.sum(1, dtype=accumulation_dtype(a.dtype))

    def weighted_gradient(self, use: Use, z: Tensor, g: Tensor, weights: Tensor) -> Roots:
        """Σ w_i G_i; examples with w = 0 are never read."""
        z, g, frames = _frames_as_rows(use, z, g)
        if frames > 1:
            weights = weights.repeat_interleave(frames)
        return self._sum(use, z, g, weights)

    def _sum(self, use: Use, z: Tensor, g: Tensor, weights: Tensor | None) -> Roots:
        if use.roots[0] is None:
            per_example = g.flatten(2).sum(2)
            bias = per_example.sum(0) if weights is None else ops.weighted_sum(per_example, weights)
            return None, bias
        W, W_b = gathered(use, z, g, weights)
        return W, (W_b if use.roots[1] is not None else None)


def correlate(use: Use, z: Tensor, g: Tensor, V: Tensor, V_b: Tensor | None) -> Tensor:
    """Σ_p g·(V * z + V_b) of each row."""
    geometry: Geometry = use.options
    return ops.conv_correlation(z, g, V, V_b, *geometry.of_operator())


def examples_of(
    use: Use, z: Tensor, g: Tensor, V: Tensor | None, V_b: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """G, G_b of each row, and their inner product with V, V_b."""
    assert use.weight is not None
    geometry: Geometry = use.options
    kernel = list(use.weight.shape[2:])
    return ops.conv_example_gradients(z, g, kernel, *geometry.of_operator(), V, V_b)


def gathered(use: Use, z: Tensor, g: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ w G and Σ w G_b over the rows; without ``weights`` all w are one."""
    assert use.weight is not None
    kernel = list(use.weight.shape[2:])
    return ops.conv_weighted_gradient(z, g, weights, kernel, *use.options.of_operator())


def _frames_as_rows(use: Use, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor, int]:
    assert use.weight is not None
    if z.dim() == use.weight.dim():
        return z, g, 1
    return z.flatten(0, 1), g.flatten(0, 1), z.shape[1]


CONVOLUTION = Convolution()
