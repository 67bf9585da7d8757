"""Dtypes that sums are formed in, matrix products in them, workspaces, examples without weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WORKSPACE_BYTES = 2**24
"""The size limit of an intermediate result, where the work can be divided."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of two matrices, or of two batches of them, summed and returned in ``dtype``."""
    if a.dtype == b.dtype == dtype:
        return a @ b
    narrow = a.dtype == b.dtype and dtype == torch.float32 and a.dtype.itemsize == 2
    differentiated = a.requires_grad or b.requires_grad
    if narrow and a.is_cuda and a.numel() and b.numel() and not differentiated:
        # This runs on tensor cores without copying an operand; torch offers it only on CUDA, and
        # without a derivative.
        multiply = torch.mm if a.dim() == 2 else torch.bmm
        return multiply(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def parts(count: int, bytes_each: int) -> Iterator[slice]:
    """Slices of ``count`` items that stay within the workspace, at least one item each."""
    step = max(1, WORKSPACE_BYTES // max(1, bytes_each))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    """w_i x_i, rounded to the dtype of x, and zero where w_i = 0: 0 · NaN is NaN."""
    left_out = without_weight(weights, x.dim())
    return (x * weights.view(left_out.shape)).to(x.dtype).masked_fill(left_out, 0)


def without_weight(weights: Tensor, dims: int) -> Tensor:
    """Where w_i = 0, in a shape that broadcasts along ``dims`` dimensions."""
    return (weights == 0).view(-1, *[1] * (dims - 1))
