"""Labelled images, as all loaders give them and all splits take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        inputs: uint8, shape (N, C, H, W).
        targets: int64, shape (N,), each below ``len(classes)``.
        classes: names of the classes.
        source: what they were read from, for the record.
    """

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...]
    source: str = ""

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Tensor) -> Images:
        """The images at these indices (int64) or under this mask (bool)."""
        return replace(self, inputs=self.inputs[index], targets=self.targets[index])

    def to(self, device: str | torch.device) -> Images:
        """The images on a device."""
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def floats(self, index: Tensor | None = None, *, signed: bool = False) -> Tensor:
        """Inputs as float32: all, or those at ``index``; in [0, 1], or in [-1, 1] if ``signed``."""
        return floats(self.inputs if index is None else self.inputs[index], signed=signed)

    def counts(self) -> Tensor:
        """How many images each class has, shape (classes,)."""
        return self.targets.bincount(minlength=len(self.classes))


def floats(inputs: Tensor, *, signed: bool) -> Tensor:
    """Bytes as float32 in [0, 1], or in [-1, 1] if ``signed``."""
    return inputs.float().div_(127.5).sub_(1) if signed else inputs.float().div_(255)
