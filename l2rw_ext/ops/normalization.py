"""Operators of normalization layers: gradients, and the tangent of a batch norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import Checks
from ._operator import operator
from .arithmetic import accumulation_dtype


def _empty_as(x: Tensor) -> Tensor:
    """For a result in the dtype and memory format of x; contiguous where x has neither format."""
    dense = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    return torch.empty_like(x) if dense else x.new_empty(x.shape)


def _empty_wide(x: Tensor, width: int) -> Tensor:
    return x.new_empty((x.shape[0], width), dtype=accumulation_dtype(x.dtype))


@operator(
    torch.ops.l2rw_ext.affine_example_gradients.default,
    fake=lambda x, *_: (_empty_wide(x, x.shape[2]), _empty_wide(x, x.shape[2])),
)
def affine_example_gradients(
    x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of single examples of a normalization layer's scale and shift.

    x̂ = (x - mean) rstd; G_i = Σ_t g_it x̂_it, G_bi = Σ_t g_it

    Memory in which the channels, or the positions, of x and g lie side by side is read at full
    speed; other strides are read as they are.

    Args:
        x: (n, T, d) input of the layer.
        g: (n, T, d) gradient of the summed training losses.
        mean: three dimensions that broadcast to those of x; None: zero.
        rstd: the same for the factor; None: one.

    Returns:
        G and G_b, (n, d) each, in the accumulation dtype.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> x = torch.full((1, 2, 1), 3.0)
        >>> ops.affine_example_gradients(x, torch.ones(1, 2, 1), None, None)
        (tensor([[6.]]), tensor([[2.]]))
    """
    check = Checks("x", x)
    whats = ("examples of x", "positions of x", "channels of x")
    check.same("g", g, *zip(x.shape, whats, strict=True))
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic is not None:
            check.same(name, statistic, None, None, None, or_wide=True)
            check.require(
                all(size in (1, full) for size, full in zip(statistic.shape, x.shape, strict=True)),
                f"{name} must broadcast to the shape of x {tuple(x.shape)}, got shape "
                f"{tuple(statistic.shape)}",
            )

    dtype = accumulation_dtype(x.dtype)
    normalized = x.to(dtype)
    if mean is not None:
        normalized = normalized - mean.to(dtype)
    if rstd is not None:
        normalized = normalized * rstd.to(dtype)
    return (normalized * g).sum(1), g.sum(1, dtype=dtype)


