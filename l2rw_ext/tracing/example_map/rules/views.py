"""Operations that move elements: they are done to the ids."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from l2rw_ext.layers.torch_functions import tensors_in

from ..call import Call, rule
from ..ids import NONE, join, mixed, over, regroup, squash


@rule("unsafe_split unsafe_split_with_sizes unsafe_chunk")
def view(c: Call) -> list[Tensor]:
    """Any view; ids are expanded by strides of 0, so that nothing is written out."""
    seen = c.func(c.first().expand(c.tensors[0].shape), *c.positional[1:], **c.kwargs)
    return [squash(ids, look=False) for ids in tensors_in(seen)]


@rule("view _unsafe_view _reshape_alias")
def _reshaped(c: Call) -> Tensor:
    if c.func._overloadname == "dtype":
        return over(c.first(), [-1])
    return regroup(c.first(), list(c.tensors[0].shape), list(c.outs[0].shape))


@rule("view_as_real")
def _as_real(c: Call) -> Tensor:
    return c.first().unsqueeze(-1)


@rule("view_as_complex")
def _as_complex(c: Call) -> Tensor:
    return over(c.first(), [-1]).squeeze(-1)


@rule("cat stack")
def _joined(c: Call) -> Tensor:
    parts = [x for x in c["tensors"] if x.dim() != 1 or x.numel()]
    ids, d, stacks = [c.of(x) for x in parts], c["dim"] % c.outs[0].dim(), c.name == "stack"
    if stacks:
        ids = [i.unsqueeze(d) for i in ids]
    if all(i.shape[d] == 1 for i in ids) and not mixed(whole := functools.reduce(join, ids)):
        return whole  # a class token, which has no example, is taken for its neighbours'
    sizes = torch.broadcast_shapes(*(i.narrow(d, 0, 1).shape for i in ids))
    lengths = [1 if stacks else x.shape[d] for x in parts]
    expanded = [
        i.expand(*sizes[:d], length, *sizes[d + 1 :])
        for i, length in zip(ids, lengths, strict=True)
    ]
    return squash(torch.cat(expanded, d))


@rule("roll flip")
def _moved(c: Call) -> Tensor:
    everywhere = len(c.positional) == (2 if c.name == "roll" else 1)
    ids = c.first().expand(c.tensors[0].shape) if everywhere else c.first()
    moved: Tensor = c.func(ids, *c.positional[1:], **c.kwargs)
    return moved


@rule("constant_pad_nd")
def _padded(c: Call) -> Tensor:
    ids, pad = c.first(), list(c["pad"])
    for k in range(len(pad) // 2):
        if ids.shape[-1 - k] == 1:  # what is added is taken for the example's that it is added to
            pad[2 * k : 2 * k + 2] = 0, 0
    return torch.constant_pad_nd(ids, pad, NONE)


@rule("repeat")
def _repeated(c: Call) -> Tensor:
    added = len(c["repeats"]) - c.tensors[0].dim()
    ids = c.first().reshape((1,) * added + c.first().shape)
    return ids.repeat([1 if s == 1 else t for s, t in zip(ids.shape, c["repeats"], strict=True)])


@rule("_pack_padded_sequence _pad_packed_sequence")
def _packed(c: Call) -> list[Tensor]:
    rest = [NONE if isinstance(a, float) else a for a in c.positional[1:]]
    ids = squash(c.func(c.first().expand(c.tensors[0].shape).contiguous(), *rest)[0])
    at = over(c.of(c.tensors[1]), None, 1)
    ids = c.steady(ids, range(ids.dim()) if c.chosen_by(c.tensors[1]) else [])
    return [c.join(ids, at), at]
