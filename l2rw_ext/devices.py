"""What a step asks of a device, and the settings of torch that it changes for a while.

Whether reading a value would synchronise with the device, which devices run autocast, and how
float32 products are rounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_DEVICES = ("cpu", "cuda")


def readable(x: Tensor) -> bool:
    """Whether the host can read values of ``x`` without synchronising with a device.

    The host runs ahead of a CUDA device, and reading a value there waits until the device has
    computed it. A step therefore decides by values only where they are readable. Elsewhere it works
    in a way that does not depend on them: examples without weight are masked instead of left out,
    and errors are raised when a result is read. Making a plan reads values on any device.
    """
    return x.device.type == "cpu"


class Autocast:
    """The autocast of a step's caller, entered again around the forwards of the step.

    The cache of cast weights is cleared on both sides: a weight that was cast before an optimiser
    changed it, or in another forward, is never met.
    """

    def __init__(self) -> None:
        self._devices = [d for d in _DEVICES if torch.is_autocast_enabled(d)]
        self.key = tuple((d, torch.get_autocast_dtype(d)) for d in self._devices)
        """What a plan depends on."""

    def __enter__(self) -> None:
        for device in self._devices:
            torch.set_autocast_enabled(device, True)
            torch.clear_autocast_cache()

    def __exit__(self, *error: Any) -> None:
        for device in self._devices:
            torch.set_autocast_enabled(device, False)
            torch.clear_autocast_cache()


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast is off in the body, and afterwards as it was."""
    devices = [d for d in _DEVICES if torch.is_autocast_enabled(d)]
    for device in devices:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device in devices:
            torch.set_autocast_enabled(device, True)


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Whether products and convolutions of float32 may be rounded to TF32, inside."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
