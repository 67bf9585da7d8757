"""Ids: the example that each element of a tensor belongs to, and how ids combine.

An id is NONE (made without data), an example, or MIXED, in this order: to call an element more than
it is, is always safe. The ids of a tensor are int32 on the CPU. They have as many dimensions as the
tensor, and size 1 along a dimension where all elements are alike, so that a batch of n images costs
n numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

NONE, MIXED = -1, 2**30


@functools.cache
def full(rank: int, value: int = NONE) -> Tensor:
    """The ids of a tensor of that many dimensions all of whose elements are alike."""
    return torch.full((1,) * rank, value, dtype=torch.int32, device="cpu")


def counted(rank: int, dimension: int, first: int, size: int) -> Tensor:
    """Ids first, first + 1, ... along one dimension."""
    ids = torch.arange(first, first + size, dtype=torch.int32, device="cpu")
    return ids.reshape([-1 if d == dimension else 1 for d in range(rank)])


def join(a: Tensor, b: Tensor) -> Tensor:
    """Ids of what is computed from both."""
    return a if a is b else torch.where((a == b) | (b < 0), a, torch.where(a < 0, b, MIXED))


def prefer(a: Tensor, b: Tensor) -> Tensor:
    """The example of a where it has one, else that of b: for first labels, which are free."""
    return torch.where((a < 0) | ((a == MIXED) & (b >= 0)), b, a)


def settle(high: Tensor, low: Tensor) -> Tensor:
    """Ids of what is computed from elements whose largest id is ``high``.

    ``low`` is the smallest of their ids as :func:`lowest` returns them.
    """
    return torch.where((high < 0) | (high == low), high, MIXED)


def lowest(ids: Tensor) -> Tensor:
    """Ids whose minimum ignores NONE."""
    return torch.where(ids < 0, MIXED, ids)


def over(ids: Tensor, dims: Iterable[int] | None = None, rank: int | None = None) -> Tensor:
    """Ids of what is computed from all elements along ``dims``, which keep size 1.

    ``dims`` are all dimensions if they are None. With ``rank``, the result, which must have one
    element, has that many dimensions.
    """
    count = max(ids.dim(), 1)
    wanted = {d % count for d in (range(count) if dims is None else dims)}
    unlike = [d for d in wanted if ids.dim() and ids.shape[d] > 1]
    if unlike:
        ids = settle(ids.amax(unlike, keepdim=True), lowest(ids).amin(unlike, keepdim=True))
    return ids if rank is None else ids.reshape((1,) * rank)


def mixed(ids: Tensor) -> bool:
    """Whether some element is MIXED."""
    return ids is not full(ids.dim()) and bool((ids == MIXED).any())


def unowned(ids: Tensor) -> bool:
    """Whether all elements are NONE."""
    return ids is full(ids.dim()) or bool((ids < 0).all())


def squash(ids: Tensor, *, look: bool = True) -> Tensor:
    """Ids with size 1 along dimensions where all elements are alike.

    Without a ``look`` at the elements, these are the dimensions of stride 0.
    """
    for d in reversed(range(ids.dim())):
        alike = ids.stride(d) == 0 or (look and bool((ids == ids.narrow(d, 0, 1)).all()))
        if ids.shape[d] > 1 and alike:
            ids = ids.narrow(d, 0, 1)
    return ids if ids.numel() else full(ids.dim())


def regroup(ids: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Ids of a tensor of shape ``old``, seen in shape ``new``.

    Dimensions are written out only where unlike ones are merged or divided.
    """
    i = j = 0
    sizes: list[int] = []
    shape: list[int] = []
    while i < len(old) or j < len(new):
        i0, j0, a, b = i, j, 1, 1
        while (i == i0 and j == j0) or a != b:
            if (a <= b and i < len(old)) or j == len(new):
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        alike = all(s == 1 for s in ids.shape[i0:i])
        sizes += [1] * (i - i0) if alike else old[i0:i]
        shape += [1] * (j - j0) if alike else new[j0:j]
    return squash(ids.expand(sizes).reshape(shape))
