"""From the settings of a run to its data: which set, corrupted how."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from . import splits
from .data import load
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
            clean_per_class=settings.clean,
            seed=settings.seed,
        )
    if settings.task == "uniform":
        return splits.uniform_flip(
            images,
            test,
            rate=settings.level,
            clean=settings.clean * len(images.classes),
            validation=settings.validation,
            seed=settings.seed,
        )
    if settings.task == "background":
        return splits.background_flip(
            images,
            test,
            rate=settings.level,
            clean_per_class=settings.clean,
            validation=settings.validation,
            background=settings.background,
            seed=settings.seed,
        )
    raise UsageError(f"unknown task {settings.task!r}")
