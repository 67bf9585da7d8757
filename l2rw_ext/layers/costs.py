"""What a form of a layer costs: multiply-adds, bytes, and rates that make them comparable times.

Only ratios of rates matter, because they decide between the forms of one layer. The rates are a
table and not a timing at run time, so that the choice, and with it every bit of the result, is the
same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Size:
    """The numbers a cost is counted with; see the notation in docs/design.md."""

    n: int
    m: int
    positions: int
    clean_positions: int


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the score pass and of the weighted gradient, and the bytes kept between."""

    score: float
    weighted: float
    kept_bytes: float
    seconds: float


@dataclass(frozen=True)
class Rates:
    """Multiply-adds and bytes per second of one kind of device."""

    matmul: float
    """torch's matrix products: directions, and weighted gradients of single positions."""

    dense: float
    """The dense score of a linear layer."""

    gram: float
    """The two thin products of the factored form and their Hadamard sum.

    The number of clean rows is rounded up to a multiple of :attr:`gram_width`.
    """

    gram_width: int
    """The multiple to which the factored form rounds up the number of clean rows."""

    examples: float
    """Everything that forms gradients of single examples, stored or not."""

    bytes: float
    """Bytes moved to or from memory."""


CPU = Rates(matmul=45e9, dense=49e9, gram=50e9, gram_width=16, examples=46e9, bytes=10e9)
"""Measured: one core of an AMD EPYC (Zen 4), float32; docs/kernels.md has the measurements."""

CUDA = Rates(matmul=150e12, dense=150e12, gram=150e12, gram_width=64, examples=100e12, bytes=3e12)
"""Not measured: about six tenths of what an H200's data sheet gives for TF32 and for memory.

Rates are lower where tiles are small. In narrower dtypes both sides of every comparison double.
"""

FEW_POSITIONS = 8
"""The number of positions up to which a use costs more in calls than in arithmetic.

Uses of the same operands with so few positions are put side by side.
"""


def rates_of(*operands: Tensor | None) -> Rates:
    """The rates of the device where the operands of a use are."""
    return CUDA if any(t is not None and t.is_cuda for t in operands) else CPU
