"""Layers that torch computes as one operation."""

from __future__ import annotations

from torch import Tensor

from ..call import Call, rule
from ..ids import full, over


@rule("native_layer_norm _fused_rms_norm")
def _layer_norm(c: Call) -> Tensor:
    ids = over(c.of(c["input"]), range(-len(c["normalized_shape"]), 0))
    return c.all(ids, c.of(c["weight"]), c.of(c["bias"]))


@rule(
    """native_batch_norm _native_batch_norm_legit _batch_norm_with_update cudnn_batch_norm
    miopen_batch_norm"""
)
def _batch_norm(c: Call) -> list[Tensor]:
    ids, rank = c.of(c["input"]), c["input"].dim()
    but_channels = {*range(rank)} - {1}
    if c["training"] or c.name == "_batch_norm_with_update":
        ids = over(ids, but_channels)
    by_channel = (c.of(c[k], 1) for k in ("weight", "bias", "running_mean", "running_var"))
    ids = c.all(ids, *(i.reshape(1, -1, *[1] * (rank - 2)) for i in by_channel))
    statistics = over(ids, but_channels).reshape(-1)
    return [ids, *(statistics if x.numel() else full(1) for x in c.outs[1:])]


@rule("affine_grid_generator", of="theta", rank=3)
@rule("grid_sampler_2d", of="input grid", rank=4)
@rule("grid_sampler_3d", of="input grid", rank=5)
@rule("im2col", of="self", rank=4)
@rule("col2im native_channel_shuffle channel_shuffle", of="self", rank=3)
@rule("native_group_norm", of="input", rank=2)
@rule("_transformer_encoder_layer_fwd", of="src mask", rank=3)
@rule("_native_multi_head_attention", of="query key value mask", rank=3)
def _examples_first(c: Call, of: str, rank: int) -> list[Tensor]:
    """Whole examples, counted by dimension 0 of some arguments; the others are for all."""
    own = [c[name] for name in of.split() if isinstance(c[name], Tensor)]
    if own[0].dim() < rank or own[-1].dim() < 2:
        raise NotImplementedError("no dimension counts examples")
    shared = [over(c.of(x), None, 1) for x in c.tensors if not any(x is y for y in own)]
    return c.leading(*(over(c.of(x), range(1, x.dim())).reshape(-1) for x in own), *shared)


@rule(
    """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"""
)
def _attention(c: Call) -> list[Tensor]:
    keys = [over(c.of(c[name]), [-2, -1]) for name in ("key", "value")]
    masks = [over(c.of(c[name]), [-1]) for name in ("attn_mask", "attn_bias")]
    ids = c.all(over(c.of(c["query"]), [-1]), *keys, *masks)
    lesser = (ids.squeeze(-1) if x.dim() == 3 else over(ids, None, x.dim()) for x in c.outs[1:])
    return [ids, *lesser]


@rule("mkldnn_rnn_layer")
def _recurrent(c: Call) -> list[Tensor]:
    """Time comes first here, whatever ``batch_first`` says; the last result is a workspace."""
    states = over(c.join(c.of(c["hx_"]), c.of(c["cx_"])), [1])
    ids = c.join(over(c.of(c["input"]), [0, 2]), states)
    return [ids, ids.squeeze(0), ids.squeeze(0), full(1)]
