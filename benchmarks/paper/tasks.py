"""From the settings of a run to its data: which set, corrupted how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import splits
from .data import load
from .human import human_labels
from .settings import Settings
from .splits import Split


def make_split(settings: Settings, data_root: Path | None) -> Split:
    """The split of a run; it depends on data, corruption and seed, not on the method.

    Raises:
        UsageError: the data is not there, or the split is impossible.
    """
    images, test = (load(settings.data, part, data_root) for part in ("train", "test"))
    if settings.task == "imbalance":
        return splits.imbalanced(
            images,
            test,
            ratio=settings.level,
            size=settings.images or len(images),
            clean=settings.clean,
            seed=settings.drawn,
        )
    shared: dict[str, Any] = {
        "size": settings.images,
        "clean": settings.clean,
        "validation": settings.validation,
        "seed": settings.drawn,
    }
    rate = settings.level
    if settings.task == "uniform":
        return splits.uniform_flip(images, test, rate=rate, authors=settings.authors, **shared)
    if settings.task == "background":
        background = settings.background
        return splits.background_flip(images, test, rate=rate, background=background, **shared)
    labels = human_labels(images.targets, settings.labels, data_root)
    return splits.human_noise(images, test, labels=labels, **shared)
