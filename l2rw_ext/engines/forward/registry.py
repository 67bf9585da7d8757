"""The registry: which torch functions have a rule for their tangent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from torch import Tensor


class Mode(Protocol):
    """What a rule calls of its mode, :class:`~l2rw_ext.engines.forward.mode.Tangents`."""

    attention: bool

    def __enter__(self) -> Any:
        """Enter the mode again: functions that are called inside reach their rules."""

    def __exit__(self, *error: Any) -> None:
        """Leave the mode."""

    def parameter_of(self, dual: Tensor) -> Tensor | None:
        """Return the parameter that a dual tensor stands for; None for any other."""

    def entered_by(self, out: Tensor) -> None:
        """Note that a rule gave a parameter itself to the operation that made ``out``."""


Function: TypeAlias = Callable[..., Any]
Handler: TypeAlias = Callable[[Mode, Function, tuple[Any, ...], dict[str, Any]], Any]
"""(mode, function, arguments, keyword arguments) -> what the function returns, as dual tensors."""

REGISTRY: dict[Function, Handler] = {}


def handles(*functions: Function) -> Callable[[Handler], Handler]:
    """Register a handler for torch functions."""

    def register(handler: Handler) -> Handler:
        for function in functions:
            REGISTRY[function] = handler
        return handler

    return register


def operands(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """The first arguments of a call, by position or taken out of ``kwargs``; None where absent."""
    given = list(args[: len(names)])
    return given + [kwargs.pop(name, None) for name in names[len(given) :]]
