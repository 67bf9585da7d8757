"""Second derivatives that are those of torch's first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import composites
from .base import NotExactError

_REPLACED: dict[Any, Callable[..., Any]] = {
    F.prelu: composites.prelu,
    Tensor.prelu: composites.prelu,
    F.layer_norm: composites.layer_norm,
}


class Corrected(TorchFunctionMode):
    """Runs functions whose second derivative torch has wrong as what they are made of."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        replaced = _REPLACED.get(func)
        if replaced is not None:
            return replaced(*args, **kwargs)
        if func is F.embedding and kwargs.get("scale_grad_by_freq", len(args) > 5 and args[5]):
            raise NotExactError(
                "embedding with scale_grad_by_freq divides gradients by counts over the whole "
                "batch, which no second derivative knows"
            )
        return func(*args, **kwargs)
