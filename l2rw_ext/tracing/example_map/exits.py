"""Notes where values of data leave torch, and where a hook may change a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from l2rw_ext.tracing.fast_path import StepMode

from .map import ExampleMap

_TENSOR: Any = Tensor
_ATTRIBUTES = {_TENSOR.grad_fn.__get__: "grad_fn", _TENSOR.data.__set__: "data"}
"""The first may put a hook on the node; the second keeps the graph of the old values."""

_LEAVES = {
    *("numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "untyped_storage", "storage"),
    *("register_hook", "grad_fn", "data"),
}


class Exits(StepMode):
    """The function mode that belongs to an example map, for what no dispatcher shows.

    It must be entered last, so that what other function modes do does not count.
    """

    def __init__(self, example_map: ExampleMap) -> None:
        super().__init__()
        self._map = example_map

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if func in _ATTRIBUTES:
            name = _ATTRIBUTES[func] if args[0].requires_grad else ""
        if name in _LEAVES and self._map.owned(args[0]):
            self._map.note("unseen", name)
        # ``one_hot`` compares values with the number of classes, and decides nothing by them,
        # unless they say the number.
        self._map.checks_values = name == "one_hot" and (len(args) + len(kwargs or {})) > 1
        return func(*args, **(kwargs or {}))
