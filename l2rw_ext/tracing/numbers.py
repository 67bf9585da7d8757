"""What the program computes with in a forward besides data and members: numbers and constants.

The size of a batch may enter what is computed (a sum divided by ``len(x)``) where values do not
show it, because a zero multiplies it. Forwards of batches of other sizes compute with the same
numbers and constants unless the size enters.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .dispatch import argument
from .example_map import ExampleMap
from .example_map.call import Call
from .example_map.ids import unowned
from .example_map.storages import Pair, key, plain

_COUNTING = ("arange", "range", "linspace")
"""Operations whose numbers say how many elements there are; what they make is a constant."""


class Numbers(ExampleMap):
    """Collects numbers, and constants that meet data or members, with what operation takes them.

    Sizes, dimensions and places are not such numbers. Of a constant that is alike along a
    dimension, as zeros for each example are, one place counts. Drawn numbers do not count.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.found: dict[str, set[Any]] = {}
        """By part of the forward, see :meth:`part`."""
        self._drawn: set[int] = set()
        self._of_members: set[int] = set(self._permanent)
        """Storages of parameters and buffers, and of what is computed from them without data."""
        self._repeated: set[int] = set()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context for a part of the forward."""
        self._into = self.found.setdefault(name, set())
        with self:
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = getattr(func, "_opname", "")
        if name and not self._resting and name not in _COUNTING:
            for where in _numbers(func):
                value = argument(*where, args, kwargs)
                if isinstance(value, (int, float, complex)):
                    self._into.add((name, value))
        return out

    def _follow(self, c: Call) -> None:
        made = [*c.outs, *c.writes]
        drawn = torch.Tag.nondeterministic_seeded in c.func.tags
        if drawn or any(key(x) in self._drawn for x in c.tensors if plain(x)):
            self._drawn.update(key(x) for x in made if plain(x))
        super()._follow(c)

    def _without_data(self, c: Call) -> None:
        tensors = [x for x in c.tensors if plain(x)]
        if any(key(x) in self._of_members for x in tensors):
            # A member that is zero would hide the constant where both together meet data.
            self._collect(c.name, tensors)
            made = {key(x) for x in (*c.outs, *c.writes) if plain(x)}
            self._of_members |= made
            if c.name == "repeat":
                self._repeated |= made
        super()._without_data(c)

    def _meets_constants(self, c: Call, pairs: list[Pair]) -> None:
        constants = (x for x, ids in zip(c.tensors, pairs, strict=True) if all(map(unowned, ids)))
        self._collect(c.name, filter(plain, constants))

    def _collect(self, name: str, found: Iterable[Tensor]) -> None:
        for x in found:
            if key(x) in self._of_members and key(x) not in self._repeated:
                # Its values may change; if it has a row for each example, so may these differ.
                sizes = zip(x.shape, x.stride(), strict=True)
                self._into.add((name, tuple(size if stride else 1 for size, stride in sizes)))
            elif key(x) not in self._of_members and key(x) not in self._drawn:
                self._into.add((name, _digest(x)))


def _digest(x: Tensor) -> tuple[Any, ...]:
    """Shape and elements of a constant."""
    for d, size in enumerate(x.shape):
        if size > 1 and bool((x == x.narrow(d, 0, 1)).all()):
            x = x.narrow(d, 0, 1)
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tuple(x.shape), x.dtype, hash(data.numpy().tobytes())


@functools.cache
def _numbers(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that may be numbers to compute with."""
    kinds = ("number", "float", "Tensor")  # a tensor may be given as a number
    return tuple(
        (position, a.name)
        for position, a in enumerate(func._schema.arguments)
        if str(a.real_type).removeprefix("Optional[").rstrip("]") in kinds
    )
