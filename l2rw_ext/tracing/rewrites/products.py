"""Products of data with a trained matrix: ``@`` on either side, ``einsum`` and its relatives.

All are one contraction, which the indices describe. An index of data and weight that the result
lacks is an input feature and is summed over. An index that only the weight shares with the result
is an output feature. An index that only the data shares with the result counts rows. An index of
all three counts heads, each with a separate matrix.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l2rw_ext.layers.base import Call, Function
from l2rw_ext.layers.batched import BATCHED_LINEAR
from l2rw_ext.layers.linear import INPUTS_FIRST, LINEAR
from l2rw_ext.tracing.interception import Interception, rewrites


def contract(
    mode: Interception,
    operation: str,
    x: Tensor,
    x_letters: str,
    weight: Tensor,
    weight_letters: str,
    out_letters: str,
) -> Any:
    """``einsum`` of data with a root as a use; NotImplemented if autograd should run it.

    No letter occurs twice in one operand, and every letter has one size.
    """
    kept = "".join(c for c in x_letters if c in weight_letters + out_letters)
    x = _summed(x, x_letters, kept)
    with mode:
        weight = _summed(
            weight,
            weight_letters,
            own := "".join(c for c in weight_letters if c in kept + out_letters),
        )
    sizes = dict(zip(kept, x.shape, strict=True)) | dict(zip(own, weight.shape, strict=True))
    rows = "".join(c for c in kept if c not in own)
    heads = "".join(c for c in kept if c in own and c in out_letters)
    inner = "".join(c for c in own if c in kept and c not in out_letters)
    outer = "".join(c for c in own if c not in kept)
    blocks = [heads] if heads else []
    inputs_first = own == inner + outer
    with mode:
        matrix = [inner, outer] if inputs_first else [*blocks, outer, inner]
        weight = _arranged(weight, own, matrix, sizes)
    x = _arranged(x, kept, [*rows, *blocks, inner], sizes)
    layer = BATCHED_LINEAR if heads else INPUTS_FIRST if inputs_first else LINEAR
    out = mode.use(layer, Call(operation, x, weight))
    if out is NotImplemented:
        return out
    out = out.reshape([sizes[c] for c in rows + heads + outer])
    return _permuted(out, rows + heads + outer, out_letters)


def _summed(x: Tensor, letters: str, kept: str) -> Tensor:
    gone = [i for i, c in enumerate(letters) if c not in kept]
    return x.sum(gone) if gone else x


def _permuted(x: Tensor, letters: str, wanted: str) -> Tensor:
    return x if letters == wanted else x.permute([letters.index(c) for c in wanted])


def _arranged(x: Tensor, letters: str, groups: Sequence[str], sizes: dict[str, int]) -> Tensor:
    """The tensor with one dimension for each group of letters; the same tensor if it has them."""
    x = _permuted(x, letters, "".join(groups))
    if all(len(group) == 1 for group in groups):
        return x
    return x.reshape([math.prod(sizes[c] for c in group) for group in groups])


def _product(mode: Interception, operation: str, a: Any, b: Any) -> Any:
    """``a @ b`` as a use if one is data and the other a root that no layer takes as it is."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or min(a.dim(), b.dim()) == 0:
        return NotImplemented
    if mode.is_use(a, b, None):
        if b.dim() == 2:
            return NotImplemented
    elif not mode.is_use(b, a, None):
        return NotImplemented
    ranks = a.dim(), b.dim()
    a, b, batch_a, batch_b, batch = _aligned(mode, a, b)
    a_letters = batch_a + ("ik" if ranks[0] > 1 else "k")
    b_letters = batch_b + ("kj" if ranks[1] > 1 else "k")
    out_letters = batch + "i" * (ranks[0] > 1) + "j" * (ranks[1] > 1)
    if _sizes([a, b], [a_letters, b_letters]) is None:
        return NotImplemented
    if mode.is_root(b):
        return contract(mode, operation, a, a_letters, b, b_letters, out_letters)
    return contract(mode, operation, b, b_letters, a, a_letters, out_letters)


def _aligned(mode: Interception, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str, str, str]:
    """Both without batch dimensions that broadcast, and letters of those that stay and of all."""
    batch = string.ascii_uppercase[: max(a.dim(), b.dim(), 2) - 2]

    def squeezed(x: Tensor, other: Tensor) -> tuple[Tensor, str]:
        letters = batch[len(batch) - max(x.dim() - 2, 0) :]
        gone = [
            i
            for i in range(len(letters))
            if x.shape[i] == 1 and (j := i + other.dim() - x.dim()) >= 0 and other.shape[j] != 1
        ]
        with mode:
            for i in reversed(gone):
                x = x.squeeze(i)
        return x, "".join(c for i, c in enumerate(letters) if i not in gone)

    (a_squeezed, a_letters), (b_squeezed, b_letters) = squeezed(a, b), squeezed(b, a)
    return a_squeezed, b_squeezed, a_letters, b_letters, batch


