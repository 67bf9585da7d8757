"""Every operator as a composition of torch's operations.

A composition runs on CUDA tensors where no kernel of this package does, and a kernel is measured
against it. Each function has the name, the arguments and the results of its operator in
:mod:`l2rw_ext.ops`.

None of them reads a value on the host, or makes a shape depend on one, so that none waits for the
device and all can be captured in a CUDA graph. An index out of range is therefore found by the
device. They ignore the caller's autocast, as the compiled kernels do. Matrix products and
convolutions of float32 follow torch's precision settings, and sums are as reproducible as the
operations of torch that form them.
"""

from __future__ import annotations

from .convolution import conv_correlation, conv_example_gradients, conv_weighted_gradient
from .embedding import embedding_correlation
from .linear import (
    dense_correlation,
    factored_correlation,
    factored_correlations,
    linear_example_gradients,
)
from .normalization import (
    affine_correlation,
    affine_example_gradients,
    batch_norm_tangent,
    group_norm_backward,
)
from .weights import normalize_weights, scale_rows, weighted_sum

__all__ = [
    "affine_correlation",
    "affine_example_gradients",
    "batch_norm_tangent",
    "conv_correlation",
    "conv_example_gradients",
    "conv_weighted_gradient",
    "dense_correlation",
    "embedding_correlation",
    "factored_correlation",
    "factored_correlations",
    "group_norm_backward",
    "linear_example_gradients",
    "normalize_weights",
    "scale_rows",
    "weighted_sum",
]
