"""The decorator that makes one function of an operator's signature, docstring and composition.

What is decorated computes the operator with torch's operations, after checks of its arguments. What
the decorator returns has the same signature and docstring and calls the compiled operator.

No composition reads a value on the host, or makes a shape depend on one, so that none waits for the
device and all can be captured in a CUDA graph. An index out of range is therefore found by the
device. They ignore the caller's autocast, as the compiled kernels do. Matrix products and
convolutions of float32 follow torch's precision settings, and sums are as reproducible as the
operations of torch that form them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from l2rw_ext.devices import without_autocast

from . import _kernels
from ._checks import ArgumentError
from .arithmetic import accumulation_dtype

P = ParamSpec("P")
R = TypeVar("R")


class Operator(Protocol[P, R]):
    """A compiled operator as a typed function.

    Attributes:
        compiled: the operator that the function calls.
        composition: the same in torch's operations; a kernel is measured against it.
    """

    compiled: torch._ops.OpOverload[..., Any]
    composition: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the compiled operator."""


OPERATORS: dict[str, Operator[..., Any]] = {}
"""All operators by name."""


def operator(
    compiled: torch._ops.OpOverload[..., Any], *, fake: Callable[..., object]
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Make a typed function of a compiled operator and its composition.

    Args:
        compiled: the operator.
        fake: returns empty results with their shapes, dtypes and strides; its positional arguments
            may end before those that have a default.
    """
    qualified = compiled._schema.name
    name = qualified.split("::")[1]

    def decorate(body: Callable[P, R]) -> Operator[P, R]:
        @functools.wraps(body)
        def composition(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                with without_autocast():
                    return body(*args, **kwargs)
            except ArgumentError as error:
                raise RuntimeError(f"{qualified}: {error}") from None

        @functools.wraps(body)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.compiler.is_dynamo_compiling() and not _kernels.decided:
                _kernels.decide()
            results: R = compiled(*args, **kwargs)
            return results

        function = cast(Operator[P, R], call)
        function.compiled = compiled
        function.composition = composition
        # No schema can have tags at this ABI target. Without the first, inductor copies what it has
        # laid out anew (images, channels last) back to the strides of eager mode. Kernels read any
        # strides, and a fake knows what follows from them.
        compiled._tags = [torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag]
        _kernels.register(name, composition)
        torch.library.register_fake(qualified, fake, lib=_library)
        torch.library.register_autograd(qualified, _refuse_backward(qualified), lib=_library)
        OPERATORS[name] = function
        return function

    return decorate


def scores(tensor: Tensor) -> Tensor:
    """For a fake: empty scores of the examples of a tensor."""
    return tensor.new_empty((tensor.shape[0],), dtype=accumulation_dtype(tensor.dtype))


def _refuse_backward(qualified: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"{qualified} has no derivative; "
            "differentiate the layers of l2rw_ext.functional instead"
        )

    return backward


def _forward_mode_is_on() -> bool:
    # Checking every argument costs as much as a small operator.
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


def _has_tangent(argument: object) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(map(_has_tangent, argument))
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


class _Library(torch.library.Library):
    """Makes autograd kernels raise when an argument carries a forward-mode tangent.

    Those of `torch.library.register_autograd` would return a tangent of zero without a word.
    """

    def impl(
        self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any
    ) -> None:
        def refuse_forward(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
            if _forward_mode_is_on() and any(map(_has_tangent, arguments)):
                raise NotImplementedError(
                    f"l2rw_ext::{op_name} has no forward-mode derivative; "
                    "differentiate the layers of l2rw_ext.functional instead"
                )
            return fn(keyset, *arguments)

        kernel = refuse_forward if dispatch_key == "Autograd" else fn
        # Torch's method has no annotations.
        super().impl(op_name, kernel, dispatch_key, **options)  # type: ignore[no-untyped-call]


_library = _Library("l2rw_ext", "FRAGMENT")
