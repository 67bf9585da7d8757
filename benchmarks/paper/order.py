"""What is random in a run, by seed, purpose and number: any step can be asked for at any time."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """A generator that depends on its three arguments alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Epochs:
    """Batches that go through shuffled epochs of ``count`` examples, one epoch after the other.

    A batch that begins before the end of an epoch takes the rest from the next, so that all batches
    have the same size. Batch t depends on seed, purpose and t alone, not on the batches before it.
    """

    def __init__(self, count: int, size: int, seed: int, purpose: str) -> None:
        self.count, self.size = count, size
        self._seed, self._purpose = seed, purpose
        self._shuffled: dict[int, Tensor] = {}

    def __getitem__(self, step: int) -> Tensor:
        """Indices of the batch of this step, shape (size,)."""
        position, missing = step * self.size, self.size
        parts = []
        while missing:
            epoch, start = divmod(position, self.count)
            parts.append(self._epoch(epoch)[start : start + missing])
            position += len(parts[-1])
            missing -= len(parts[-1])
        return torch.cat(parts)

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._shuffled:
            draw = generator(self._seed, self._purpose, epoch)
            kept = {k: v for k, v in self._shuffled.items() if k == epoch - 1}
            self._shuffled = {**kept, epoch: torch.randperm(self.count, generator=draw)}
        return self._shuffled[epoch]
