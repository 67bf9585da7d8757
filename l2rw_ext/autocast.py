"""Forwards of a step run under its caller's autocast, all else without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_DEVICES = ("cpu", "cuda")


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
