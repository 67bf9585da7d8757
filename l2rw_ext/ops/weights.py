"""Operators from scores to weights (Eq. 8-9), and over examples by weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import Checks
from ._operator import operator
from .arithmetic import accumulation_dtype, parts, without_weight


@operator(
    torch.ops.l2rw_ext.weighted_sum.default,
    fake=lambda gradients, *_: gradients.new_empty(
        gradients.shape[1:], dtype=accumulation_dtype(gradients.dtype)
    ),
)
def weighted_sum(gradients: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the gradients of single examples.

    W = Σ_i w_i G_i over the examples with w_i ≠ 0; the others are never read.

    Args:
        gradients: (n, ...) one gradient per example.
        weights: (n,) weights.

    Returns:
        (...) W in the accumulation dtype.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> G = torch.tensor([[2.0, 4.0], [float("nan"), 1.0]])
        >>> ops.weighted_sum(G, torch.tensor([0.5, 0.0]))
        tensor([1., 2.])
    """
    check = Checks("gradients", gradients, dims=None)
    check.require(
        gradients.dim() >= 1,
        f"gradients must have at least 1 dimension, got shape {tuple(gradients.shape)}",
    )
    check.same("weights", weights, (gradients.shape[0], "examples of gradients"), or_wide=True)

    dtype = accumulation_dtype(gradients.dtype)
    n, shape = gradients.shape[0], gradients.shape[1:]
    if gradients.dim() == 1:
        gradients = gradients.unsqueeze(1)
    weights = weights.to(dtype)
    left_out = without_weight(weights, gradients.dim())
    total = gradients.new_empty(gradients.shape[1:], dtype=dtype)
    width = math.prod(gradients.shape[2:])
    # The gradients are the largest buffer of a step: a part of them is copied at a time.
    for part in parts(gradients.shape[1], n * width * dtype.itemsize):
        kept = gradients[:, part].to(dtype).masked_fill(left_out, 0)
        into = total[part]
        into.copy_((weights @ kept.reshape(n, into.numel())).view(into.shape))
    return total.view(shape)


@operator(torch.ops.l2rw_ext.normalize_weights.default, fake=lambda u: u.new_empty((u.shape[0],)))
def normalize_weights(u: Tensor) -> Tensor:
    """Weights from scores, without waiting for the device.

    Eq. 8: w̃_i = max(u_i, 0); Eq. 9: w_i = w̃_i / (Σ_k w̃_k + δ(Σ_k w̃_k)). They sum to one, or are
    all zero where no score is positive. A score that is not finite counts as zero.

    Args:
        u: (n,) scores.

    Returns:
        (n,) weights in the dtype of u.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> ops.normalize_weights(torch.tensor([1.0, -2.0, 3.0]))
        tensor([0.2500, 0.0000, 0.7500])
    """
    Checks("u", u, dims=1)
    # In float64, as on the CPU: the sum of narrower scores cannot overflow.
    rectified = u.double()
    rectified = rectified.masked_fill(~(rectified.isfinite() & (rectified > 0)), 0)
    # That of float64 scores is scaled down first where it does.
    overflows = rectified.sum().isinf()
    rectified = torch.where(overflows, rectified / max(1, u.shape[0]), rectified)
    total = rectified.sum()
    return (rectified / total.masked_fill(total == 0, 1)).to(u.dtype)