@operator(
    torch.ops.l2rw_ext.group_norm_backward.default,
    fake=lambda g, x, *_: (
        _empty_as(x),
        _empty_wide(x, x.shape[1]),
        _empty_wide(x, x.shape[1]),
    ),
)
def group_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a group norm's input and, of single examples, of its scale and shift.

    x̂ = (x - mean) rstd; G_i = Σ_s g_is x̂_is, G_bi = Σ_s g_is; the gradient of x is
    rstd (γ g - x̂ Σ γ G / S - Σ γ G_b / S), where both sums are over the channels of a group and S
    is its number of elements.

    Args:
        g: (n, C, ...) gradient of the summed training losses.
        x: (n, C, ...) input of the layer.
        mean: (n, groups) as ``torch.native_group_norm`` returns it.
        rstd: (n, groups) the same.
        weight: (C,) the scale γ; None: all ones.
        groups: the number of groups, a divisor of C.

    Returns:
        The gradient of x, (n, C, ...) in its dtype, contiguous or with the channels side by side
        in memory as x; G and G_b, (n, C) each, in the accumulation dtype.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> x, g = torch.tensor([[[-1.0, 1.0]]]), torch.tensor([[[0.0, 2.0]]])
        >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        >>> ops.group_norm_backward(g, x, zero, one, None, 1)
        (tensor([[[0., 0.]]]), tensor([[2.]]), tensor([[2.]]))
    """
    check = Checks("x", x, dims=None)
    _check_images(check, x, "g", g)
    n, channels = x.shape[:2]
    check.require(
        groups > 0 and channels % groups == 0,
        f"groups must divide the {channels} channels of x, got {groups}",
    )
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        check.same(name, statistic, (n, "examples of x"), (groups, "groups"), or_wide=True)
    check.same("weight", weight, (channels, "channels of x"), or_wide=True)

    dtype = accumulation_dtype(x.dtype)
    per_group, positions = channels // groups, math.prod(x.shape[2:])
    shape = (n, groups, per_group, positions)
    result = _empty_as(x)
    factor = rstd.to(dtype).view(n, groups, 1, 1)
    scale = None if weight is None else weight.to(dtype).view(1, groups, per_group, 1)

    normalized = (x.reshape(shape).to(dtype) - mean.to(dtype).view(n, groups, 1, 1)) * factor
    gradient = g.reshape(shape).to(dtype)
    along, sums = (gradient * normalized).sum(3, keepdim=True), gradient.sum(3, keepdim=True)
    # The means over a group of γ g x̂ and γ g, which the normalisation takes out of γ g.
    count = max(1, per_group * positions)
    slope = (along if scale is None else along * scale).sum(2, keepdim=True) / count
    offset = (sums if scale is None else sums * scale).sum(2, keepdim=True) / count
    scaled = gradient if scale is None else gradient * scale
    inner = torch.addcmul(scaled, normalized, slope, value=-1).sub_(offset)
    torch.mul(inner, factor, out=result.view(shape))
    return result, along.view(n, channels), sums.view(n, channels)


@operator(torch.ops.l2rw_ext.batch_norm_tangent.default, fake=lambda x, *_: _empty_as(x))
def batch_norm_tangent(
    x: Tensor,
    x_tangent: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    direction: Tensor | None,
    direction_bias: Tensor | None,
) -> Tensor:
    """Derivative of a batch norm in train mode along a direction of its input and parameters.

    With x̂ = (x - mean) rstd and E the mean over examples and positions, it is
    weight rstd (ẋ - E ẋ - x̂ E(x̂ ẋ)) + x̂ V + V_b.

    Args:
        x: (n, C, *s) input of the layer.
        x_tangent: (n, C, *s) ẋ; None where x is constant.
        mean: (C,) as ``torch.native_batch_norm`` returns it.
        rstd: (C,) as ``torch.native_batch_norm`` returns it.
        weight: (C,) scale; None stands for ones.
        direction: (C,) V, of the scale; None stands for zeros.
        direction_bias: (C,) V_b, of the shift; None stands for zeros.

    Returns:
        (n, C, *s) in the dtype and memory format of x.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> x = torch.tensor([[-1.0], [1.0]])
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> ops.batch_norm_tangent(x, x + 1, zero, one, None, one, one)
        tensor([[0.],
                [2.]])
    """
    check = Checks("x", x, dims=None)
    _check_images(check, x, "x_tangent", x_tangent)
    channels = (x.shape[1], "channels of x")
    check.same("mean", mean, channels, or_wide=True)
    check.same("rstd", rstd, channels, or_wide=True)
    check.same("weight", weight, channels, or_wide=True)
    check.same("direction", direction, channels, or_wide=True)
    check.same("direction_bias", direction_bias, channels, or_wide=True)

    # The result is scale ẋ + slope (x - mean) + offset.
    dtype = accumulation_dtype(x.dtype)
    shape = (1, x.shape[1], *[1] * (x.dim() - 2))
    count = max(1, x.shape[0] * math.prod(x.shape[2:]))
    others = (0, *range(2, x.dim()))
    rstd = rstd.to(dtype)
    centred = x.to(dtype) - mean.to(dtype).view(shape)
    slope = rstd * direction.to(dtype) if direction is not None else torch.zeros_like(rstd)
    offset = direction_bias.to(dtype) if direction_bias is not None else torch.zeros_like(rstd)
    result = _empty_as(x)
    if x_tangent is None:
        tangent = centred * slope.view(shape)
    else:
        moved = x_tangent.to(dtype)
        scale = rstd if weight is None else rstd * weight.to(dtype)
        share = scale / count
        slope = slope - share * rstd * rstd * (moved * centred).sum(others)
        offset = offset - share * moved.sum(others)
        tangent = torch.addcmul(moved * scale.view(shape), centred, slope.view(shape))
    return torch.add(tangent, offset.view(shape), out=result)


def _check_images(check: Checks, x: Tensor, name: str, other: Tensor | None) -> None:
    check.require(x.dim() >= 2, f"x must have at least 2 dimensions, got shape {tuple(x.shape)}")
    if other is not None:
        check.same(name, other, *((size, "as x") for size in x.shape))
