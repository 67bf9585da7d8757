"""Writes to indexed places, where a place that is named twice keeps only one of its values.

Autograd's gradient of such a write goes to all values written to the place; the derivative of the
forward goes only to the last. The scores are defined by gradients, so such a write is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from l2rw_ext.engines.forward.dual import tangent_of
from l2rw_ext.engines.forward.mode import Tangents, carries
from l2rw_ext.errors import NotExactError
from l2rw_ext.layers.base import Function

Count: TypeAlias = Callable[..., Tensor | None]
"""(written tensor, *args, **kwargs) -> how often places are named; None where values add up."""


def _scatter(x: Tensor, dim: int, index: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    counts: Tensor = _zeros(x).scatter_add(dim, index, torch.ones_like(index))
    return counts


def _index(x: Tensor, dim: int, index: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    counts: Tensor = torch.unique(index, return_counts=True)[1]
    return counts


def _index_put(x: Tensor, indices: Any, values: Any, accumulate: bool = False) -> Tensor | None:
    one = torch.ones((), dtype=torch.int64, device=x.device)
    return None if accumulate else _zeros(x).index_put(tuple(indices), one, accumulate=True)


def _put(x: Tensor, index: Tensor, source: Any, accumulate: bool = False) -> Tensor | None:
    return None if accumulate else _zeros(x).put(index, torch.ones_like(index), accumulate=True)


def _set_item(x: Tensor, index: Any, value: Any) -> Tensor | None:
    parts = index if isinstance(index, tuple) else (index,)
    if all(part is None or isinstance(part, (int, slice, type(...))) for part in parts):
        return None
    places = torch.arange(x.numel(), device=x.device).view(x.shape)[index]
    counts: Tensor = torch.unique(places, return_counts=True)[1]
    return counts


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.int64, device=x.device)


def _register(functions: list[Function], count: Count) -> None:
    @carries(*functions)
    def _write(mode: Tangents, func: Function, /, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if any(isinstance(value, Tensor) and tangent_of(value) is not None for value in values):
            counts = count(input, *args, **kwargs)
            if counts is not None and counts.numel() and int(counts.max()) > 1:
                raise NotExactError(
                    f"{func.__name__} writes to one place twice; its gradient goes to both values, "
                    "its derivative to the last"
                )
        return func(input, *args, **kwargs)


_COUNTS: dict[str, Count] = {
    "scatter": _scatter,
    "index_copy": _index,
    "index_fill": _index,
    "index_put": _index_put,
    "put": _put,
}
for _name, _count in _COUNTS.items():
    _names = (_name, f"{_name}_")
    _register([getattr(o, n) for o in (torch, Tensor) for n in _names if hasattr(o, n)], _count)
_register([Tensor.__setitem__], _set_item)
