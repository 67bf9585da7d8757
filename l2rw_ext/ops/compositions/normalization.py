"""Scale and shift of normalization layers, and the tangent of a batch norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l2rw_ext.devices import without_autocast
from l2rw_ext.ops.arithmetic import accumulation_dtype

from .checks import Checks


@without_autocast()
def affine_correlation(
    x: Tensor,
    g: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    direction: Tensor | None,
    direction_bias: Tensor | None,
) -> Tensor:
    """x̂ = (x - mean) rstd; u_i = Σ_t Σ_c g_itc (x̂_itc V_c + V_bc)."""
    check = _check_affine("affine_correlation", x, g, mean, rstd)
    check.vector("direction", direction, x.shape[2], "channels of x")
    check.vector("direction_bias", direction_bias, x.shape[2], "channels of x")

    dtype = accumulation_dtype(x.dtype)
    u = x.new_zeros(x.shape[0], dtype=dtype)
    if direction is not None:
        u += _scale_gradients(x, g, mean, rstd) @ direction.to(dtype)
    if direction_bias is not None:
        u += g.sum(1, dtype=dtype) @ direction_bias.to(dtype)
    return u


@without_autocast()
def affine_example_gradients(
    x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x̂ = (x - mean) rstd; G_i = Σ_t g_it x̂_it, G_bi = Σ_t g_it."""
    _check_affine("affine_example_gradients", x, g, mean, rstd)
    return _scale_gradients(x, g, mean, rstd), g.sum(1, dtype=accumulation_dtype(x.dtype))


def _check_affine(
    operation: str, x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> Checks:
    check = Checks(operation, "x", x)
    check.dims("x", x, 3)
    check.dims("g", g, 3)
    check.floating()
    check.same("g", g)
    for dim, what in enumerate(("examples of x", "positions of x", "channels of x")):
        check.size("g", g, dim, x.shape[dim], what)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic is None:
            continue
        check.dims(name, statistic, 3)
        check.same_or_wide(name, statistic)
        check.require(
            all(size in (1, full) for size, full in zip(statistic.shape, x.shape, strict=True)),
            f"{name} must broadcast to the shape of x {tuple(x.shape)}, got shape "
            f"{tuple(statistic.shape)}",
        )
    return check


def _scale_gradients(x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    normalized = x.to(dtype)
    if mean is not None:
        normalized = normalized - mean.to(dtype)
    if rstd is not None:
        normalized = normalized * rstd.to(dtype)
    return (normalized * g).sum(1)


@without_autocast()
def group_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, and per example those of scale and shift: G = Σ g x̂, G_b = Σ g."""
    check = Checks("group_norm_backward", "x", x)
    _check_images(check, x, "g", g)
    n, channels = x.shape[:2]
    check.require(
        groups > 0 and channels % groups == 0,
        f"groups must divide the {channels} channels of x, got {groups}",
    )
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        check.same_or_wide(name, statistic)
        check.dims(name, statistic, 2)
        check.size(name, statistic, 0, n, "examples of x")
        check.size(name, statistic, 1, groups, "groups")
    check.vector("weight", weight, channels, "channels of x")

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


@without_autocast()
def batch_norm_tangent(
    x: Tensor,
    x_tangent: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    direction: Tensor | None,
    direction_bias: Tensor | None,
) -> Tensor:
    """γ rstd (ẋ - E ẋ - x̂ E(x̂ ẋ)) + x̂ V + V_b, as scale ẋ + slope (x - mean) + offset."""
    check = Checks("batch_norm_tangent", "x", x)
    _check_images(check, x, "x_tangent", x_tangent)
    channels = x.shape[1]
    for name, tensor in (
        ("mean", mean),
        ("rstd", rstd),
        ("weight", weight),
        ("direction", direction),
        ("direction_bias", direction_bias),
    ):
        check.vector(name, tensor, channels, "channels of x")

    dtype = accumulation_dtype(x.dtype)
    shape = (1, channels, *[1] * (x.dim() - 2))
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
    check.floating()
    if other is None:
        return
    check.same(name, other)
    check.dims(name, other, x.dim())
    for dim in range(x.dim()):
        check.size(name, other, dim, x.shape[dim], "as x")


def _empty_as(x: Tensor) -> Tensor:
    """For a result in the dtype and memory format of x; contiguous where x has neither format."""
    dense = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    return torch.empty_like(x) if dense else x.new_empty(x.shape)
