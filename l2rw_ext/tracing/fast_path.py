"""Torch's fast path of transformers, on which no function mode may be active.

In eval mode, and where autograd would record nothing, ``nn.TransformerEncoder``, its layer and
``nn.MultiheadAttention`` run as fused kernels, on nested tensors if there is a padding mask. Their
numbers are others than those of the operations one by one: padded positions are zero, and cut off
behind the longest sequence. Torch leaves this path if a function mode is active, so that the modes
of a step would change what they observe. They rest while such a module runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode_temporarily,
)
from torch.utils import _pytree as pytree

from l2rw_ext.errors import NotExactError
from l2rw_ext.layers.torch_functions import tensors_in

_FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class StepMode(TorchFunctionMode):
    """A function mode of a step. It sees nothing of a module that may take the fast path."""

    def passed_over(self, module: nn.Module, given: list[Tensor], out: Any) -> None:
        """Note that ``module`` made ``out`` of the ``given`` tensors without this mode."""


@contextlib.contextmanager
def fast_paths() -> Iterator[None]:
    """In the body, the three kinds of modules run without the step modes of their thread."""
    forwards = [kind.forward for kind in _FUSED]
    for kind, forward in zip(_FUSED, forwards, strict=True):
        setattr(kind, "forward", _without_modes(forward))  # noqa: B010  mypy takes it for a method
    try:
        yield
    finally:
        for kind, forward in zip(_FUSED, forwards, strict=True):
            setattr(kind, "forward", forward)  # noqa: B010  as above


def _without_modes(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # An encoder asks its first layer for the mode.
        if getattr(module, "layers", (module,))[0].training:
            return original(module, *args, **kwargs)
        modes = _get_current_function_mode_stack()
        # A mode of the user's keeps torch off the fast path in training too.
        if not modes or not all(isinstance(mode, StepMode) for mode in modes):
            return original(module, *args, **kwargs)
        given = tensors_in((args, kwargs))
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*given, *module.parameters())):
            return original(module, *args, **kwargs)
        # Without grad a tensor may still carry a tangent, which is no part of its value. What is
        # one tensor in several places must stay so: torch asks whether the query is the key.
        constant = {id(x): x.detach() for x in given if x.requires_grad}
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda x: constant.get(id(x), x), (args, kwargs)
        )
        with contextlib.ExitStack() as stack:
            for _ in modes:
                stack.enter_context(_pop_mode_temporarily())
            out = original(module, *args, **kwargs)
        if any(x.requires_grad for x in tensors_in(out)):
            raise NotExactError(
                f"the result of a {type(module).__name__} requires grad, although nothing that it "
                "holds or is given does"
            )
        for mode in modes:
            mode.passed_over(module, given, out)
        return out

    return forward
