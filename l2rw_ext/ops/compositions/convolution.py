"""Scores and gradients of a convolution in one to three spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext.devices import without_autocast
from l2rw_ext.ops.arithmetic import accumulation_dtype, parts, product

from .checks import Checks
from .weights import without_weight


@without_autocast()
def conv_correlation(
    z: Tensor,
    g: Tensor,
    direction: Tensor,
    direction_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """u_i = Σ_p g_i[:, p] · (V * z_i + V_b)[:, p]."""
    check = Checks("conv_correlation", "z", z)
    check.dims("direction", direction, z.dim())
    kernel_size = direction.shape[2:]
    _check_convolution(check, z, g, kernel_size, stride, padding, dilation, groups)
    _check_direction(check, z, g, kernel_size, groups, direction, direction_bias)

    dtype = accumulation_dtype(z.dtype)
    n = z.shape[0]
    bias = None if direction_bias is None else direction_bias.to(dtype)
    if z.numel() == 0 or g.numel() == 0:
        u = z.new_zeros(n, dtype=dtype)
        return u if bias is None else u + _pixel_sums(g, dtype) @ bias
    moved = torch.convolution(
        z.to(dtype),
        direction.to(dtype),
        bias,
        list(stride),
        list(padding),
        list(dilation),
        False,
        [0] * len(stride),
        groups,
    )
    return moved.mul_(g).sum(tuple(range(1, g.dim())))


@without_autocast()
def conv_example_gradients(
    z: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    direction: Tensor | None = None,
    direction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """G_i as a matrix product over pixels of g with the input values that meet each kernel element.

    A grouped convolution backward with the batch as groups needs no such copy of z, but torch's
    kernels for hundreds of groups are slow. Here a few examples are copied at a time.
    """
    check = Checks("conv_example_gradients", "z", z)
    _check_convolution(check, z, g, kernel_size, stride, padding, dilation, groups)
    _check_direction(check, z, g, kernel_size, groups, direction, direction_bias)

    dtype = accumulation_dtype(z.dtype)
    n, outputs, inputs = z.shape[0], g.shape[1], z.shape[1] // groups
    shape = (outputs, inputs, *kernel_size)
    size, pixels = math.prod(shape), math.prod(g.shape[2:])
    bias_gradients = _pixel_sums(g, dtype)
    u = z.new_zeros(n, dtype=dtype)
    if direction_bias is not None:
        u += bias_gradients @ direction_bias.to(dtype)
    gradients = z.new_zeros(n, *shape)
    if z.numel() == 0 or g.numel() == 0:
        return gradients, bias_gradients.to(z.dtype), u
    v = None if direction is None else direction.to(dtype).reshape(size)
    met = z.shape[1] * math.prod(kernel_size) * pixels
    for part in parts(n, dtype.itemsize * (met + (0 if z.dtype == dtype else size))):
        columns = _columns(z[part], kernel_size, stride, padding, dilation, groups)
        rows = g[part].reshape(columns.shape[0], outputs // groups, pixels)
        wide = product(rows, columns.mT, dtype).view(-1, *shape)
        gradients[part] = wide
        if v is not None:
            u[part].add_(wide.view(-1, size) @ v)
    return gradients, bias_gradients.to(z.dtype), u


@without_autocast()
def conv_weighted_gradient(
    z: Tensor,
    g: Tensor,
    weights: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """W = Σ_i w_i G_i, W_b = Σ_i w_i G_bi: the weight gradient of a batch with w_i g_i."""
    check = Checks("conv_weighted_gradient", "z", z)
    _check_convolution(check, z, g, kernel_size, stride, padding, dilation, groups)
    check.vector("weights", weights, z.shape[0], "examples of z")

    dtype = accumulation_dtype(z.dtype)
    shape = (g.shape[1], z.shape[1] // groups, *kernel_size)
    z, g = z.to(dtype), g.to(dtype)
    if weights is not None:
        # 0 · NaN is NaN: an example without weight has neither an input nor a gradient.
        left_out = without_weight(weights, z.dim())
        z = z.masked_fill(left_out, 0)
        g = (g * weights.to(dtype).view(left_out.shape)).masked_fill(left_out, 0)
    bias_gradient = _pixel_sums(g, dtype).sum(0)
    if z.numel() == 0 or g.numel() == 0:
        return z.new_zeros(shape), bias_gradient
    gradient: Tensor = torch.ops.aten.convolution_backward(
        g,
        z,
        z.new_empty(shape),
        None,
        list(stride),
        list(padding),
        list(dilation),
        False,
        [0] * len(stride),
        groups,
        [False, True, False],
    )[1]
    return gradient.contiguous(), bias_gradient


def _pixel_sums(g: Tensor, dtype: torch.dtype) -> Tensor:
    return g.sum(tuple(range(2, g.dim())), dtype=dtype)


def _columns(
    z: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The input values that each kernel element meets: (n groups, C / groups · kernel, pixels)."""
    n, rank = z.shape[0], len(kernel_size)
    if any(padding):
        z = F.pad(z, [amount for amount in reversed(padding) for _ in range(2)])
    for dim, (k, step, apart) in enumerate(zip(kernel_size, stride, dilation, strict=True), 2):
        z = z.unfold(dim, apart * (k - 1) + 1, step)[..., ::apart]
    pixels, kernel = range(2, 2 + rank), range(2 + rank, 2 + 2 * rank)
    count = math.prod(z.shape[2 : 2 + rank])
    return z.permute(0, 1, *kernel, *pixels).reshape(n * groups, -1, count)


def _check_convolution(
    check: Checks,
    z: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    check.require(
        3 <= z.dim() <= 5,
        "z must have 3 to 5 dimensions (examples, channels, 1 to 3 of space), got shape "
        f"{tuple(z.shape)}",
    )
    check.dims("g", g, z.dim())
    check.floating()
    check.same("g", g)
    check.size("g", g, 0, z.shape[0], "examples of z")
    rank = z.dim() - 2
    check.numbers("kernel_size", kernel_size, rank, 1)
    check.numbers("stride", stride, rank, 1)
    check.numbers("padding", padding, rank, 0)
    check.numbers("dilation", dilation, rank, 1)
    check.require(
        groups >= 1 and z.shape[1] % groups == 0 and g.shape[1] % groups == 0,
        f"groups must divide the channels of z ({z.shape[1]}) and of g ({g.shape[1]}), got "
        f"{groups}",
    )
    geometry = zip(z.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    for dim, (size, k, step, pad, apart) in enumerate(geometry, 2):
        free = size + 2 * pad - apart * (k - 1) - 1
        found = 0 if free < 0 else free // step + 1
        check.size("g", g, dim, found, "what the convolution of z gives")


def _check_direction(
    check: Checks,
    z: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    groups: int,
    direction: Tensor | None,
    direction_bias: Tensor | None,
) -> None:
    if direction is not None:
        check.same_or_wide("direction", direction)
        check.dims("direction", direction, z.dim())
        check.size("direction", direction, 0, g.shape[1], "channels of g")
        check.size("direction", direction, 1, z.shape[1] // groups, "channels of z in a group")
        for dim, k in enumerate(kernel_size, 2):
            check.size("direction", direction, dim, k, "kernel_size")
    check.vector("direction_bias", direction_bias, g.shape[1], "channels of g")
