"""Dual tensors, and the registry of operations whose tangent has a separate rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual


class Mode(Protocol):
    """The methods of the mode that a rule calls; :class:`.mode.Tangents` is that mode."""

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


def unpack(x: Any) -> tuple[Any, Any]:
    """The primal with its autograd graph, and the tangent; each is None if it is absent."""
    if x is None:
        return None, None
    primal, tangent = torch._VF._unpack_dual(x, level=0)
    return (x, None) if tangent is None else (primal, tangent)


def tangent_of(x: Tensor) -> Tensor | None:
    """The tangent of a dual tensor, None for any other."""
    tangent: Tensor | None = torch._VF._unpack_dual(x, level=0)[1]
    return tangent


def dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """The dual tensor, or the primal itself if there is no tangent."""
    if tangent is None:
        return primal
    joined: Tensor = make_dual(primal, tangent)
    return joined
