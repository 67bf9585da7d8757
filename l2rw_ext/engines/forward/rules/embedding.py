"""Embeddings, whose backward is not the derivative of their forward in two respects.

The gradient leaves out the row of the padding index, though the forward reads it, and may be scaled
by frequency. The scores are defined by gradients, so that the tangent leaves the row out as well,
and scaling is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2rw_ext.engines.forward.dual import dual, unpack
from l2rw_ext.engines.forward.mode import Tangents, carries
from l2rw_ext.errors import NotExactError
from l2rw_ext.layers.base import Function
from l2rw_ext.layers.embedding import EMBEDDING

_SUM, _MEAN = 0, 1


@carries(torch.embedding)
def _embedding(
    mode: Tangents,
    func: Function,
    weight: Tensor,
    input: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    _refuse_scaling(scale_grad_by_freq)
    W, V = unpack(weight)
    primal = _with_sparse_gradient(mode, weight, W, sparse)
    y = func(primal, input, padding_idx, False, sparse)
    mode.entered_by(y)
    padding = padding_idx if padding_idx >= 0 else None
    with torch.no_grad():
        dy = EMBEDDING.term(input, V, None, padding)
    return dual(y, dy)


@carries(torch.embedding_bag)
def _embedding_bag(
    tangents: Tangents,
    func: Function,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    _refuse_scaling(scale_grad_by_freq)
    if mode not in (_SUM, _MEAN):
        raise NotExactError("embedding_bag of maxima has no forward-mode derivative")
    W, V = unpack(weight)
    s, ds = unpack(per_sample_weights)
    rest = include_last_offset, padding_idx
    primal = _with_sparse_gradient(tangents, weight, W, sparse)
    y, *others = func(primal, indices, offsets, False, mode, sparse, s, *rest)
    tangents.entered_by(y)
    with torch.no_grad():
        dy = None
        if V is not None:
            dy = func(V, indices, offsets, False, mode, False, s, *rest)[0]
        if ds is not None:
            through = func(W, indices, offsets, False, mode, False, ds, *rest)[0]
            dy = through if dy is None else dy.add_(through)
    return dual(y, dy), *others


def _with_sparse_gradient(mode: Tangents, weight: Tensor, primal: Tensor, sparse: bool) -> Tensor:
    """The parameter itself where its gradient is sparse, which the view in a dual refuses."""
    parameter = mode.parameter_of(weight) if sparse else None
    return primal if parameter is None else parameter


def _refuse_scaling(by_frequency: bool) -> None:
    if by_frequency:
        raise NotExactError(
            "scale_grad_by_freq scales gradients, and the forward derivative cannot follow"
        )
