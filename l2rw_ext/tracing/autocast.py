"""Layers under autocast.

Autocast casts between the function that a model calls and the kernel. A use replaces the function,
so it casts as autocast would. Data is cast with autograd, which casts the gradient back; the
parameters of a use are cast without autograd, so that its roots stay the parameters themselves.

A table of what autocast does would differ between devices and releases. So the function is called
once for each combination of dtypes, and the dtype of its result shows what autocast does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2rw_ext.layers.torch_functions import tensors_in


class CastRule(NamedTuple):
    """The dtypes that autocast gives a function's operands and result; None for no change."""

    compute: torch.dtype | None
    output: torch.dtype | None


NO_CAST = CastRule(None, None)

_CAST_RULES: dict[Any, CastRule] = {}


@contextmanager
def enabled(device: str) -> Iterator[None]:
    """The caller's autocast, where it is off for a function that stands in for another."""
    torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)


def cast_rule(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    device: str,
) -> CastRule:
    """What autocast does with a function on these operands, found by calling it once."""
    lower = torch.get_autocast_dtype(device)
    key = (func, tuple((x.dtype, x.dim() == 0) for x in tensors), device, lower)
    found = _CAST_RULES.get(key)
    if found is None:
        found = _CAST_RULES[key] = _find_cast_rule(func, args, kwargs, tensors, lower)
    return found


def _find_cast_rule(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    lower: torch.dtype,
) -> CastRule:
    output = _output_dtype(func, args, kwargs, None)
    dtypes = [x.dtype for x in tensors if x.is_floating_point()]
    if output is None or torch.float64 in dtypes:
        return NO_CAST
    if output == lower and _output_dtype(func, args, kwargs, torch.float32) == lower:
        return CastRule(lower, lower)
    compute = output
    for dtype in dtypes:
        compute = torch.promote_types(compute, dtype)
    return CastRule(compute, output)


def _output_dtype(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype | None,
) -> torch.dtype | None:
    """The dtype of the function's result on copies of its operands, cast to ``dtype`` if given."""

    def copied(x: Tensor) -> Tensor:
        x = x.detach().clone()
        return x if dtype is None else cast(x, dtype)

    devices = {x.device for x in tensors_in((args, kwargs)) if x.is_cuda}
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            out = func(*each(copied, args), **each(copied, kwargs))
    finally:
        torch.set_autocast_cache_enabled(caches)
    return next((x.dtype for x in tensors_in(out) if x.is_floating_point()), None)


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` in ``dtype``, unless autocast would not cast it: float64 and non-floating tensors."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def each(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same arguments or result, with ``change`` applied to every tensor."""
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)(each(change, x) for x in tree)
    if isinstance(tree, dict):
        return {k: each(change, x) for k, x in tree.items()}
    return tree
