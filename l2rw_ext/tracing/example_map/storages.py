"""Where ids are kept: by storage and geometry, because a view is another object in every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .ids import MIXED, NONE, full, join, over, squash

Pair: TypeAlias = tuple[Tensor, Tensor]
"""The ids of a tensor: its values and its labels."""

Geometry: TypeAlias = tuple[Any, ...]


def plain(x: Tensor) -> bool:
    """Whether the storage and strides of x are those that the operations on it read."""
    strided = x.layout == torch.strided and not x.is_nested
    return strided and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def key(x: Tensor) -> int:
    """What all tensors on the storage of x share."""
    storage: int = x.untyped_storage()._cdata
    return storage


def geometry(x: Tensor) -> Geometry:
    """Which elements of its storage x is made of."""
    return x.storage_offset(), tuple(x.shape), x.stride(), x.element_size()


class Storage:
    """The ids of all tensors on one storage: by geometry, by element once a part was written.

    Args:
        x: a tensor on it.
        sound: whether autograd saw what its elements were computed from. Otherwise the labels are
            proposals: they do not bound what a gradient reaches.
    """

    def __init__(self, x: Tensor, *, sound: bool) -> None:
        self._alive = StorageWeakRef(x.untyped_storage())  # no other storage gets its address
        self.views: dict[Geometry, Pair] = {}
        self._flat: Pair | None = None
        self._width, self._bytes = x.element_size(), x.untyped_storage().nbytes()
        self.sound = sound
        self.known = False
        """Whether it holds the same in each forward, being made of shapes and numbers alone."""

    def get(self, x: Tensor) -> Pair:
        """The ids of x."""
        found = self.views.get(geometry(x))
        if found is None:
            grown = x.untyped_storage().nbytes() > self._bytes
            if self._flat is None and not self.views and not grown:
                return full(x.dim()), full(x.dim())
            found = self.views[geometry(x)] = self._read(self._flatten(x), x)
        return found

    def set(self, x: Tensor, pair: Pair) -> None:
        """Other values were written to all elements of x."""
        for d in range(x.dim()):
            if x.stride(d) == 0 and x.shape[d] > 1:  # the same memory all along d
                x, pair = x.narrow(d, 0, 1), _both(lambda ids, d=d: over(ids, [d]), pair)
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        whole = x.numel() * x.element_size() == x.untyped_storage().nbytes()
        if whole and x.permute(order).is_contiguous():
            self.views, self._flat = {geometry(x): pair}, None
            self._width, self._bytes = x.element_size(), x.untyped_storage().nbytes()
        elif x.numel() and not all(map(_same, self.get(x), pair)):
            flat = self._flatten(x)
            if x.element_size() == self._width and _separate(x.shape, x.stride()):
                for kept, ids in zip(flat, pair, strict=True):
                    elements = kept.as_strided(x.shape, x.stride(), x.storage_offset())
                    elements.copy_(ids.expand(x.shape))
            else:
                flat = _both(join, flat, _both(_whole, pair))
            self.views, self._flat = {}, flat

    def becomes_sound(self, *, keep: bool) -> None:
        """Autograd is about to see a write; ``keep``: whether a gradient reaches what is there."""
        labels = (lambda values: values.clone()) if keep else (lambda v: torch.full_like(v, NONE))
        self.views = {where: (v, labels(v)) for where, (v, _) in self.views.items()}
        if self._flat is not None:
            self._flat = self._flat[0], labels(self._flat[0])
        self.sound = True

    def _read(self, flat: Pair, x: Tensor) -> Pair:
        if x.element_size() != self._width:
            return _both(lambda ids: over(ids, None, x.dim()), flat)
        where = x.shape, x.stride(), x.storage_offset()
        return _both(lambda ids: squash(ids.as_strided(*where).clone()), flat)

    def _flatten(self, x: Tensor) -> Pair:
        """Ids by element of the storage; a storage that grew has new elements of any value."""
        if self._flat is None:
            size = self._bytes // self._width
            flat = _both(lambda ids: ids.expand(size).clone(), (full(1), full(1)))
            for (offset, shape, stride, width), pair in self.views.items():
                if width != self._width:
                    flat = _both(join, flat, _both(_whole, pair))
                elif _separate(shape, stride):  # others are views of these
                    for kept, ids in zip(flat, pair, strict=True):
                        kept.as_strided(shape, stride, offset).copy_(ids.expand(shape))
            self._flat = flat
        missing = x.untyped_storage().nbytes() // self._width - self._flat[0].numel()
        if missing > 0:
            self._flat = _both(lambda f: torch.cat([f, full(1, MIXED).expand(missing)]), self._flat)
        return self._flat


def _separate(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether no two elements share memory; False where that is hard to say."""
    extent = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and step < extent:
            return False
        extent += (size - 1) * step
    return True


def _both(function: Any, *pairs: Pair) -> Pair:
    values, labels = (function(*ids) for ids in zip(*pairs, strict=True))
    return values, labels


def _whole(ids: Tensor) -> Tensor:
    return over(ids, None, 1)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*torch.broadcast_tensors(a, b))
