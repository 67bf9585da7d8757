"""Means over seeds, with their 95% confidence intervals."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key")


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by key, both in the order in which they come."""
    out: dict[Key, list[Item]] = {}
    for item in items:
        out.setdefault(key(item), []).append(item)
    return out


class Mean(NamedTuple):
    """A mean and half the width of its 95% confidence interval; NaN for a single value."""

    value: float
    half_width: float

    @property
    def text(self) -> str:
        """As tables have it."""
        if math.isnan(self.half_width):
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ± {self.half_width:.2f}"


def mean(values: Sequence[float]) -> Mean:
    """By Student's t distribution, as few seeds ask for."""
    n = len(values)
    if n == 1:
        return Mean(values[0], math.nan)
    quantile = float(importlib.import_module("scipy.stats").t.ppf(0.975, n - 1))
    return Mean(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(n))
