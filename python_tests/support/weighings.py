"""Ways from scores to weights, and what they are in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l2rw_ext import reference, weighing


def squares(u: Tensor) -> Tensor:
    """A function of single scores."""
    return u.clamp(min=0) ** 2


def above_mean(u: Tensor) -> Tensor:
    """A function of all scores."""
    kept = u > -math.inf
    mean = u.masked_fill(~kept, 0).sum() / kept.sum()
    return (u - mean).clamp(min=0)


def _softmax(u: Tensor) -> Tensor:
    return (u / 0.3).softmax(0)


def _top(u: Tensor) -> Tensor:
    return torch.zeros_like(u).index_fill(0, u.argsort()[-3:], 1 / 3)


def _equal(kept: Tensor) -> Tensor:
    return kept.to(torch.float64) / max(1, int(kept.sum()))


WEIGHINGS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "rectified": (weighing.rectified, reference.weights_from_scores),
    "threshold": (weighing.threshold(0.1), lambda u: _equal(u > 0.1)),
    "softmax": (weighing.softmax(0.3), _softmax),
    "proportional": (weighing.proportional(squares), lambda u: squares(u) / squares(u).sum()),
    "top_k": (weighing.top_k(3), _top),
    "own": (above_mean, above_mean),
}
"""Each weighing, and what it is in plain torch."""

PROPORTIONAL = ("rectified", "threshold", "softmax", "proportional")
