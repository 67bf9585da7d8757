"""Measured rates that turn operation counts into comparable times.

Only ratios matter: they decide between the forms of one layer. A table rather than a timing at run
time, so that the choice, and with it every bit of the result, is the same in every run.
Multiply-adds per second of one core of an AMD EPYC (Zen 4), float32; docs/kernels.md has the
measurements.
"""

from __future__ import annotations

MATMUL = 40e9
"""Large matrix products, as in dense scores and weighted gradients."""

GRAM = 25e9
"""The two thin products of the factored form and their Hadamard sum."""

CONVOLUTION = 20e9
"""A convolution's forward, as in the dense score of a convolution."""

EXAMPLE_CONVOLUTION = 25e9
"""Per-example weight gradients of a convolution."""

BYTES = 8e9
"""Bytes moved to or from memory per second."""
