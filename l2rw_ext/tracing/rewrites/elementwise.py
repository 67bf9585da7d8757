"""Parameters that meet data by broadcasting, in every elementwise operation and in ``cat``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l2rw_ext.layers.base import Call, Function
from l2rw_ext.layers.broadcast import BROADCAST
from l2rw_ext.layers.torch_functions import writes
from l2rw_ext.tracing.interception import Interception, rewrites

_BROADCASTING = [
    getattr(holder, name)
    for holder, names in (
        (
            torch,
            "add sub subtract mul multiply div divide true_divide pow maximum minimum where lerp "
            "addcmul addcdiv rsub",
        ),
        (
            Tensor,
            "add add_ sub sub_ subtract mul mul_ multiply div div_ divide true_divide pow maximum "
            "minimum where lerp addcmul addcdiv __add__ __radd__ __iadd__ __sub__ __rsub__ "
            "__isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __pow__ "
            "__rpow__",
        ),
    )
    for name in names.split()
]


@rewrites(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to)
def _expand(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    root = args[0] if args else None
    out = func(*args, **kwargs)
    if isinstance(root, Tensor) and isinstance(out, Tensor):
        if mode.is_root(root) and out.requires_grad:
            return _expanded(mode, func, root, out)
        if not mode.is_data(root):
            mode.follow(out)
    return out


@rewrites(Tensor.repeat)
def _repeat(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    root = args[0]
    out = mode.other(func, args, kwargs)
    if mode.is_root(root) and isinstance(out, Tensor) and out.requires_grad:
        aligned = [1] * (out.dim() - root.dim()) + list(root.shape)
        pairs = zip(out.shape, aligned, strict=True)
        if all(size == own or own == 1 for size, own in pairs):
            found = _expanded(mode, func, root, out)
            return out if found is out else found.clone()  # which may be written to
    return out


@rewrites(Tensor.contiguous, Tensor.clone, torch.clone)
def _copy(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    """Remember that an expanded parameter that is copied still repeats its root."""
    out = mode.other(func, args, kwargs)
    root = args[0] if args else None
    if isinstance(root, Tensor) and mode.is_root(root) and mode.expanded_from(root) is not None:
        mode.follow_expansion(out, root)
    return out


def _expanded(mode: Interception, func: Function, root: Tensor, out: Tensor) -> Tensor:
    """A root repeated along leading or broadcast dimensions, or data with a row per example."""
    if mode.for_each_example(out) and (root.dim() < out.dim() or root.shape[0] == 1):
        met = meet(mode, func, root, out.shape)
        if met is not None:
            return met
    mode.follow_expansion(out, root)
    return out


@rewrites(*_BROADCASTING)
def _elementwise(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    if not mode.root_meets_data(args) or _promotes(mode, args) or kwargs.get("out") is not None:
        return NotImplemented
    if mode.is_root(args[0]) and writes(func, kwargs):
        return NotImplemented
    shape = torch.broadcast_shapes(*[a.shape for a in args if isinstance(a, Tensor)])
    first = len(mode.uses)
    met = [meet(mode, func, a, shape) if mode.is_root(a) else a for a in args]
    if any(m is None and a is not None for m, a in zip(met, args, strict=True)):
        return NotImplemented
    out = func(*met, **kwargs)
    mode.label(mode.uses[first:], out)
    return out


def _promotes(mode: Interception, operands: tuple[Any, ...]) -> bool:
    """Whether a parameter without dimensions has another dtype than the data.

    Such a parameter takes no part in type promotion, but its expanded form would.
    """
    dtypes = {a.dtype for a in operands if mode.is_data(a) and a.is_floating_point()}
    return any(mode.is_root(a) and a.dim() == 0 and {a.dtype} != dtypes for a in operands)


@rewrites(torch.cat, torch.concat, torch.concatenate, torch.stack)
def _join(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    parts = args[0] if args else None
    if not isinstance(parts, (tuple, list)) or not mode.root_meets_data(parts):
        return NotImplemented
    met, uses = [], []
    for a in parts:
        first = len(mode.uses)
        met.append(meet(mode, func, a, a.shape) if mode.is_root(a) else a)
        uses.append(mode.uses[first:])
    if any(m is None for m in met):
        return NotImplemented
    out = func(met, *args[1:], **kwargs)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    for part, made in enumerate(uses):
        mode.label(made, out, functools.partial(_ids_of, func, parts, part, dim))
    return out


def _ids_of(func: Function, parts: Sequence[Tensor], part: int, dim: int, ids: Tensor) -> Tensor:
    """The ids of one part of what was joined."""
    if func is torch.stack:
        return ids.select(dim, 0 if ids.shape[dim] == 1 else part)
    if ids.shape[dim] == 1:
        return ids
    sizes = [x.shape[dim] if x.dim() == ids.dim() else 0 for x in parts]  # torch leaves out (0,)
    return ids.narrow(dim, sum(sizes[:part]), sizes[part])


def meet(mode: Interception, func: Function, root: Tensor, shape: torch.Size) -> Tensor | None:
    """The root in the shape in which it meets data, as a use; None if it cannot be one."""
    base = mode.expanded_from(root)
    operation = getattr(func, "__name__", "broadcast").strip("_")
    out = mode.use(BROADCAST, Call(operation, root, root if base is None else base, None, shape))
    return None if out is NotImplemented else out
