"""The numbers of the program that a forward computes with.

The size of a batch may enter what is computed (a sum divided by ``len(x)``) where values do not
show it, because a zero multiplies it. The dispatcher shows each number, and two forwards of batches
of other sizes compute with the same ones unless the size enters.
"""

from __future__ import annotations

import functools
from typing import Any

from .dispatch import DispatchMode

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
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "_opname", "")
        if name == "lift_fresh" and args[0].numel() == 1:
            self.found.add((name, args[0].item()))  # ``torch.tensor`` of one number
        elif name and name not in _COUNTING:
            for where in _numbers(func):
                value = args[where] if isinstance(where, int) and where < len(args) else None
                if not isinstance(where, int):
                    value = (kwargs or {}).get(where)
                if isinstance(value, (int, float, complex)):
                    self.found.add((name, value))
        return out


@functools.cache
def _numbers(func: Any) -> tuple[int | str, ...]:
    """Where an operation takes numbers to compute with: positions and names of arguments."""
    found: list[int | str] = []
    for position, a in enumerate(func._schema.arguments):
        # A tensor may be given as a number.
        if str(a.real_type).removeprefix("Optional[").rstrip("]") in ("number", "float", "Tensor"):
            found.append(a.name if a.kwarg_only else position)
    return tuple(found)
