"""Operators of a convolution in one to three spatial dimensions: scores and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._checks import Checks
from ._operator import operator, scores
from .arithmetic import accumulation_dtype, parts, product, weighted, without_weight


@operator(torch.ops.l2rw_ext.conv_correlation.default, fake=lambda z, *_: scores(z))
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
    """Scores of a convolution from its direction, in one to three spatial dimensions.

    u_i = Σ_p g_i[:, p] · (V * z_i + V_b)[:, p]

    Args:
        z: (n, C, *s) input of the layer.
        g: (n, O, *p) gradient of the summed training losses.
        direction: (O, C / groups, *k) V.
        direction_bias: (O,) V_b.
        stride: step of each spatial dimension.
        padding: zeros added on both sides of each spatial dimension.
        dilation: distance of kernel elements in each spatial dimension.
        groups: number of groups.

    Returns:
        (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> z, g, V = torch.ones(1, 1, 3), torch.ones(1, 1, 2), torch.ones(1, 1, 2)
        >>> ops.conv_correlation(z, g, V, None, [1], [0], [1], 1)
        tensor([4.])
    """
    geometry = (stride, padding, dilation, groups)
    _check(z, g, direction.shape[2:], *geometry, direction, direction_bias)
    dtype = accumulation_dtype(z.dtype)
    n = z.shape[0]
    bias = None if direction_bias is None else direction_bias.to(dtype)
    if z.numel() == 0 or g.numel() == 0:
        u = z.new_zeros(n, dtype=dtype)
        return u if bias is None else u + _pixel_sums(g, dtype) @ bias
    moved = torch.convolution(z.to(dtype), direction.to(dtype), bias, *_for_torch(*geometry))
    return moved.mul_(g).sum(tuple(range(1, g.dim())))


@operator(
    torch.ops.l2rw_ext.conv_example_gradients.default,
    fake=lambda z, g, kernel_size, stride, padding, dilation, groups, *_: (
        z.new_empty((z.shape[0], *_kernel_shape(z, g, kernel_size, groups))),
        z.new_empty(g.shape[:2]),
        scores(z),
    ),
)
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
    """Gradients of single examples of a convolution, and their scores on the way.

    G_i is what a convolution's backward returns for example i alone, G_bi = Σ_p g_i[:, p], and
    u_i = <V, G_i> + <V_b, G_bi>.

    Args:
        z: (n, C, *s) input of the layer.
        g: (n, O, *p) gradient of the summed training losses.
        kernel_size: size of the kernel in each spatial dimension.
        stride: step of each spatial dimension.
        padding: zeros added on both sides of each spatial dimension.
        dilation: distance of kernel elements in each spatial dimension.
        groups: number of groups.
        direction: (O, C / groups, *k) V; None: it adds nothing to the scores.
        direction_bias: (O,) V_b; None: it adds nothing to the scores.

    Returns:
        G (n, O, C / groups, *k) and G_b (n, O) in the dtype of z, and (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> z, g = torch.ones(1, 1, 3), torch.ones(1, 1, 2)
        >>> G, G_b, u = ops.conv_example_gradients(z, g, [2], [1], [0], [1], 1)
        >>> G, G_b
        (tensor([[[[2., 2.]]]]), tensor([[2.]]))
    """
    geometry = (kernel_size, stride, padding, dilation, groups)
    _check(z, g, *geometry, direction, direction_bias)
    dtype = accumulation_dtype(z.dtype)
    n, outputs = g.shape[:2]
    shape = _kernel_shape(z, g, kernel_size, groups)
    size, pixels = math.prod(shape), math.prod(g.shape[2:])
    bias_gradients = _pixel_sums(g, dtype)
    u = z.new_zeros(n, dtype=dtype)
    if direction_bias is not None:
        u += bias_gradients @ direction_bias.to(dtype)
    gradients = z.new_zeros(n, *shape)
    if z.numel() == 0 or g.numel() == 0:
        return gradients, bias_gradients.to(z.dtype), u
    v = None if direction is None else direction.to(dtype).reshape(size)
    # G_i is a matrix product over pixels of g with the input values that meet each kernel element.
    # A grouped convolution backward with the batch as groups needs no such copy of z, but torch's
    # kernels for hundreds of groups are slow. Here a few examples are copied at a time.
    met = z.shape[1] * math.prod(kernel_size) * pixels
    for part in parts(n, dtype.itemsize * (met + (0 if z.dtype == dtype else size))):
        columns = _columns(z[part], *geometry)
        rows = g[part].reshape(columns.shape[0], outputs // groups, pixels)
        wide = product(rows, columns.mT, dtype).view(-1, *shape)
        gradients[part] = wide
        if v is not None:
            u[part].add_(wide.view(-1, size) @ v)
    return gradients, bias_gradients.to(z.dtype), u


@operator(
    torch.ops.l2rw_ext.conv_weighted_gradient.default,
    fake=lambda z, g, weights, kernel_size, stride, padding, dilation, groups: (
        z.new_empty(_kernel_shape(z, g, kernel_size, groups), dtype=accumulation_dtype(z.dtype)),
        z.new_empty((g.shape[1],), dtype=accumulation_dtype(z.dtype)),
    ),
)
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
    """Weighted gradient of a convolution, without storing the gradients of single examples.

    W = Σ_i w_i G_i and W_b = Σ_i w_i G_bi; examples with w_i = 0 are never read.

    Args:
        z: (n, C, *s) input of the layer.
        g: (n, O, *p) gradient of the summed training losses.
        weights: (n,) weights; None: all ones.
        kernel_size: size of the kernel in each spatial dimension.
        stride: step of each spatial dimension.
        padding: zeros added on both sides of each spatial dimension.
        dilation: distance of kernel elements in each spatial dimension.
        groups: number of groups.

    Returns:
        W (O, C / groups, *k) and W_b (O,) in the accumulation dtype.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> z, g, w = torch.ones(2, 1, 3), torch.ones(2, 1, 2), torch.tensor([0.5, 0.0])
        >>> ops.conv_weighted_gradient(z, g, w, [2], [1], [0], [1], 1)
        (tensor([[[1., 1.]]]), tensor([1.]))
    """
    check = _check(z, g, kernel_size, stride, padding, dilation, groups)
    check.same("weights", weights, (z.shape[0], "examples of z"), or_wide=True)

    dtype = accumulation_dtype(z.dtype)
    shape = _kernel_shape(z, g, kernel_size, groups)
    z, g = z.to(dtype), g.to(dtype)
    if weights is not None:
        # 0 · NaN is NaN: an example without weight has neither an input nor a gradient.
        z = z.masked_fill(without_weight(weights, z.dim()), 0)
        g = weighted(g, weights.to(dtype))
    bias_gradient = _pixel_sums(g, dtype).sum(0)
    if z.numel() == 0 or g.numel() == 0:
        return z.new_zeros(shape), bias_gradient
    geometry = _for_torch(stride, padding, dilation, groups)
    gradient: Tensor = torch.ops.aten.convolution_backward(
        g, z, z.new_empty(shape), None, *geometry, [False, True, False]
    )[1]
    return gradient.contiguous(), bias_gradient


def _kernel_shape(z: Tensor, g: Tensor, kernel_size: Sequence[int], groups: int) -> tuple[int, ...]:
    return (g.shape[1], z.shape[1] // groups, *kernel_size)


def _for_torch(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    """With what torch wants to know of transposed convolutions: that this is none."""
    return list(stride), list(padding), list(dilation), False, [0] * len(stride), groups


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


def _check(
    z: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    direction: Tensor | None = None,
    direction_bias: Tensor | None = None,
) -> Checks:
    check = Checks("z", z, dims=None)
    check.require(
        3 <= z.dim() <= 5,
        "z must have 3 to 5 dimensions (examples, channels, 1 to 3 of space), got shape "
        f"{tuple(z.shape)}",
    )
    check.same("g", g, (z.shape[0], "examples of z"), *[None] * (z.dim() - 1))
    check.same("direction", direction, *[None] * z.dim(), or_wide=True)
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
    pixels = [
        max(0, (size + 2 * pad - apart * (k - 1) - 1) // step + 1)
        for size, k, step, pad, apart in geometry
    ]
    check.same("g", g, None, None, *((p, "what the convolution of z gives") for p in pixels))
    outputs = (g.shape[1], "channels of g")
    inputs = (z.shape[1] // groups, "channels of z in a group")
    kernel = [(k, "kernel_size") for k in kernel_size]
    check.same("direction", direction, outputs, inputs, *kernel, or_wide=True)
    check.same("direction_bias", direction_bias, outputs, or_wide=True)
    return check
