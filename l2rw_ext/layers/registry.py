"""The registry: which handler takes a torch function that is called with data and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from .base import Mode

Handler: TypeAlias = Callable[[Mode, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(mode, function, args, kwargs) -> result: what the registry holds for an operation."""

REGISTRY: dict[Any, Handler] = {}

BY_PARTS: set[Any] = set()
"""Functions whose handler runs them under the mode again, so that autocast acts on their parts."""


def handles(*functions: Any, by_parts: bool = False) -> Callable[[Handler], Handler]:
    """Register a handler for torch functions."""

    def register(handler: Handler) -> Handler:
        for function in functions:
            REGISTRY[function] = handler
            if by_parts:
                BY_PARTS.add(function)
        return handler

    return register
