"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext import ops

from .base import Mode, Roots, RowMap, Rule, Use, UseFunction
from .costs import Cost, Size, rates_of
from .registry import handles


@dataclass(frozen=True)
class Geometry:
    """Stride, padding (the same on both sides), dilation and groups of a convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    output_padding: list[int] | None = None
    """The output padding of a transposed convolution; None for any other convolution."""

    def arguments(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        """The arguments of ``torch.convolution``."""
        transposed = self.output_padding is not None
        output_padding = self.output_padding or [0] * len(self.stride)
        return self.stride, self.padding, self.dilation, transposed, output_padding, self.groups


class Convolution(Rule):
    """y = W * z + b; forms: dense, per example.

    z and g are (N, C, *s) and (N, O, *p). Where one example owns several rows of dimension 0
    (frames of a video), they are (N, frames, C, *s).
    """

    name = "convolution"

    def call(self, use: Use, x: Tensor) -> Tensor:
        """W * z + b."""
        geometry: Geometry = use.options
        assert use.weight is not None
        return torch.convolution(x, use.weight, use.bias, *geometry.arguments())

    def data_gradient(self, use: Use, x: Tensor, weight: Tensor | None, g: Tensor) -> Tensor:
        """The convolution of g that undoes the shape of the call."""
        geometry: Geometry = use.options
        gradient: Tensor = torch.ops.aten.convolution_backward(
            g, x, weight, None, *geometry.arguments(), [True, False, False]
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
        weight, bias = direction
        geometry: Geometry = use.options
        z, g, frames = _frames_as_rows(use, z, g)
        if weight is None:
            assert bias is not None
            u = g.flatten(2).sum(2, dtype=bias.dtype) @ bias
        else:
            u = correlate(geometry, z, g, weight, bias)
        return u if frames == 1 else u.view(-1, frames).sum(1)

    def example_gradients(
        self, use: Use, z: Tensor, g: Tensor, direction: Roots | None
    ) -> tuple[Roots, Tensor]:
        """G_i, the weight gradient of each example."""
        weight, bias = direction if direction is not None else (None, None)
        z, g, frames = _frames_as_rows(use, z, g)
        gradients, bias_gradients, u = examples_of(use, z, g, weight, bias)
        if frames > 1:
            gradients = gradients.unflatten(0, (-1, frames)).sum(1)
            bias_gradients = bias_gradients.unflatten(0, (-1, frames)).sum(1)
            u = u.view(-1, frames).sum(1)
        return (gradients, bias_gradients if use.roots[1] is not None else None), u

    def weighted_gradient(
        self, use: Use, z: Tensor, g: Tensor, weights: Tensor, active: Tensor | None
    ) -> Roots:
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
        gradient, bias = gathered(use, z, g, weights)
        return gradient, (bias if use.roots[1] is not None else None)


def correlate(
    geometry: Geometry, z: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Σ_p g·(V * z + V_b) of each row, for V, V_b given as ``weight`` and ``bias``."""
    return ops.conv_correlation(
        z,
        g,
        weight,
        bias,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
    )


def examples_of(
    use: Use, z: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """G, G_b of each row, and their inner product with V, V_b."""
    assert use.weight is not None
    geometry: Geometry = use.options
    return ops.conv_example_gradients(
        z,
        g,
        list(use.weight.shape[2:]),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        weight,
        bias,
    )


def gathered(use: Use, z: Tensor, g: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ w G and Σ w G_b over the rows; without ``weights`` all w are one."""
    assert use.weight is not None
    geometry: Geometry = use.options
    return ops.conv_weighted_gradient(
        z,
        g,
        weights,
        list(use.weight.shape[2:]),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
    )


def _frames_as_rows(use: Use, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor, int]:
    assert use.weight is not None
    if z.dim() == use.weight.dim():
        return z, g, 1
    return z.flatten(0, 1), g.flatten(0, 1), z.shape[1]


CONVOLUTION = Convolution()


def _arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Any, Any, Any, int]:
    return input, weight, bias, stride, padding, dilation, groups


def numbers(value: int | Sequence[int], count: int) -> list[int]:
    """An argument as one number for each spatial dimension."""
    if isinstance(value, int):
        return [value] * count
    given = [int(v) for v in value]
    return given * count if len(given) == 1 else given


@handles(F.conv1d, F.conv2d, F.conv3d)
def _convolution(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    x, weight, bias, stride, padding, dilation, groups = _arguments(*args, **kwargs)
    if not mode.is_use(x, weight, bias) or x.dim() != weight.dim():
        return mode.other(func, args, kwargs)
    spatial = weight.dim() - 2
    if padding == "same" and any(s != 1 for s in numbers(stride, spatial)):
        return func(*args, **kwargs)  # torch's own error
    dilations = numbers(dilation, spatial)
    if isinstance(padding, str):
        x, paddings = _named_padding(x, weight, padding, dilations)
    else:
        paddings = numbers(padding, spatial)
    geometry = Geometry(numbers(stride, spatial), paddings, dilations, groups)
    use = mode.use(CONVOLUTION, f"conv{spatial}d", weight, bias, geometry, x)
    if use is None:
        return mode.other(func, args, kwargs)
    out = UseFunction.apply(x, mode.token, use)
    use.output_shape = tuple(out.shape)
    return out


def _named_padding(
    x: Tensor, weight: Tensor, padding: str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """``same`` pads d(k-1) in all, the larger half behind; an odd total is padded beforehand."""
    none = [0] * len(dilation)
    if padding == "valid":
        return x, none
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if all(total % 2 == 0 for total in totals):
        return x, [total // 2 for total in totals]
    sides: list[int] = []
    for total in reversed(totals):
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides), none
