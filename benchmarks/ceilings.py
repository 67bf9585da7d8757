"""What the machine can do, measured in the run whose numbers are held against it.

Two ceilings: operations of a large matrix product in the dtype, and bytes of a large copy, each
byte read and written counted. Both are the best of ten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from l2rw_ext.devices import float32_products

from .kernel_cases import PRECISIONS
from .timing import interleaved

# Large enough that launches and the filling of the chip do not count, small enough for a test.
MATRIX = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 2**31, "cpu": 2**25}
_REPEATS = 10


@dataclass(frozen=True)
class Ceilings:
    """Operations per second by precision, and bytes per second."""

    operations: dict[str, float]
    bytes: float

    def floor(self, precision: str, operations: int, moved: int) -> float:
        """The least seconds that ``operations`` and ``moved`` bytes can take."""
        return max(operations / self.operations[precision], moved / self.bytes)

    def bound(self, precision: str, operations: int, moved: int) -> str:
        """Which of the two takes longer, ``operations`` or ``bytes``."""
        longer = operations / self.operations[precision] >= moved / self.bytes
        return "operations" if longer else "bytes"


def _least_seconds(call: Callable[[], object], device: str) -> float:
    times = interleaved({"": call}, repeats=_REPEATS, warmup=3, device=device)
    return min(times[""])


def measure_ceilings(device: str, precisions: tuple[str, ...]) -> Ceilings:
    """Measure both ceilings, on random numbers."""
    kind = device.split(":")[0]
    size = MATRIX[kind]
    rates = {}
    for name in precisions:
        precision = PRECISIONS[name]
        a, b = (torch.randn(size, size, device=device).to(precision.dtype) for _ in range(2))
        out = torch.empty_like(a)

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        with float32_products(precision.tf32):
            rates[name] = 2 * size**3 / _least_seconds(multiply, device)
        del a, b, out
    source = torch.randn(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    seconds = _least_seconds(lambda: target.copy_(source), device)
    return Ceilings(rates, 2 * source.nbytes / seconds)
