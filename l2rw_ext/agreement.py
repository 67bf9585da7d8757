"""Whether the results of operators agree with their formulas in float64, on one device.

``python -m l2rw_ext.agreement [OPERATOR ...]`` examines CUDA kernels for
:mod:`l2rw_ext.ops.trust`: all, or those of the operators that are named, on every kind of GPU. It
prints lines of JSON, first the names of kernels and GPUs and then, one by one, why a kernel does
not agree, which is empty if it does. After an error it ends, for a device may then be useless.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .devices import float32_products
from .ops import trust
from .ops._kernels import COMPOSED
from .ops._operator import OPERATORS
from .ops.formulas import FORMULAS, Draw, as_results, sample
from .reference import relative_error

__all__ = [
    "TOLERANCES",
    "Checked",
    "check_large",
    "check_small",
    "disagreement",
    "first_line",
    "main",
]

Checked = tuple[str, float, float]
"""What was checked, its relative error, and the error allowed."""

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
"""Of a whole result in the L2 norm, by its dtype: sums of a few dozen terms, models in float64."""
# For sums of thousands of terms with either sign.
_TOLERANCE_LARGE = 1e-4
_TOLERANCE_TF32 = 5e-3
# The dtypes of large arguments, and whether products may be rounded to TF32.
_LARGE = (
    (torch.float32, False),
    (torch.float32, True),
    (torch.bfloat16, False),
    (torch.float16, False),
)


def check_small(name: str, device: str) -> Iterator[Checked]:
    """Check all results of small arguments in every dtype, with and without optional ones."""
    for dtype in TOLERANCES:
        for optional in (True, False):
            arguments = sample(name, dtype, optional)
            moved = pytree.tree_map(functools.partial(_to, device), arguments)
            with float32_products(False):
                results = as_results(OPERATORS[name](*moved))
            for result, exact in zip(results, FORMULAS[name].exact(arguments), strict=True):
                error = relative_error(result, exact)
                yield f"{device}, {str(dtype)[6:]}", error, TOLERANCES[result.dtype]


def check_large(name: str, device: str) -> Iterator[Checked]:
    """Check all results of arguments that fill several tiles, or every processor of a GPU."""
    formula = FORMULAS[name]
    for dtype, tf32 in _LARGE:
        arguments = formula.large(Draw(dtype, device))
        with float32_products(tf32):
            results = as_results(OPERATORS[name](*arguments))
        exact = formula.exact(arguments)
        for result, expected in zip(results, exact, strict=True):
            label = f"{device}, large, {'TF32' if tf32 else str(dtype)[6:]}"
            stored = TOLERANCES[result.dtype] if result.dtype.itemsize == 2 else 0.0
            tolerance = max(stored, _TOLERANCE_TF32 if tf32 else _TOLERANCE_LARGE)
            yield label, relative_error(result, expected), tolerance


def _to(device: str, argument: Any) -> Any:
    return argument.to(device) if isinstance(argument, Tensor) else argument


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def disagreement(name: str, device: str) -> str:
    """The first result of an operator that is wrong on a device; empty if there is none."""
    for check in (check_small, check_large):
        for what, error, tolerance in check(name, device):
            if not error <= tolerance:  # a NaN fails
                return f"{what}: relative error {error:.1e}, allowed {tolerance:.0e}"
    return ""


def main(names: Sequence[str]) -> None:
    """Examine kernels and print a line for each."""

    def say(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    kernels = [name for name in OPERATORS if name not in COMPOSED]
    say(kernels=kernels, devices=trust.devices())
    kinds = {torch.cuda.get_device_name(k): k for k in range(torch.cuda.device_count())}
    for name in names or kernels:
        try:
            found = (disagreement(name, f"cuda:{k}") for k in kinds.values())
            say(operator=name, reason=next(filter(None, found), ""))
        except torch.OutOfMemoryError as error:
            say(unjudged=first_line(error))
            return
        except Exception as error:
            say(operator=name, reason=first_line(error))
            return


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # without the destructors of a device that may be of no more use
