"""Operations through which the values of the data decide what is computed.

They run unchanged. But a row map that held at one step (for a batch that happened to be sorted)
need not hold at the next, so a plan of such a forward is checked at each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2rw_ext.layers.base import Function
from l2rw_ext.tracing.interception import Interception, rewrites


@rewrites(
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.__float__,
    torch.equal,
    torch.allclose,
)
def _read(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    if any(mode.is_data(a) for a in args):
        mode.data_dependent = mode.data_dependent or func.__name__
    return NotImplemented


@rewrites(Tensor.__getitem__)
def _index(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    _, index = args
    first = index[0] if isinstance(index, tuple) and index else index
    if isinstance(first, Tensor) and mode.is_data(first):
        mode.data_dependent = mode.data_dependent or "indexing"
    return NotImplemented


@rewrites(
    torch.gather,
    Tensor.gather,
    torch.index_select,
    Tensor.index_select,
    torch.take_along_dim,
    Tensor.take_along_dim,
    torch.scatter,
    Tensor.scatter,
    Tensor.scatter_,
    torch.scatter_add,
    Tensor.scatter_add,
    Tensor.scatter_add_,
    torch.index_add,
    Tensor.index_add,
    Tensor.index_add_,
    torch.index_copy,
    Tensor.index_copy,
    Tensor.index_copy_,
    torch.sort,
    Tensor.sort,
    torch.topk,
    Tensor.topk,
)
def _along(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    dims = [a for a in (*args[1:], kwargs.get("dim")) if isinstance(a, int)]
    x = args[0] if args else kwargs.get("input")
    within = dims and isinstance(x, Tensor) and all(d % max(x.dim(), 1) for d in dims)
    if not within and any(mode.is_data(a) for a in (*args, *kwargs.values())):
        mode.data_dependent = mode.data_dependent or func.__name__
    return NotImplemented


@rewrites(
    torch.take,
    Tensor.take,
    torch.masked_select,
    Tensor.masked_select,
    torch.index_put,
    Tensor.index_put,
    Tensor.index_put_,
    Tensor.masked_scatter,
    Tensor.masked_scatter_,
    torch.msort,
    Tensor.msort,
    torch.unique,
    Tensor.unique,
)
def _anywhere(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    if any(mode.is_data(a) for a in (*args, *kwargs.values())):
        mode.data_dependent = mode.data_dependent or func.__name__
    return NotImplemented
