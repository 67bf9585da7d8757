"""Sums of products, convolutions and decompositions of matrices."""

from __future__ import annotations

import functools

from torch import Tensor

from ..call import Call, rule
from ..ids import full, over, squash


@rule("mm", of="self mat2")
@rule("bmm", of="self mat2")
@rule("addmm", of="mat1 mat2 self")
@rule("baddbmm", of="batch1 batch2 self")
@rule("mv", of="self vec")
@rule("addmv", of="mat vec self")
@rule("dot vdot", of="self tensor")
@rule("linear", of="input weight bias")
@rule("_cdist_forward", of="x1 x2")
def _product(c: Call, of: str) -> Tensor:
    a, b, *added = (c.of(c[name]) for name in of.split())
    a = over(a, [-1])
    if c.name in ("linear", "_cdist_forward"):
        b = b.transpose(-1, -2)
    ids = c.join(a, over(b, [-2])) if b.dim() > 1 else c.join(a.squeeze(-1), over(b, None, 0))
    return c.all(ids, *added)


@rule("_trilinear")
def _trilinear(c: Call) -> Tensor:
    ids = full(0)
    for k in "123":
        ids = c.join(ids, functools.reduce(Tensor.unsqueeze, c["expand" + k], c.of(c["i" + k])))
    kept = [s for d, s in enumerate(ids.shape) if d not in c["sumdim"]]
    return over(ids, c["sumdim"]).reshape(kept)


@rule("convolution _convolution convolution_overrideable mkldnn_convolution")
def _convolved(c: Call) -> Tensor:
    x, weight, first = c["input"], c.of(c["weight"]), 0 if c["transposed"] else 1
    ids = over(c.of(x), range(2, x.dim()))
    if ids.shape[1] > 1:  # each group of channels by itself
        ids = over(ids.reshape(ids.shape[0], c["groups"], -1), [2])
        ids = ids.expand(-1, -1, c.outs[0].shape[1] // c["groups"])
    weight = over(weight, range(first, weight.dim())).reshape(1, -1)
    bias = c.of(c["bias"], 1).reshape(1, -1)
    return squash(c.leading(ids.reshape(ids.shape[0], -1), weight, bias)[0])


@rule(
    """_linalg_det _linalg_slogdet _linalg_svd _linalg_eigh linalg_inv_ex linalg_cholesky_ex
    linalg_lu_factor_ex linalg_qr linalg_matrix_exp _linalg_solve_ex linalg_solve_triangular
    triangular_solve cholesky_solve"""
)
def _matrices(c: Call) -> list[Tensor]:
    """Matrix by matrix; the dimensions before the last two count matrices."""
    return c.leading(*(over(i, [-2, -1]).reshape(i.shape[:-2]) for i in map(c.of, c.tensors)))
