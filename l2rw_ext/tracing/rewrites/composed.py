"""Functions that are composed of layers, and run as such."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext.layers import corrections
from l2rw_ext.layers.base import Function
from l2rw_ext.layers.embedding import row_of
from l2rw_ext.layers.torch_functions import inside
from l2rw_ext.tracing.interception import Interception, rewrites


@rewrites(F.multi_head_attention_forward, by_parts=True)
def _multi_head_attention(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    """Projections are linear."""
    with mode:
        return inside(F.multi_head_attention_forward)(*args, **kwargs)


@rewrites(F.linear)
def _vector(
    mode: Interception, func: Function, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    """A weight of one dimension is a matrix of one row."""
    if weight.dim() != 1 or not mode.is_use(input, weight, bias) or not torch.is_grad_enabled():
        return NotImplemented
    with mode:
        out = F.linear(input, weight.unsqueeze(0)).squeeze(-1)
        return out if bias is None else out + bias


@rewrites(F.bilinear)
def _bilinear(
    mode: Interception,
    func: Function,
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Any:
    """A linear layer on the products of all pairs of features."""
    operands = [input1, input2, weight, bias]
    if not mode.root_meets_data(operands) or not torch.is_grad_enabled():
        return NotImplemented
    with mode:
        pairs = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
        return F.linear(pairs, weight.flatten(1), bias)


@rewrites(F.prelu, Tensor.prelu)
def _prelu(mode: Interception, func: Function, input: Tensor, weight: Tensor) -> Any:
    """PReLU: x where it is positive, and elsewhere x times the slope of its channel."""
    operands = [input, weight]
    if not mode.root_meets_data(operands) or input.dim() == 0 or not torch.is_grad_enabled():
        return NotImplemented
    with mode:
        return corrections.prelu(input, weight)


@rewrites(F.embedding_bag)
def _embedding_bag(
    interception: Interception,
    func: Function,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """The sum of weighted rows, or without weights the largest of all, put together by autograd."""
    if max_norm is not None or scale_grad_by_freq or sparse or input.numel() == 0:
        return NotImplemented
    if not interception.is_use(input, weight, None) or not torch.is_grad_enabled():
        return NotImplemented
    if input.dim() != 2:
        interception.unruled.setdefault(id(weight), "embedding_bag with offsets")
        return NotImplemented
    if (mode == "max") == (per_sample_weights is not None):
        return NotImplemented
    padding = row_of(padding_idx, weight)
    with interception:
        rows = F.embedding(input, weight, padding)
        padded = torch.zeros_like(input) if padding is None else input == padding
        padded = padded.bool().unsqueeze(-1)
        if per_sample_weights is not None:
            return (rows * per_sample_weights.unsqueeze(-1)).masked_fill(padded, 0).sum(1)
        largest = rows.masked_fill(padded, -torch.inf).max(1).values
        return largest.masked_fill(padded.all(1), 0)
