"""One table of tolerances for the operators: dtype x operator, each with its reason.

An error is measured against the same sum over absolute values, so that cancellation neither hides
an error nor makes one up: |result - exact| <= tolerance * Σ |terms|.
"""

from __future__ import annotations

import torch

# Sums of at most some thousand terms, rounded in the accumulation dtype: a few units in the last
# place (1.1e-16 in float64, 6e-8 in float32), whatever the order of the terms. Narrower inputs are
# exact in float32, so that they are no less exact than float32 itself.
_SUM_FLOAT64 = 2e-15
_SUM_FLOAT32 = 1e-6

# A result that is stored in the dtype of the input adds half a unit in the last place of it.
_STORED_BFLOAT16 = 2.0**-8 + _SUM_FLOAT32
_STORED_FLOAT16 = 2.0**-11 + _SUM_FLOAT32

_IN_ACCUMULATION_DTYPE = {
    torch.float64: _SUM_FLOAT64,
    torch.float32: _SUM_FLOAT32,
    torch.bfloat16: _SUM_FLOAT32,
    torch.float16: _SUM_FLOAT32,
}
_IN_INPUT_DTYPE = {
    torch.float64: _SUM_FLOAT64,
    torch.float32: _SUM_FLOAT32,
    torch.bfloat16: _STORED_BFLOAT16,
    torch.float16: _STORED_FLOAT16,
}

TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    # Scores are returned in the accumulation dtype.
    "factored_correlation": _IN_ACCUMULATION_DTYPE,
    "factored_correlations": _IN_ACCUMULATION_DTYPE,
    "dense_correlation": _IN_ACCUMULATION_DTYPE,
    "conv_correlation": _IN_ACCUMULATION_DTYPE,
    "affine_correlation": _IN_ACCUMULATION_DTYPE,
    "embedding_correlation": _IN_ACCUMULATION_DTYPE,
    # So are gradients that are sums over the batch, and those of a normalization layer.
    "conv_weighted_gradient": _IN_ACCUMULATION_DTYPE,
    "affine_example_gradients": _IN_ACCUMULATION_DTYPE,
    "weighted_sum": _IN_ACCUMULATION_DTYPE,
    # Gradients of single examples are stored in the dtype of the input: the largest buffer.
    "linear_example_gradients": _IN_INPUT_DTYPE,
    "conv_example_gradients": _IN_INPUT_DTYPE,
    # Of a group norm, the gradient of the input; those of its scale and shift are as above.
    "group_norm_backward": _IN_INPUT_DTYPE,
    "batch_norm_tangent": _IN_INPUT_DTYPE,
    # One product, or one quotient, stored in the dtype of the input.
    "scale_rows": _IN_INPUT_DTYPE,
    "normalize_weights": _IN_INPUT_DTYPE,
}

# Results in the accumulation dtype that come with others in the dtype of the input.
SCORES = _IN_ACCUMULATION_DTYPE
