"""Typed access to the operators ``torch.ops.l2rw_ext``.

Letters: n, m examples of the training and the clean batch; T, S their positions per example; z a
layer's input; g the gradient of the summed losses with respect to its output; V, V_b the layer's
part of the direction; u scores; w weights; G the gradient of one example.

Floating arguments of one call share dtype (float64, float32, bfloat16 or float16) and device, with
any strides; a direction, a weight or a saved statistic may also have the accumulation dtype.
Results called scores or weighted gradients have the accumulation dtype: float64 for float64,
float32 for all others (a linear layer's weighted gradient may have that of z). Sizes of 0 and 1 are
valid. Results are the same from run to run for a given number of threads; on CUDA convolutions
repeat theirs if ``torch.backends.cudnn.deterministic`` is set. Arguments that do not fit raise
``RuntimeError`` with operator, argument and value; an index out of range on CUDA is found by the
device.

No operator can be differentiated; the layers of :mod:`l2rw_ext.functional` can. An operator raises
``NotImplementedError`` in a backward that reaches it, and when it is called with a tangent of
forward mode.
"""

from __future__ import annotations

from .convolution import conv_correlation, conv_example_gradients, conv_weighted_gradient
from .embedding import embedding_correlation, embedding_weighted_gradient
from .linear import (
    dense_correlation,
    factored_correlation,
    factored_correlations,
    linear_example_gradients,
    linear_weighted_gradient,
)
from .normalization import affine_example_gradients, batch_norm_tangent, group_norm_backward
from .weights import normalize_weights, weighted_sum

__all__ = [
    "affine_example_gradients",
    "batch_norm_tangent",
    "conv_correlation",
    "conv_example_gradients",
    "conv_weighted_gradient",
    "dense_correlation",
    "embedding_correlation",
    "embedding_weighted_gradient",
    "factored_correlation",
    "factored_correlations",
    "group_norm_backward",
    "linear_example_gradients",
    "linear_weighted_gradient",
    "normalize_weights",
    "weighted_sum",
]
