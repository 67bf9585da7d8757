"""What would make the host wait for the device is found on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from l2rw_ext.compiled.watch import waits


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
