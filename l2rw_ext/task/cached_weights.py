"""Weights that ``torch.nn.utils.parametrize.cached()`` keeps, for one forward of a step each.

A user may enter ``cached()`` around whole steps. A kept weight has a graph, which the first of a
step's backwards would free, and it holds the parameters of before the last optimizer step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.nn.utils import parametrize


def forget_cached_weights() -> None:
    """Let the forward that follows compute all parametrized weights anew, once each if cached."""
    parametrize._cache = {}


@contextlib.contextmanager
def cached_weights_kept() -> Iterator[None]:
    """Put back what was kept before the body."""
    kept = parametrize._cache
    try:
        yield
    finally:
        parametrize._cache = kept


@contextlib.contextmanager
def without_cached_weights() -> Iterator[None]:
    """In the body no weight is kept, so that a forward changes nothing."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled
