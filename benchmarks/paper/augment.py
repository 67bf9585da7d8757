"""What CIFAR images go through before each step: a shifted crop and a mirror, at random."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, generator: torch.Generator, *, margin: int = 2) -> Tensor:
    """Pad with zeros, crop back at random, and mirror half of the images left to right.

    Args:
        images: any dtype, shape (n, C, H, W).
        generator: what the draws depend on; on the CPU, wherever the images are.
        margin: zeros on each side; 2 takes 32 pixels to 36 and crops 32 of them.

    Returns:
        as ``images``.
    """
    n, _, height, width = images.shape
    shift = torch.randint(2 * margin + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(mirrored, columns.flip(1), columns) + shift[1]
    rows = torch.arange(height) + shift[0]
    example = torch.arange(n).view(n, 1, 1)
    picked = (
        x.to(images.device, non_blocking=True)
        for x in (example, rows[:, :, None], columns[:, None, :])
    )
    padded = F.pad(images, (margin, margin, margin, margin))
    return padded.permute(0, 2, 3, 1)[tuple(picked)].permute(0, 3, 1, 2).contiguous()
