"""Facts about torch functions: which write to an argument, and how to run one as its body."""

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
    """A copy of a Python function of torch whose body runs under the mode.

    The original calls ``has_torch_function`` first and, under a mode, would send itself to the mode
    without end. In the copy that check answers no, and the operations inside are seen one by one.
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