def _sizes(operands: Sequence[Tensor], letters: Sequence[str]) -> dict[str, int] | None:
    """The size of every letter; None if an operand repeats a letter or two sizes differ."""
    sizes: dict[str, int] = {}
    for x, own in zip(operands, letters, strict=True):
        if len(set(own)) < len(own) or len(own) != x.dim():
            return None
        for c, size in zip(own, x.shape, strict=True):
            if sizes.setdefault(c, size) != size:
                return None
    return sizes


@rewrites(
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.mv,
    Tensor.matmul,
    Tensor.mm,
    Tensor.bmm,
    Tensor.mv,
    Tensor.__matmul__,
)
def _matmul(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    return _product(mode, func.__name__.strip("_"), *args)


@rewrites(
    torch.addmm,
    Tensor.addmm,
    torch.addmv,
    Tensor.addmv,
    torch.baddbmm,
    Tensor.baddbmm,
)
def _product_plus(
    mode: Interception, func: Function, /, *args: Any, beta: float = 1, alpha: float = 1
) -> Any:
    """β start + α (a @ b); other forms of the call than by position have no rule."""
    if len(args) != 3 or not all(isinstance(a, Tensor) for a in args):
        return NotImplemented
    if not mode.root_meets_data(args) or not torch.is_grad_enabled():
        return NotImplemented
    start, a, b = args
    with mode:
        product = torch.matmul(a, b)
        product = product if alpha == 1 else product * alpha
        if beta == 0:
            return product
        return (start if beta == 1 else start * beta) + product


@rewrites(torch.einsum)
def _einsum(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or not torch.is_grad_enabled():
        return NotImplemented
    parsed = _parse(equation, operands) if mode.root_meets_data(operands) else None
    sizes = None if parsed is None else _sizes(operands, parsed[0])
    if parsed is None or sizes is None:
        return NotImplemented
    letters, out = parsed
    if len(set(out)) < len(out) or not set(out) <= sizes.keys():
        return NotImplemented
    roots = [i for i, a in enumerate(operands) if mode.is_root(a)]
    others = [i for i in range(len(operands)) if i not in roots]
    weight_letters = _group(letters, roots, out, others)
    x_letters = _group(letters, others, out, roots)
    with mode:
        weight = _joined(operands, letters, roots, weight_letters)
    x = _joined(operands, letters, others, x_letters)
    return contract(mode, "einsum", x, x_letters, weight, weight_letters, out)


def _group(letters: Sequence[str], own: Sequence[int], out: str, rest: Sequence[int]) -> str:
    """The letters of a group of operands that occur in the result or in the other operands."""
    if len(own) == 1:
        return letters[own[0]]
    wanted = set(out).union(*(letters[i] for i in rest))
    return "".join(dict.fromkeys(c for i in own for c in letters[i] if c in wanted))


def _joined(
    operands: Sequence[Tensor], letters: Sequence[str], own: Sequence[int], out: str
) -> Tensor:
    if len(own) == 1:
        return operands[own[0]]
    equation = ",".join(letters[i] for i in own) + "->" + out
    return torch.einsum(equation, *[operands[i] for i in own])


def _parse(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str] | None:
    """The letters of every operand and of the result, an ellipsis spelled out."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    letters = given.split(",")
    if len(letters) != len(operands):
        return None
    if not arrow:
        once = sorted(c for c in set(given) if c.isalpha() and given.count(c) == 1)
        out = ("..." if "..." in given else "") + "".join(once)
    free = "".join(c for c in string.ascii_letters if c not in equation)
    hidden = [
        max(x.dim() - len(own) + 3, 0) if "..." in own else 0
        for x, own in zip(operands, letters, strict=True)
    ]
    spelled = free[: max(hidden)]
    letters = [
        own.replace("...", spelled[len(spelled) - count :])
        for own, count in zip(letters, hidden, strict=True)
    ]
    return letters, out.replace("...", spelled)


@rewrites(torch.tensordot)
def _tensordot(
    mode: Interception,
    func: Function,
    a: Tensor,
    b: Tensor,
    dims: Any = 2,
    out: Tensor | None = None,
) -> Any:
    if out is not None or isinstance(dims, Tensor) or not mode.root_meets_data([a, b]):
        return NotImplemented
    if isinstance(dims, int):
        dims = list(range(a.dim() - dims, a.dim())), list(range(dims))
    a_letters = list(string.ascii_lowercase[: a.dim()])
    b_letters = list(string.ascii_uppercase[: b.dim()])
    for i, j in zip(*dims, strict=True):
        b_letters[j] = a_letters[i]
    kept = [c for c in a_letters if c not in b_letters] + [c for c in b_letters if c.isupper()]
    equation = f"{''.join(a_letters)},{''.join(b_letters)}->{''.join(kept)}"
    with mode:
        return torch.einsum(equation, a, b)


@rewrites(torch.inner, Tensor.inner)
def _inner(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 2 or kwargs or not mode.root_meets_data(args):
        return NotImplemented
    if not all(a.dim() for a in args):
        return NotImplemented
    with mode:
        return torch.tensordot(*args, dims=([-1], [-1]))
