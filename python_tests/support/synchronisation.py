"""What would make the host wait for the device is found on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

_WAITING = {
    _aten._local_scalar_dense,
    _aten.equal,
    _aten.is_nonzero,
    _aten.item,
    _aten.lift_fresh,
    _aten.masked_select,
    _aten.nonzero,
    _aten.nonzero_numpy,
    _aten.argwhere,
    _aten.bincount,
    _aten.unique_consecutive,
    _aten.unique_dim,
    _aten._unique,
    _aten._unique2,
}
"""They return values to the host, or a shape that depends on values, or copy from the host."""


def waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation makes the host wait, if its tensors are on a device."""
    packet = func.overloadpacket
    if packet in (_aten.index, _aten.index_put, _aten.index_put_):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if packet is _aten._to_copy:
        return kwargs.get("device") not in (None, args[0].device)
    if packet is _aten.repeat_interleave:
        counts = func._overloadname != "self_int"
        return counts and kwargs.get("output_size") is None
    return packet in _WAITING


class SynchronisedError(BaseException):
    """An operation would wait for the device; no engine may take this for a failure of its own."""


class NoSynchronisation(TorchDispatchMode):
    """Fails on every operation that would wait, were its tensors on a device.

    ``largest`` is the size of the largest result of an operation so far, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if waits(func, args, kwargs):
            raise SynchronisedError(f"{func} would wait for the device")
        out = func(*args, **kwargs)
        self.calls += 1
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel() * x.element_size())
        return out
