"""Seeded splits of a data set, and the corruptions of the paper's experiments.

All draws come from one ``torch.Generator`` with the given seed. A split puts each image into one of
training, clean and hyper-validation set; the clean set keeps its true labels, the other two are
corrupted the same way. Where labels flip, exactly the given share of each class flips, in training
and hyper-validation set together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UsageError
from .images import Images

BACKGROUNDS = {"cifar10": (0, 1, 3, 5, 7), "cifar100": (7, 12, 41, 62, 85)}

Corruption = Callable[[Tensor, torch.Generator], Tensor]
"""From indices of images to the labels that these get."""


@dataclass(frozen=True)
class Split:
    """One draw of an experiment's data.

    Attributes:
        train: images to train on, labels corrupted.
        flipped: where ``train`` has a label that is not the true one, shape (len(train),).
        clean: the few images with true labels that weigh the others.
        validation: hyper-validation images, corrupted as ``train`` is; may be empty.
        validation_flipped: where their labels are not the true ones.
        test: images with true labels.
        validation_of_true: true labels of ``validation``.
    """

    train: Images
    flipped: Tensor
    clean: Images
    validation: Images
    validation_flipped: Tensor
    test: Images
    validation_of_true: Tensor

    def digest(self) -> str:
        """SHA-256 of all images and labels."""
        parts = (self.train, self.clean, self.validation, self.test)
        return sha256(x for images in parts for x in (images.inputs, images.targets))


def sha256(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors, bit by bit."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def imbalanced(
    images: Images,
    test: Images,
    *,
    classes: tuple[int, int] = (4, 9),
    ratio: float,
    size: int = 5000,
    clean: int = 10,
    seed: int,
) -> Split:
    """Two classes, the second ``ratio`` times as frequent as the first.

    Args:
        images: what is drawn from.
        test: all its images of the two classes are tested on.
        classes: the rare and the frequent class; they become 0 and 1.
        ratio: images of the second class for each of the first, at least 1.
        size: images drawn, clean ones included: these are split off what was drawn.
        clean: number of clean images, half of them rare; an odd one is frequent.
        seed: what the draw depends on.

    Raises:
        UsageError: no rare image would be left to train on, or a class has too few images.
    """
    if not ratio >= 1:
        raise UsageError(f"an imbalance ratio is at least 1, got {ratio:g}")
    few = round(size / (ratio + 1))
    names = tuple(images.classes[c] for c in classes)
    few_clean = clean // 2
    if few <= few_clean:
        raise UsageError(
            f"at {ratio:g}:1 {few} of {size} images would be of class {names[0]}, which leaves "
            f"none to train on beside {few_clean} clean ones"
        )
    if size - few <= clean - few_clean:
        raise UsageError(
            f"at {ratio:g}:1 {size - few} of {size} images would be of class {names[1]}, which "
            f"leaves none to train on beside {clean - few_clean} clean ones"
        )
    generator = torch.Generator().manual_seed(seed)
    trained, kept = [], []
    shares = ((few, few_clean), (size - few, clean - few_clean))
    for label, (count, clean_count) in zip(classes, shares, strict=True):
        index = _shuffled((images.targets == label).nonzero().flatten(), generator)
        if len(index) < count:
            raise UsageError(
                f"{count} images of class {images.classes[label]} are needed, {images.source} has "
                f"{len(index)}"
            )
        kept.append(index[:clean_count])
        trained.append(index[clean_count:count])
    tested = (test.targets == classes[0]) | (test.targets == classes[1])
    chosen = _two_classes(images.take(torch.cat(trained)), classes[1], names)
    empty = torch.zeros(0, dtype=torch.int64)
    return Split(
        train=chosen,
        flipped=torch.zeros(len(chosen), dtype=torch.bool),
        clean=_two_classes(images.take(torch.cat(kept)), classes[1], names),
        validation=chosen.take(empty),
        validation_flipped=empty.bool(),
        test=_two_classes(test.take(tested), classes[1], names),
        validation_of_true=empty,
    )


def uniform_flip(
    images: Images,
    test: Images,
    *,
    rate: float,
    size: int = 0,
    clean: int,
    validation: int,
    seed: int,
    authors: bool = False,
) -> Split:
    """UNIFORMFLIP: a label flips to any other class with equal chance.

    Args:
        images: what is drawn from and split.
        test: what is tested on.
        rate: share of the labels that flip, in [0, 1).
        size: images drawn, clean and hyper-validation images included; 0 means all.
        clean: number of clean images, the same of each class or one more.
        validation: number of hyper-validation images.
        seed: what the split and the flips depend on.
        authors: flip as the authors' published code does: the new label is drawn from all classes
            but the last, the true one included, so that fewer labels are wrong than ``rate`` says.

    Raises:
        UsageError: the rate is impossible, or there are too few images.
    """
    count = len(images.classes)
    _check_rate(rate)

    def corrupt(index: Tensor, generator: torch.Generator) -> Tensor:
        targets = images.targets[index]
        if authors:
            drawn = torch.randint(count - 1, targets.shape, generator=generator)
        else:
            drawn = torch.randint(1, count, targets.shape, generator=generator)
            drawn = (targets + drawn) % count
        return torch.where(_share_of_each_class(targets, rate, generator), drawn, targets)

    return _split(images, test, corrupt, size, clean, validation, seed)


def background_flip(
    images: Images,
    test: Images,
    *,
    rate: float,
    size: int = 0,
    clean: int,
    validation: int,
    background: int,
    seed: int,
) -> Split:
    """BACKGROUNDFLIP: a share ``rate`` of each other class gets the label ``background``.

    The paper's backgrounds, one a trial, are in ``BACKGROUNDS``. Other arguments and errors are
    those of :func:`uniform_flip`.
    """
    count = len(images.classes)
    _check_rate(rate)
    if not 0 <= background < count:
        raise UsageError(f"background class {background} is not one of 0 to {count - 1}")

    def corrupt(index: Tensor, generator: torch.Generator) -> Tensor:
        targets = images.targets[index]
        flips = _share_of_each_class(targets, rate, generator)
        return torch.where(flips, torch.full_like(targets, background), targets)

    return _split(images, test, corrupt, size, clean, validation, seed)


def human_noise(
    images: Images,
    test: Images,
    *,
    labels: Tensor,
    size: int = 0,
    clean: int,
    validation: int,
    seed: int,
) -> Split:
    """Labels that people gave, as :func:`benchmarks.paper.human.human_labels` returns them.

    Args:
        images: what is drawn from and split, with true labels.
        test: what is tested on.
        labels: the label of each image by people, int64, shape (len(images),).
        size: images drawn, clean and hyper-validation images included; 0 means all.
        clean: number of clean images, the same of each class or one more; these keep true labels.
        validation: number of hyper-validation images.
        seed: what the split depends on.

    Raises:
        UsageError: there are not as many labels as images, or too few images.
    """
    if labels.shape != images.targets.shape:
        raise UsageError(f"there are {len(labels)} human labels for {len(images)} images")
    return _split(images, test, lambda index, _: labels[index], size, clean, validation, seed)


def _split(
    images: Images,
    test: Images,
    corrupt: Corruption,
    size: int,
    clean: int,
    validation: int,
    seed: int,
) -> Split:
    """Draw the images, of these the clean, then the validation images; corrupt what remains."""
    if size > len(images):
        raise UsageError(f"{size} images are needed, {images.source} has {len(images)}")
    generator = torch.Generator().manual_seed(seed)
    order = _shuffled(torch.arange(len(images)), generator)[: size or None]
    kept = _balanced(images, order, clean, generator)
    others = order[~torch.isin(order, kept)]
    if validation >= len(others):
        raise UsageError(
            f"{clean} clean and {validation} hyper-validation images of {len(order)} leave none "
            "to train on"
        )
    noisy = replace(images.take(others), targets=corrupt(others, generator))
    true = images.targets[others]
    wrong = noisy.targets != true
    held_out, trained = torch.arange(len(others)).tensor_split([validation])
    return Split(
        train=noisy.take(trained),
        flipped=wrong[trained],
        clean=images.take(kept),
        validation=noisy.take(held_out),
        validation_flipped=wrong[held_out],
        test=test,
        validation_of_true=true[held_out],
    )


def _balanced(images: Images, order: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """The first images in ``order`` of each class, ``size`` in all; chance decides who has more."""
    count = len(images.classes)
    wanted = torch.full((count,), size // count)
    wanted[_shuffled(torch.arange(count), generator)[: size % count]] += 1
    targets = images.targets[order]
    available = targets.bincount(minlength=count)
    for label in (wanted > available).nonzero().flatten().tolist():
        raise UsageError(
            f"{int(wanted[label])} clean images of class {images.classes[label]} are needed, those "
            f"drawn from {images.source} have {int(available[label])}"
        )
    return torch.cat([order[targets == c][: int(wanted[c])] for c in range(count)])


def _shuffled(index: Tensor, generator: torch.Generator) -> Tensor:
    return index[torch.randperm(len(index), generator=generator)]


def _share_of_each_class(targets: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """A mask that holds ``rate`` of each class, rounded."""
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    for label in targets.unique().tolist():
        index = _shuffled((targets == label).nonzero().flatten(), generator)
        chosen[index[: round(rate * len(index))]] = True
    return chosen


def _two_classes(images: Images, second: int, names: tuple[str, ...]) -> Images:
    return replace(images, targets=(images.targets == second).long(), classes=names)


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise UsageError(f"a share of flipped labels is at least 0 and below 1, got {rate:g}")
