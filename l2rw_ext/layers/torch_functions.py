"""Facts about torch functions: which write to an argument, and how one runs as its own body."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

_WRITES: dict[Any, bool] = {}


def writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a torch function writes to its first argument, or to ``out``."""
    found = _WRITES.get(func)
    if found is None:
        name = getattr(func, "__name__", "")
        augmented = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
        in_place = name.endswith("_") and not name.endswith("__")
        found = _WRITES[func] = in_place or augmented or name in ("__setitem__", "__set__")
    return found or kwargs.get("out") is not None


def inside(func: Callable[..., Any]) -> Callable[..., Any]:
    """A composite Python function whose body runs under the mode instead of being sent to it.

    A composite asks ``has_torch_function`` first and, under a mode, sends itself to the mode for
    ever; this copy of it answers no, and the operations inside are seen one by one.
    """
    assert isinstance(func, types.FunctionType)
    scope = dict(func.__globals__)
    for question in ("", "_unary", "_variadic"):
        scope[f"has_torch_function{question}"] = lambda *_: False
    clone = types.FunctionType(
        func.__code__, scope, func.__name__, func.__defaults__, func.__closure__
    )
    clone.__kwdefaults__ = func.__kwdefaults__
    return clone
