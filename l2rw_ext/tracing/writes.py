"""Which parameters and tensor attributes a model's forward writes to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import DispatchMode, argument

STATISTICS = ("running_mean", "running_var")
"""Arguments that operators of batch norm write to, although not all of their schemas say so."""
_TRAINING = ("training", "train")
"""Their flags; where one is False, the statistics are only read, although a schema may say more."""


class Written:
    """The names of parameters and tensor attributes that the forward is known to write to.

    They are known once a step of a model has been watched. A forward may do other things in other
    modes, so that each combination of modes is watched once.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.layout: Any = None
        """What the last state found, for the next one (see ``task.state.Layout``)."""
        self._watched: set[Any] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"layout": None}  # which belongs to the model, not to a copy

    def known(self, kind: Any) -> bool:
        """Whether a step of this kind has been watched."""
        return kind in self._watched

    def learn(self, kind: Any) -> None:
        """Note that a step of this kind has been watched to its end."""
        self._watched.add(kind)

    def forget(self) -> None:
        """Watch again, because a step has written to more than was known."""
        self._watched.clear()


class BeforeWrites(DispatchMode):
    """Calls functions before an operation writes to a storage.

    Version counters would say only afterwards that a tensor was written to, and those of aliases
    that ``.data`` makes are not counted with it.

    Args:
        calls: the functions, by :func:`storage_of` the tensors.
    """

    supports_higher_order_operators = True

    def __init__(self, calls: Mapping[int, Sequence[Callable[[], None]]]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Nothing here is a call of the model's, which a function mode should see.
        with torch._C.DisableTorchFunction():
            for where in _targets(func, _trains(func, args, kwargs)):
                given = argument(*where, args, kwargs)
                for x in given if isinstance(given, (list, tuple)) else (given,):
                    storage = storage_of(x) if isinstance(x, Tensor) else None
                    for call in () if storage is None else self._calls.get(storage, ()):
                        call()
            return func(*args, **kwargs)


def storage_of(x: Tensor) -> int | None:
    """What tells a storage from others, shared by all views and aliases; None if there is none."""
    if x.layout != torch.strided or x.is_nested:
        return None
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a subclass that wraps other tensors
        return None


def place_of(x: Tensor) -> tuple[Any, Any]:
    """Where a tensor lies; it has another place after ``x.data = other``."""
    return storage_of(x), x.storage_offset()


def _trains(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation may write to statistics of batch norm."""
    return all(argument(*flag, args, kwargs) is not False for flag in _flags(func))


@functools.cache
def _flags(func: Any) -> tuple[tuple[int, str], ...]:
    return tuple((k, a.name) for k, a in enumerate(_arguments(func)) if a.name in _TRAINING)


@functools.cache
def _targets(func: Any, trains: bool) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operation writes to."""
    return tuple(
        (k, a.name)
        for k, a in enumerate(_arguments(func))
        if (trains if a.name in STATISTICS else a.alias_info is not None and a.alias_info.is_write)
    )


def _arguments(func: Any) -> Sequence[Any]:
    schema = getattr(func, "_schema", None)  # a higher-order operator has none
    return () if schema is None else schema.arguments
