"""Second derivatives that agree with torch's first derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from l2rw_ext.errors import NotExactError
from l2rw_ext.layers import corrections

_REPLACED: dict[Any, Callable[..., Any]] = {
    F.prelu: corrections.prelu,
    Tensor.prelu: corrections.prelu,
    F.layer_norm: corrections.layer_norm,
}


class Corrected(TorchFunctionMode):
    """Replaces functions whose second derivative is wrong in torch by their corrections."""

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
