"""From the settings of a run to its data: which set, corrupted how."""

from __future__ import annotations

from pathlib import Path

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
    clean, validation, seed = settings.clean, settings.validation, settings.seed
    if settings.task == "imbalance":
        return splits.imbalanced(
            images,
            test,
            ratio=settings.level,
            size=settings.images or len(images),
            clean=clean,
            seed=seed,
        )
    if settings.task == "uniform":
        return splits.uniform_flip(
            images,
            test,
            rate=settings.level,
            clean=clean,
            validation=validation,
            seed=seed,
            authors=settings.authors,
        )
    if settings.task == "background":
        return splits.background_flip(
            images,
            test,
            rate=settings.level,
            clean=clean,
            validation=validation,
            background=settings.background,
            seed=seed,
        )
    labels = human_labels(images.targets, settings.labels, data_root)
    return splits.human_noise(
        images, test, labels=labels, clean=clean, validation=validation, seed=seed
    )
