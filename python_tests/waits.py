"""Finds what would make the host wait for the device, on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

# They return values to the host, or a shape that depends on values, or copy from the host.
_WAITING = {
    _aten._local_scalar_dense,
    _aten.equal,
    _aten.is_nonzero,
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


class WaitedError(AssertionError):
    """An operation would wait for the device."""


class NeverWaits(TorchDispatchMode):
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
        packet = func.overloadpacket
        waits = packet in _WAITING
        if packet in (_aten.index, _aten.index_put, _aten.index_put_):
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        elif packet is _aten._to_copy:
            waits = kwargs.get("device") not in (None, args[0].device)
        elif packet is _aten.repeat_interleave:
            waits = isinstance(args[0], Tensor) and kwargs.get("output_size") is None
        if waits:
            raise WaitedError(f"{func} would wait for the device")
        out = func(*args, **kwargs)
        self.calls += 1
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel() * x.element_size())
        return out
