"""Measured rates that turn operation counts into comparable times.

Only ratios matter: they decide between the forms of one layer. A table rather than a timing at run
time, so that the choice, and with it every bit of the result, is the same in every run.
Multiply-adds per second of one core of an AMD EPYC (Zen 4), float32; docs/kernels.md has the
measurements.
"""

from __future__ import annotations

MATMUL = 45e9
"""torch's matrix products: directions, and weighted gradients of single positions."""

DENSE = 49e9
"""The dense score of a linear layer."""

GRAM = 50e9
"""The two thin products of the factored form and their Hadamard sum, with ..."""

GRAM_WIDTH = 16
"""... the clean rows rounded up to a multiple of this."""

EXAMPLES = 46e9
"""Everything that forms gradients of single examples, stored or not."""

BYTES = 10e9
"""Bytes moved to or from memory per second."""

BLOCKED_POSITIONS = 16
"""From this many positions an example's gradient is a matrix product worth a block of its own, and
a weighted gradient of a linear layer is faster example by example than gathered and multiplied."""

FEW_POSITIONS = 8
"""Up to this many positions a use costs more in calls than in arithmetic, and those of the same
operands are put side by side."""
