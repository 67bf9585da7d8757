"""Facts about torch functions: their names and keywords, which write, how to run one's body."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_WRITES: dict[Any, bool] = {}


@functools.cache
def _keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY)


def takes(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function that stands in for one of torch's knows these keywords.

    Torch also accepts names of NumPy's (``x`` for ``input``), and ``out``.
    """
    if not kwargs:
        return True
    known = _keywords(function)
    return known is None or kwargs.keys() <= known


def writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a torch function writes to its first argument, or to ``out``."""
    found = _WRITES.get(func)
    if found is None:
        name = getattr(func, "__name__", "")
        augmented = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
        in_place = name.endswith("_") and not name.endswith("__")
        found = _WRITES[func] = in_place or augmented or name in ("__setitem__", "__set__")
    return found or kwargs.get("out") is not None


def getters(*names: str) -> set[Any]:
    """The functions that a function mode receives when an attribute of a tensor is read."""
    return {getattr(Tensor, name).__get__ for name in names}


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among arguments or results, also in nested lists, tuples and dictionaries."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [x for branch in tree for x in tensors_in(branch)]


def for_subclasses(run: Callable[..., Any], tensors: Iterable[Tensor]) -> Callable[..., Any]:
    """What stands in for a torch function, on arguments among which are ``tensors``.

    If one is of a subclass, this makes of the result what it does in torch: a tensor of its class,
    for example. Inside of ``run`` it has no say, so that this is not for a subclass that stands for
    other tensors, and computes with those.
    """
    kinds = tuple(
        type(x)
        for x in tensors
        if type(x) is not Tensor
        and type(x).__torch_function__ is not torch._C._disabled_torch_function_impl
        and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    )
    if not kinds:
        return run
    return lambda *args, **kwargs: kinds[0].__torch_function__(run, kinds, args, kwargs)


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
