"""Rules under autocast.

Autocast casts between the function that a model calls and the kernel. A rule replaces the function,
so it casts as autocast would. Data is cast with autograd, which casts the gradient back; the
parameters of a use are cast without autograd, so that its roots stay the parameters themselves.

A table of what autocast does would differ between devices and releases. So the function is called
once for each combination of dtypes, and the dtype of its result shows what autocast does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2rw_ext.devices import AUTOCAST_DEVICES
from l2rw_ext.layers.base import Mode
from l2rw_ext.layers.registry import BY_PARTS, Handler
from l2rw_ext.layers.torch_functions import writes


class _CastRule(NamedTuple):
    """The dtypes that autocast gives a function's operands and result; None for no change."""

    compute: torch.dtype | None
    output: torch.dtype | None


_NO_CAST = _CastRule(None, None)

_CAST_RULES: dict[Any, _CastRule] = {}


def handle(
    mode: Mode,
    handler: Handler,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a rule's handler with autocast off, on operands as autocast would cast them."""
    for device in AUTOCAST_DEVICES:
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            mode.narrow = True
    tensors = list(_tensors((*args, *kwargs.values())))
    data = [x for x in tensors if mode.is_data(x)]
    if (
        func in BY_PARTS
        or not torch.is_grad_enabled()
        or not data
        or not torch.is_autocast_enabled(data[0].device.type)
        or not any(mode.is_root(x) for x in tensors)
    ):
        return handler(mode, func, args, kwargs)
    device = data[0].device.type
    rule = _NO_CAST
    if not writes(func, kwargs):
        rule = _cast_rule(func, args, kwargs, tensors, device)
    if rule.compute is not None:
        args, kwargs = (
            _each(lambda x: cast(x, rule.compute) if mode.is_data(x) else x, tree)
            for tree in (args, kwargs)
        )
    before = mode.below_autocast
    mode.below_autocast = (device, rule.compute)
    torch.set_autocast_enabled(device, False)
    try:
        out = handler(mode, func, args, kwargs)
    finally:
        torch.set_autocast_enabled(device, True)
        mode.below_autocast = before
    return out if rule.output is None else _each(lambda x: cast(x, rule.output), out)


def call(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a function that a handler did not take, under the caller's autocast."""
    assert mode.below_autocast is not None
    device, _ = mode.below_autocast
    torch.set_autocast_enabled(device, True)
    try:
        return func(*args, **kwargs)
    finally:
        torch.set_autocast_enabled(device, False)


def _cast_rule(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    device: str,
) -> _CastRule:
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
) -> _CastRule:
    output = _output_dtype(func, args, kwargs, None)
    dtypes = [x.dtype for x in tensors if x.is_floating_point()]
    if output is None or torch.float64 in dtypes:
        return _NO_CAST
    if output == lower and _output_dtype(func, args, kwargs, torch.float32) == lower:
        return _CastRule(lower, lower)
    compute = output
    for dtype in dtypes:
        compute = torch.promote_types(compute, dtype)
    return _CastRule(compute, output)


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

    devices = {x.device for x in _tensors((*args, *kwargs.values())) if x.is_cuda}
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            out = func(*_each(copied, args), **_each(copied, kwargs))
    finally:
        torch.set_autocast_cache_enabled(caches)
    return next((x.dtype for x in _tensors((out,)) if x.is_floating_point()), None)


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` in ``dtype``, unless autocast would not cast it: float64 and non-floating tensors."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _each(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same arguments or result, with ``change`` applied to every tensor."""
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)(_each(change, x) for x in tree)
    if isinstance(tree, dict):
        return {k: _each(change, x) for k, x in tree.items()}
    return tree


def _tensors(tree: tuple[Any, ...] | list[Any]) -> Iterator[Tensor]:
    for x in tree:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from _tensors(x)
