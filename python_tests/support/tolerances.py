"""The tolerances of the operators, by the dtypes of arguments and result, with their reasons.

An error is measured against the same sum over absolute values, so that cancellation neither hides
an error nor makes one up: |result - exact| <= tolerance * Σ |terms|.
"""

from __future__ import annotations

import torch

# Sums of at most some thousand terms, rounded in the accumulation dtype: a few units in the last
# place (1.1e-16 in float64, 6e-8 in float32), whatever the order of the terms. Narrower inputs are
# exact in float32, so that they are no less exact than float32 itself.
_SUM = {torch.float64: 2e-15, torch.float32: 1e-6}

# A result that is stored in a narrow dtype adds half a unit in the last place of it, and so does a
# factor of every term that is rounded to one.
_STORED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def tolerance(result: torch.dtype, factor: torch.dtype | None = None) -> float:
    """The relative error of a result in this dtype, and of factors that are rounded to another."""
    rounded = sum(_STORED.get(dtype, 0.0) for dtype in (result, factor) if dtype is not None)
    return _SUM.get(result, _SUM[torch.float32]) + rounded
