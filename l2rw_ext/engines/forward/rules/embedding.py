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
from l2rw_ext.engines.forward.registry import Function, Mode, handles, operands
from l2rw_ext.errors import NotExactError

_SUM, _MEAN = 0, 1


@handles(torch.embedding)
def _embedding(mode: Mode, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    weight, index, padding, by_frequency, sparse = operands(
        args, kwargs, "weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"
    )
    _refuse_scaling(by_frequency)
    W, V = unpack(weight)
    padding = -1 if padding is None else padding
    primal = _with_sparse_gradient(mode, weight, W, sparse)
    y = func(primal, index, padding, False, bool(sparse))
    mode.entered_by(y)
    with torch.no_grad():
        dy = func(V, index)
        if padding >= 0:
            dy.masked_fill_((index == padding).unsqueeze(-1), 0)
    return dual(y, dy)


@handles(torch.embedding_bag)
def _embedding_bag(
    mode: Mode, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    weight, index, offsets, by_frequency, how, sparse, scale, *rest = operands(
        args,
        kwargs,
        "weight",
        "indices",
        "offsets",
        "scale_grad_by_freq",
        "mode",
        "sparse",
        "per_sample_weights",
        "include_last_offset",
        "padding_idx",
    )
    _refuse_scaling(by_frequency)
    how = how or _SUM
    if how not in (_SUM, _MEAN):
        raise NotExactError("embedding_bag of maxima has no forward-mode derivative")
    W, V = unpack(weight)
    s, ds = unpack(scale)
    rest = [bool(rest[0]), rest[1]]
    primal = _with_sparse_gradient(mode, weight, W, sparse)
    y, *others = func(primal, index, offsets, False, how, bool(sparse), s, *rest)
    mode.entered_by(y)
    with torch.no_grad():
        dy = None
        if V is not None:
            dy = func(V, index, offsets, False, how, False, s, *rest)[0]
        if ds is not None:
            through = func(W, index, offsets, False, how, False, ds, *rest)[0]
            dy = through if dy is None else dy.add_(through)
    return dual(y, dy), *others


def _with_sparse_gradient(mode: Mode, weight: Tensor, primal: Tensor, sparse: Any) -> Tensor:
    """The parameter itself where its gradient is sparse, which the view in a dual refuses."""
    parameter = mode.parameter_of(weight) if sparse else None
    return primal if parameter is None else parameter


def _refuse_scaling(by_frequency: bool | None) -> None:
    if by_frequency:
        raise NotExactError(
            "scale_grad_by_freq scales gradients, and the forward derivative cannot follow"
        )
