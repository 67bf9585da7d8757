"""The numbers of the program that a forward computes with.

The size of a batch may enter what is computed (a sum divided by ``len(x)``) where values do not
show it, because a zero multiplies it. The dispatcher shows each number, and two forwards of batches
of other sizes compute with the same ones unless the size enters.
"""

from __future__ import annotations

import functools
from typing import Any

from .dispatch import DispatchMode, argument

_COUNTING = ("arange", "range", "linspace", "lift_fresh")
"""Operations whose numbers say how many elements there are, or are looked at by themselves."""


class Numbers(DispatchMode):
    """Collects, in a forward, pairs of an operation and a number that it computes with.

    Sizes, dimensions and places are not such numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, float | complex]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "_opname", "")
        if name == "lift_fresh" and args[0].numel() == 1:
            self.found.add((name, args[0].item()))  # ``torch.tensor`` of one number
        elif name and name not in _COUNTING:
            for where in _numbers(func):
                value = argument(*where, args, kwargs)
                if isinstance(value, (int, float, complex)):
                    self.found.add((name, value))
        return out


@functools.cache
def _numbers(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that may be numbers to compute with."""
    kinds = ("number", "float", "Tensor")  # a tensor may be given as a number
    return tuple(
        (position, a.name)
        for position, a in enumerate(func._schema.arguments)
        if str(a.real_type).removeprefix("Optional[").rstrip("]") in kinds
    )
