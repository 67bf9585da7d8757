"""A norm that nobody uses: the steps of CONTRIBUTING.md, followed once to see that they suffice."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .base import Call, Function
from .normalization import Layout, Scale


def mean_absolute_norm(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Divide by the mean absolute value of the last dimension; scale and shift."""
    operands = (input, weight, bias)
    if has_torch_function(operands):
        out: Tensor = handle_torch_function(mean_absolute_norm, operands, *operands)
        return out
    out = _normalized(input) * weight
    return out if bias is None else out + bias


def _normalized(x: Tensor) -> Tensor:
    return x / x.abs().mean(-1, keepdim=True)


class MeanAbsoluteNorm(Scale):
    """Divides by the mean absolute value of the last dimension."""

    functions: ClassVar[tuple[Function, ...]] = (mean_absolute_norm,)

    def bind(
        self, func: Function, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Call:
        """Every call."""
        return Call("mean_absolute_norm", input, weight, bias, Layout(1, _normalized))


MEAN_ABSOLUTE_NORM = MeanAbsoluteNorm()
