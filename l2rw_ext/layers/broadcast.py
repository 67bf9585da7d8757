"""A parameter that meets data by broadcasting: x + p, x * p, a class token put in front.

The parameter is expanded to the shape in which it meets the data, and autograd differentiates the
operation itself. The gradient that arrives at the expanded parameter, summed over all dimensions
but the example's, is the per-example gradient. One mechanism serves every elementwise operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import accumulation_dtype

from .base import Mode, Roots, RowMap, Rule, Use
from .costs import Cost, Size, rates_of
from .registry import handles
from .torch_functions import writes


class _BroadcastUse(torch.autograd.Function):
    """p.expand(shape)."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, use: Use) -> Tensor:
        ctx.use = use
        assert use.weight is not None
        return use.weight.detach().expand(use.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:
        use: Use = ctx.use
        assert use.sink is not None
        with use.sink.backward_of(use):
            use.sink.report(use, g, g)
        return None, None


class Broadcast(Rule):
    """y = p in the shape of the data; always per example."""

    name = "broadcast"
    reduces = True

    def leading(self, use: Use, g: Tensor) -> int:
        """All dimensions: the example is one of those that p was expanded along."""
        return g.dim()

    def maps(self, use: Use, g: Tensor, size: int) -> Iterator[RowMap]:
        """The row maps whose example is a dimension that p was expanded along, or a part of one.

        It is a part of one if several rows (windows of an image) belong to each example.
        """
        along = [d for d, own in enumerate(_aligned(use, g)) if own == 1]
        exact = [d for d in along if g.shape[d] == size]
        for axis in exact or [d for d in along if size and g.shape[d] % size == 0 < g.shape[d]]:
            after = math.prod(g.shape[axis + 1 :])
            each = g.shape[axis] // size
            for inner in dict.fromkeys((each, 1)):
                yield RowMap(g.numel() // (size * inner * after), size, inner * after)

    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """Per-example gradients (N, p.numel()); z is not used and is the same tensor."""
        aligned = _aligned(use, g)
        axis = None
        if not rows.whole:
            g, aligned, axis = _split_axis(g, aligned, rows)
        reduced = [d for d in range(g.dim()) if d != axis and aligned[d] == 1 and g.shape[d] != 1]
        if reduced:
            g = g.sum(reduced, keepdim=True, dtype=accumulation_dtype(g.dtype))
        g = g.reshape(1, -1) if axis is None else g.movedim(axis, 0).reshape(rows.size, -1)
        return g, g

    def costs(self, use: Use, size: Size) -> dict[str, Cost]:
        """One pass over g."""
        assert use.weight is not None
        speed = rates_of(use.weight)
        elements = math.prod(use.shape)
        width = use.weight.numel()
        item = use.weight.element_size()
        return {
            "per example": Cost(
                elements, 0.5 * size.n * width, size.n * width * item, elements * item / speed.bytes
            )
        }

    def direction(self, use: Use, z: Tensor, g: Tensor) -> Roots:
        """The sum over the clean examples."""
        return g.sum(0, dtype=accumulation_dtype(g.dtype)), None

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = <V, G_i>."""
        weight, _ = direction
        assert weight is not None
        return g.to(weight.dtype) @ weight.reshape(-1)

    def weighted_gradient(
        self, use: Use, z: Tensor, g: Tensor, weights: Tensor, active: Tensor | None
    ) -> Roots:
        """Σ w_i G_i, rows with w = 0 left out."""
        return ops.weighted_sum(g, weights), None


def _aligned(use: Use, g: Tensor) -> list[int]:
    """The parameter's shape with leading ones, one size for each dimension of g."""
    assert use.weight is not None
    return [1] * (g.dim() - use.weight.dim()) + list(use.weight.shape)


def _split_axis(g: Tensor, aligned: list[int], rows: RowMap) -> tuple[Tensor, list[int], int]:
    """G with a separate dimension for the example, p's shape next to it, and that dimension."""
    after = 1
    for axis in reversed(range(g.dim())):
        size = g.shape[axis]
        inner, rest = divmod(rows.inner, after)
        if aligned[axis] == 1 and not rest and size and size % (rows.size * inner) == 0:
            split = [size // (rows.size * inner), rows.size, inner]
            shape = [*g.shape[:axis], *split, *g.shape[axis + 1 :]]
            return g.reshape(shape), [*aligned[:axis], 1, 1, 1, *aligned[axis + 1 :]], axis + 1
        after *= size
    raise AssertionError(f"{rows} is no map of a gradient of shape {tuple(g.shape)}")


BROADCAST = Broadcast()

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

FACTORS = {"mul", "rmul", "imul", "multiply", "pow", "lerp", "addcmul"}
"""Operations that hide one operand where another is zero."""

_JOINING = [torch.cat, torch.concat, torch.concatenate, torch.stack]

_EXPANDING = [Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to]


@handles(*_EXPANDING)
def _expand(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    root = args[0] if args else None
    out = func(*args, **kwargs)
    if isinstance(root, Tensor) and isinstance(out, Tensor):
        if mode.is_root(root) and out.requires_grad:
            return _expanded(mode, func, root, out)
        if not mode.is_data(root):
            mode.follow(out)
    return out


@handles(Tensor.repeat)
def _repeat(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    root = args[0]
    out = mode.other(func, args, kwargs)
    if mode.is_root(root) and isinstance(out, Tensor) and out.requires_grad:
        aligned = [1] * (out.dim() - root.dim()) + list(root.shape)
        pairs = zip(out.shape, aligned, strict=True)
        if all(size == own or own == 1 for size, own in pairs):
            found = _expanded(mode, func, root, out)
            return out if found is out else found.clone()  # which may be written to
    return out


@handles(Tensor.contiguous, Tensor.clone, torch.clone)
def _copy(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Remember that an expanded parameter that is copied still repeats its root."""
    out = mode.other(func, args, kwargs)
    root = args[0] if args else None
    if isinstance(root, Tensor) and mode.is_root(root) and mode.expanded_from(root) is not None:
        mode.follow_expansion(out, root)
    return out


def _expanded(mode: Mode, func: Callable[..., Any], root: Tensor, out: Tensor) -> Tensor:
    """A root repeated along leading or broadcast dimensions, or data with a row per example."""
    if mode.for_each_example(out) and (root.dim() < out.dim() or root.shape[0] == 1):
        met = meet(mode, func, root, out.shape)
        if met is not None:
            return met
    mode.follow_expansion(out, root)
    return out


@handles(*_BROADCASTING)
def _elementwise(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if (
        root_meets_data(mode, args)
        and not _promotes(mode, args)
        and not _writes_root(mode, func, args, kwargs)
    ):
        shape = torch.broadcast_shapes(*[a.shape for a in args if isinstance(a, Tensor)])
        met = [meet(mode, func, a, shape) if mode.is_root(a) else a for a in args]
        if all(m is not None or a is None for m, a in zip(met, args, strict=True)):
            return func(*met, **kwargs)
    return mode.other(func, args, kwargs)


@handles(*_JOINING)
def _join(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    parts = args[0] if args else None
    if isinstance(parts, (tuple, list)) and root_meets_data(mode, parts):
        met = [meet(mode, func, a, a.shape) if mode.is_root(a) else a for a in parts]
        if all(m is not None for m in met):
            return func(met, *args[1:], **kwargs)
    return mode.other(func, args, kwargs)


def _promotes(mode: Mode, operands: tuple[Any, ...]) -> bool:
    """Whether a parameter without dimensions has another dtype than the data.

    Such a parameter takes no part in type promotion, but its expanded form would.
    """
    dtypes = {a.dtype for a in operands if mode.is_data(a) and a.is_floating_point()}
    return any(mode.is_root(a) and a.dim() == 0 and {a.dtype} != dtypes for a in operands)


def _writes_root(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether the result goes to the parameter, or to a tensor that is given."""
    return kwargs.get("out") is not None or (mode.is_root(args[0]) and writes(func, kwargs))


def root_meets_data(mode: Mode, operands: Sequence[Any]) -> bool:
    """Whether there are roots as well as data among the operands."""
    root = data = False
    for a in operands:
        if isinstance(a, Tensor):
            root = root or mode.is_root(a)
            data = data or mode.is_data(a)
    return root and data


def meet(mode: Mode, func: Callable[..., Any], root: Tensor, shape: torch.Size) -> Tensor | None:
    """The root in the shape in which it meets data, as a use."""
    base = mode.expanded_from(root)
    use = mode.use(
        BROADCAST,
        getattr(func, "__name__", "broadcast").strip("_"),
        root if base is None else base,
        None,
        None,
        root,
    )
    if use is None:
        return None
    use.shape = tuple(shape)
    out: Tensor = _BroadcastUse.apply(mode.token, use)
    return out
