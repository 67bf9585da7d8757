"""What a step needs to know of a device, and the settings of torch that it changes for a while.

The module answers four questions: whether a step is being traced to a graph, whether reading a
value would synchronise with the device, which devices run autocast, and how float32 products are
rounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

AUTOCAST_DEVICES = ("cpu", "cuda")
"""The kinds of devices whose autocast a step follows."""


_tracing: ContextVar[bool] = ContextVar("tracing", default=False)


def tracing() -> bool:
    """Whether the step of this thread is being traced: its graph serves other values, too."""
    return _tracing.get()


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """A context for the step that is traced."""
    before = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(before)


def synchronous(x: Tensor) -> bool:
    """Whether values of ``x`` are known to the host when an operation on it has returned."""
    return x.device.type == "cpu"


def readable(x: Tensor) -> bool:
    """Whether the host can read values of ``x`` without synchronising with a device.

    The host runs ahead of a CUDA device, and reading a value there waits until the device has
    computed it. A step therefore decides by values only where they are readable. Elsewhere it works
    in a way that does not depend on them: examples without weight are masked instead of left out,
    and errors are raised when a result is read. Making a plan reads values on any device. No value
    of a step that is traced can be read.
    """
    return synchronous(x) and not tracing()


class Autocast:
    """The autocast of a step's caller, entered again around the forwards of the step.

    The cache of cast parameters is cleared on both sides, so that no forward uses a parameter that
    was cast before an optimiser changed it, or that was cast in another forward.
    """

    def __init__(self) -> None:
        self._devices = [d for d in AUTOCAST_DEVICES if torch.is_autocast_enabled(d)]
        self.key = tuple((d, torch.get_autocast_dtype(d)) for d in self._devices)
        """The devices and dtypes of the autocast; a plan holds only for one of these keys."""

    def __enter__(self) -> None:
        self._switch(True)

    def __exit__(self, *error: Any) -> None:
        self._switch(False)

    def _switch(self, enabled: bool) -> None:
        for device in self._devices:
            torch.set_autocast_enabled(device, enabled)
            torch.clear_autocast_cache()


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off in the body, and restore it afterwards."""
    devices = [d for d in AUTOCAST_DEVICES if torch.is_autocast_enabled(d)]
    for device in devices:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device in devices:
            torch.set_autocast_enabled(device, True)


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Choose whether products and convolutions of float32 in the body may be rounded to TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
