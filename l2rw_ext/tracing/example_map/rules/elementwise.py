"""Operations that keep every place, and those that join all places along whole dimensions."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ..call import Call, rule
from ..ids import full, over


@rule(
    """_to_copy bernoulli native_dropout hardswish log_sigmoid_forward _prelu_kernel tril triu where
    masked_fill lift rrelu_with_noise _conj _neg_view fill complex polar rsub floor_divide"""
)
def pointwise(c: Call) -> Tensor:
    """Each element of the results is computed from the elements at its place."""
    return c.all(*map(c.of, c.tensors))


@rule(
    """copy_ zero_ fill_ normal_ uniform_ bernoulli_ exponential_ random_ zeros_like ones_like
    full_like rand_like randn_like randint_like new_zeros new_ones new_full"""
)
def _without_first(c: Call) -> Tensor:
    return c.all(full(c.outs[0].dim()), *map(c.of, c.tensors[1:]))


@rule(
    """median nanmedian mode kthvalue trace nonzero _unique2 unique_dim bincount histc
    repeat_interleave dist"""
)
def reduced(c: Call) -> list[Tensor] | Tensor:
    """The dimensions ``dim`` are joined, and dropped unless ``keepdim``; without it, all."""
    ids, dim = pointwise(c), c["dim"]
    if dim is None or dim == [] or c.name == "unique_dim":
        return [over(ids, None, x.dim()) for x in c.outs]
    dims = [d % max(ids.dim(), 1) for d in ([dim] if isinstance(dim, int) else dim)]
    ids = over(ids, dims)
    return (
        ids if c["keepdim"] else ids.reshape([s for d, s in enumerate(ids.shape) if d not in dims])
    )


@rule(
    """_softmax _safe_softmax _log_softmax cumsum cumprod logcumsumexp cummax cummin sort topk
    argsort glu _fft_r2c _fft_c2c _fft_c2r linalg_cross"""
)
def _along(c: Call) -> Tensor:
    ids = pointwise(c)
    whole = over(ids, [c["dim"]] if isinstance(c["dim"], int) else c["dim"])
    # Where every place has an example, a first label may be that of the place.
    return c.join(ids, whole) if c.outs[0].shape == c.tensors[0].shape else whole


@rule(
    """max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d
    adaptive_max_pool2d _adaptive_avg_pool3d adaptive_max_pool3d reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa"""
)
def _windows(c: Call) -> Tensor:
    spatial = re.search(r"(\d)d", c.name)
    assert spatial
    return over(c.first(), range(-int(spatial[1]), 0))


@rule("pixel_shuffle pixel_unshuffle")
def _pixels(c: Call) -> Tensor:
    return over(c.first(), [-3, -2, -1])


@rule("bucketize searchsorted isin")
def _compared(c: Call) -> Tensor:
    """Each element is looked up among all elements of the others."""
    own = c["elements"] if c.name == "isin" else c["self"]
    return c.all(c.of(own), *(over(c.of(x), None, 0) for x in c.tensors if x is not own))


@rule(
    """mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits
    soft_margin_loss"""
)
def _loss(c: Call) -> Tensor:
    ids = pointwise(c)
    return over(ids, None, 0) if c["reduction"] else ids


@rule("nll_loss_forward nll_loss2d_forward")
def _nll(c: Call) -> list[Tensor]:
    d = 1 if c["self"].dim() > 1 else 0
    class_weight = over(c.of(c["weight"]), None, 0)
    ids = c.all(over(c.of(c["self"]), [d]).squeeze(d), c.of(c["target"]), class_weight)
    return [over(ids, None, 0)] * 2 if c["reduction"] or not d else [ids, full(0)]


@rule("_ctc_loss")
def _ctc(c: Call) -> Any:
    lengths = [c.of(c[k], 1) for k in ("input_lengths", "target_lengths")]
    log_probs = over(c.of(c["log_probs"]), [0, 2]).reshape(-1)
    return c.leading(log_probs, over(c.of(c["targets"]), [-1]).reshape(-1), *lengths)
