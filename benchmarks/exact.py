"""Results of an operator in float64 on the same rounded arguments, and how far others are off.

Two measures, and both must hold. Against the same sum over absolute values, cancellation neither
hides an error of rounding nor makes one up; but in a sum of a thousand million terms a missing tile
is small against that. So the Euclidean norm of the error over that of the result counts as well:
the arguments are random, and their sums no smaller than chance makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from l2rw_ext.ops import compositions

from .expected import relative_error
from .kernel_cases import Arguments

Results = tuple[Tensor, ...]

# Against the sum over absolute values: narrow numbers are exact in float32, where sums are formed;
# TF32 rounds both factors of a product to 11 bits.
_SUM = {"fp32": 1e-6, "tf32": 1e-3, "bf16": 1e-5, "fp16": 1e-5}
# Against the result: k numbers summed one after the other in float32 are off by about
# 2.6e-8 sqrt(k / 2), 1.7e-6 for two products 4096 deep; tensor cores cut off instead of rounding,
# which adds up to some 1e-5.
_NORM = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 1e-4, "fp16": 1e-4}
# A result in a narrow dtype is rounded once more.
_STORED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# Operators whose third argument is a mean that is subtracted.
_SHIFTED = (
    "affine_correlation",
    "affine_example_gradients",
    "group_norm_backward",
    "batch_norm_tangent",
)


def as_results(value: Any) -> Results:
    """An operator's result, or results, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def _converted(arguments: Arguments, function: Callable[[Tensor], Tensor]) -> Arguments:
    converted: Arguments = pytree.tree_map(
        lambda a: function(a) if isinstance(a, Tensor) and a.is_floating_point() else a, arguments
    )
    return converted


def exact(operator: str, arguments: Arguments) -> Results:
    """The composition in float64; the package's tests hold it to plain torch."""
    return as_results(getattr(compositions, operator)(*_converted(arguments, Tensor.double)))


def magnitudes(operator: str, arguments: Arguments) -> Results:
    """Σ |terms| of every result: every difference of the equation becomes a sum."""
    if operator == "normalize_weights":  # not a sum over its arguments
        return exact(operator, arguments)
    absolute = list(_converted(arguments, lambda a: a.double().abs()))
    call = getattr(compositions, operator)
    if operator in _SHIFTED and absolute[2] is not None:
        absolute[2] = -absolute[2]  # |x| + |mean|
    results = as_results(call(*absolute))
    # What is left are the means that are taken out of the first term a: 2 a - (a - b) = a + b.
    if operator == "group_norm_backward":
        g, x, _, rstd, weight, groups = absolute
        first = g if weight is None else g * weight.view(1, -1, *[1] * (x.dim() - 2))
        per_channel = rstd.repeat_interleave(x.shape[1] // groups, 1)
        first = first * per_channel.view(*x.shape[:2], *[1] * (x.dim() - 2))
        return 2 * first - results[0], *results[1:]
    if operator == "batch_norm_tangent" and absolute[1] is not None:
        x, moved, shift, rstd, weight, V, V_b = absolute
        scale = rstd if weight is None else rstd * weight
        first = moved * scale.view(1, -1, *[1] * (x.dim() - 2))
        fixed = call(x, None, shift, rstd, weight, V, V_b)
        return (2 * first + 2 * fixed - results[0],)
    return results


@dataclass(frozen=True)
class Errors:
    """How far a result is off, or may be."""

    of_sum: float
    of_norm: float

    def within(self, limit: Errors) -> bool:
        """Whether both errors are at most those of ``limit``; NaN is not."""
        return self.of_sum <= limit.of_sum and self.of_norm <= limit.of_norm


def limits(precision: str, dtypes: Iterable[torch.dtype]) -> list[Errors]:
    """What the errors of results of these dtypes may be."""
    rounded = [_STORED.get(dtype, 0.0) for dtype in dtypes]
    return [Errors(_SUM[precision] + r, _NORM[precision] + r) for r in rounded]


def errors(results: Results, exact_results: Results, bounds: Results) -> list[Errors]:
    """The errors of each result; NaN or infinite where one is not finite and should be.

    Raises:
        ValueError: number or shapes of the results are wrong.
    """
    shapes = [tuple(result.shape) for result in results]
    wanted = [tuple(result.shape) for result in exact_results]
    if shapes != wanted:
        raise ValueError(f"results of shapes {shapes}, expected {wanted}")
    found = []
    for result, value, bound in zip(results, exact_results, bounds, strict=True):
        # The smallest numbers of a dtype have fewer digits.
        spread = bound.abs() + torch.finfo(result.dtype).tiny
        of_sum = ((result.double() - value).abs() / spread).max()
        found.append(Errors(float(of_sum), relative_error(result, value.cpu())))
    return found
