"""How far the results of an operator are off from its formula in float64, and how far they may be.

Two measures, and both must hold. Against the same sum over absolute values, cancellation neither
hides an error of rounding nor makes one up; but in a sum of a thousand million terms a missing tile
is small against that. So the Euclidean norm of the error over that of the result counts as well:
the arguments are random, and their sums no smaller than chance makes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from l2rw_ext.ops.formulas import Results
from l2rw_ext.reference import relative_error

# Against the sum over absolute values: narrow numbers are exact in float32, where sums are formed;
# TF32 rounds both factors of a product to 11 bits.
_SUM = {"fp32": 1e-6, "tf32": 1e-3, "bf16": 1e-5, "fp16": 1e-5}
# Against the result: k numbers summed one after the other in float32 are off by about
# 2.6e-8 sqrt(k / 2), 1.7e-6 for two products 4096 deep; tensor cores cut off instead of rounding,
# which adds up to some 1e-5.
_NORM = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 1e-4, "fp16": 1e-4}
# A result in a narrow dtype is rounded once more.
_STORED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


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
        found.append(Errors(float(of_sum), relative_error(result, value)))
    return found
