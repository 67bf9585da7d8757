"""Runs models under an example map, and holds the map to the operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l2rw_ext.layers.torch_functions import tensors_in
from l2rw_ext.tracing.example_map import MIXED, ExampleMap, Exits, Verdict, judge


class Mapped(NamedTuple):
    verdict: Verdict
    example_map: ExampleMap
    losses: Tensor


def mapped(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: tuple[Any, Tensor],
    *,
    by_row: bool = False,
    kind: type[ExampleMap] = ExampleMap,
) -> Mapped:
    """The verdict on a plain forward; n is the length of the targets."""
    inputs, targets = batch
    permanent = [*model.named_parameters(), *model.named_buffers()]
    example_map = kind(len(targets), permanent, by_row=by_row)
    for x in tensors_in(batch):
        example_map.enter(x)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    with example_map, Exits(example_map):
        losses = loss_fn(model(*args), targets)
    return Mapped(judge(example_map, [losses]), example_map, losses)


_NOT_PERTURBED = ("empty", "as_strided", "resize", "set_")
"""Parts of the names of operations whose results have no value, or are said by geometry."""


class Checked(ExampleMap):
    """Repeats each operation with other values of one example, and looks at what changes."""

    def __init__(self, count: int, permanent: Iterable[tuple[str, Tensor]], **options: Any) -> None:
        super().__init__(count, permanent, **options)
        self.wrong: set[str] = set()
        self.changed: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kept = _copied((args, kwargs))
        ids = [self.values(x) for x in tensors_in((args, kwargs))]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        owned = any(bool(((i >= 0) & (i != MIXED)).any()) for i in ids)
        if owned and not drawn and not any(part in func._opname for part in _NOT_PERTURBED):
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._check(func, kept, ids, out)
        return out

    def _check(self, func: Any, kept: Any, ids: list[Tensor], out: Any) -> None:
        found = [self.values(x).expand(x.shape) for x in tensors_in(out)]
        args, kwargs = _copied(kept)
        plain = tensors_in(func(*args, **kwargs))
        for example in range(self.count):
            args, kwargs = _copied(kept)
            for x, i in zip(tensors_in((args, kwargs)), ids, strict=True):
                mine = (i == example).expand(x.shape)
                if bool(mine.any()):
                    x[mine] = _others(x, mine)
            try:
                others = tensors_in(func(*args, **kwargs))
            except (RuntimeError, IndexError):
                continue  # which these values are no arguments of
            for a, b, i in zip(plain, others, found, strict=False):  # no workspace without grad
                comparable = a.shape == b.shape and a.layout == torch.strided
                if comparable and a.dtype != torch.uint8:
                    differs = (a != b) & ~((a != a) & (b != b))
                    if bool(differs.any()):
                        self.changed.add(func._opname)
                    if bool((differs & (i != example) & (i != MIXED)).any()):
                        self.wrong.add(func._opname)


def _copied(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {k: _copied(v) for k, v in tree.items()}
    return type(tree)(map(_copied, tree)) if isinstance(tree, (tuple, list)) else tree


def _others(x: Tensor, mine: Tensor) -> Tensor:
    """Other values for some elements: those of an index stay in the range that x has."""
    if x.is_floating_point() or x.is_complex():
        return torch.randn_like(x[mine])
    if x.dtype == torch.bool:
        return ~x[mine]
    low, high = x.min(), x.max()
    return low + (x[mine] - low + 1) % (high - low + 1)
