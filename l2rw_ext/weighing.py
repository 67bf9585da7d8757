"""From scores to weights: the paper's Eq. 8-9, and other ways.

A weighing is a callable that takes scores u, shape (n,), and returns weights, shape (n,), which are
used as they are: they must be finite and not negative, and usually sum to one. It gets the scores
of all examples that are normalised together, those of all ranks if there are several; with
``per="position"`` those of all positions, one after the other. The score of an example that is left
out, as its loss is not finite or its position is masked, is minus infinity; its weight is not used.

Example:
    >>> import torch
    >>> from torch.nn import functional as F
    >>> import l2rw_ext as l2rw
    >>> model = torch.nn.Linear(4, 3)
    >>> loss_fn = lambda out, y: F.cross_entropy(out, y, reduction="none")
    >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
    >>> reweighter = l2rw.Reweighter(model, loss_fn, weighing=l2rw.weighing.top_k(2))
    >>> reweighter.weights((x, y), (x[:2].clone(), y[:2])).sort(descending=True).values[:3]
    tensor([0.5000, 0.5000, 0.0000])
    >>> own = l2rw.Reweighter(model, loss_fn, weighing=lambda u: (u > u.median()) / len(u))
"""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from . import ops

__all__ = [
    "Proportional",
    "Weighing",
    "proportional",
    "rectified",
    "softmax",
    "threshold",
    "top_k",
]

Weighing: TypeAlias = Callable[[Tensor], Tensor]
"""Scores (n,) -> weights (n,)."""


class Proportional(abc.ABC):
    """Weights w_i = h(u_i) / Σ_k h(u_k), or zeros where that sum is zero.

    Sums over parts of a batch add up to those of the whole, so that such a weighing works in
    :meth:`~l2rw_ext.Reweighter.accumulate`. Numbers h may be relative to a *level* of the scores, a
    factor that cancels.
    """

    @abc.abstractmethod
    def shares(self, scores: Tensor, level: Tensor | None) -> Tensor:
        """h(u) relative to ``level``, shape (n,); zero where a score is minus infinity."""

    def level(self, scores: Tensor) -> Tensor | None:
        """The level to take for these scores, shape (); None if h needs none."""
        return None

    def change(self, level: Tensor, new: Tensor) -> Tensor:
        """By what numbers h relative to ``level`` are multiplied to be relative to ``new``."""
        raise AssertionError(f"{self} has no level")

    def __call__(self, scores: Tensor) -> Tensor:
        """Weights, shape (n,), in the dtype of the scores."""
        return _normalized(self.shares(scores, self.level(scores)))


def _normalized(shares: Tensor) -> Tensor:
    """Numbers over their sum; zeros if that is zero. Sums in float64 cannot overflow."""
    wide = shares.double()
    total = wide.sum()
    return (wide / total.masked_fill(total == 0, 1)).to(shares.dtype)


@dataclass(frozen=True)
class _Rectified(Proportional):
    def __call__(self, scores: Tensor) -> Tensor:
        return ops.normalize_weights(scores)

    def shares(self, scores: Tensor, level: Tensor | None) -> Tensor:
        return scores.clamp(min=0)

    def __repr__(self) -> str:
        return "rectified"


rectified: Proportional = _Rectified()
"""Eq. 8-9 of the paper, the default: w_i = max(u_i, 0) / Σ_k max(u_k, 0)."""


@dataclass(frozen=True)
class _Threshold(Proportional):
    t: float

    def shares(self, scores: Tensor, level: Tensor | None) -> Tensor:
        return (scores > self.t).to(scores.dtype)

    def __repr__(self) -> str:
        return f"threshold({self.t!r})"


def threshold(t: float = 0.0) -> Proportional:
    """Equal weights of all examples whose score is above ``t``.

    With t = 0 these are the examples that the paper gives a weight to, as data selection by
    In-Run Data Shapley keeps what has a positive value.

    Args:
        t: a finite number, in the unit of scores.

    Raises:
        ValueError: it is not.
    """
    return _Threshold(_number("threshold: t", t))


@dataclass(frozen=True)
class _Softmax(Proportional):
    temperature: float

    def level(self, scores: Tensor) -> Tensor:
        return scores.amax().clamp(min=torch.finfo(scores.dtype).min)

    def change(self, level: Tensor, new: Tensor) -> Tensor:
        return ((level - new) / self.temperature).exp()

    def shares(self, scores: Tensor, level: Tensor | None) -> Tensor:
        assert level is not None
        return ((scores - level) / self.temperature).exp()

    def __repr__(self) -> str:
        return f"softmax({self.temperature!r})"


def softmax(temperature: float) -> Proportional:
    """Weights w_i = exp(u_i / τ) / Σ_k exp(u_k / τ): no example has a weight of exactly zero.

    A small temperature τ prefers the largest scores, a large one makes weights equal. Scores are
    inner products of gradients, whose size changes during training; with ``normalize="example"``
    they lie between -1 and 1.

    Args:
        temperature: τ, a finite number above zero, in the unit of scores.

    Raises:
        ValueError: it is not.
    """
    if _number("softmax: temperature", temperature) <= 0:
        raise ValueError(f"softmax: temperature must be above zero, got {temperature!r}")
    return _Softmax(float(temperature))


@dataclass(frozen=True)
class _Own(Proportional):
    h: Weighing

    def shares(self, scores: Tensor, level: Tensor | None) -> Tensor:
        left_out = scores == -math.inf
        found = checked(self.h(scores.masked_fill(left_out, 0)), scores)
        # Negative numbers over their negative sum would be weights.
        return found.masked_fill(found < 0, math.nan).masked_fill(left_out, 0)

    def __repr__(self) -> str:
        return f"proportional({name_of(self.h)})"


def proportional(h: Weighing) -> Proportional:
    """Weights w_i = h(u_i) / Σ_k h(u_k) for a function of yours.

    Unlike any other callable it works in :meth:`~l2rw_ext.Reweighter.accumulate`, and over several
    processes it costs nothing that the paper's weights do not.

    Args:
        h: scores (n,) -> numbers (n,), finite and not negative, each of its own score alone. It is
            called on parts of a batch.

    Raises:
        TypeError: it is no function.

    Example:
        >>> import torch
        >>> import l2rw_ext as l2rw
        >>> squares = l2rw.weighing.proportional(lambda u: u.clamp(min=0) ** 2)
        >>> squares(torch.tensor([1.0, -2.0, 2.0]))
        tensor([0.2000, 0.0000, 0.8000])
    """
    if not callable(h):
        raise TypeError(f"proportional: h must be callable, got {type(h).__name__}")
    return _Own(h)


@dataclass(frozen=True)
class _TopK:
    k: int

    def __call__(self, scores: Tensor) -> Tensor:
        largest = scores.topk(min(self.k, scores.shape[0])).indices
        chosen = torch.zeros_like(scores).scatter(0, largest, 1)
        return _normalized(chosen.masked_fill(scores == -math.inf, 0))

    def __repr__(self) -> str:
        return f"top_k({self.k})"


def top_k(k: int) -> Weighing:
    """Weights 1/k of the k examples with the largest scores, whatever the sign of these is.

    If there are fewer than k examples, all have equal weights. Of equal scores at the border
    ``torch.topk`` chooses. Over several processes these are the k of all ranks' examples.

    Args:
        k: a number of at least 1.

    Raises:
        ValueError: it is not.
    """
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or k < 1:
        raise ValueError(f"top_k: k must be a whole number of at least 1, got {k!r}")
    return _TopK(int(k))


def own_function(weighing: Weighing) -> Weighing | None:
    """The function of the user that a weighing calls; None if all of it is from here."""
    if isinstance(weighing, _Own):
        return weighing.h
    return None if type(weighing).__module__ == __name__ else weighing


def name_of(weighing: Weighing) -> str:
    """What errors and ``explain()`` call it; the same on all ranks."""
    if type(weighing).__module__ == __name__:
        return repr(weighing)
    return str(getattr(weighing, "__qualname__", type(weighing).__qualname__))


def checked(weights: Tensor, scores: Tensor) -> Tensor:
    """What a user's function returned, in the dtype of the scores.

    Raises:
        TypeError: it is no tensor of numbers.
        ValueError: it has another shape than the scores, or lies on another device.
    """
    if not isinstance(weights, Tensor) or weights.is_complex():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weighing must return a tensor of real numbers, got {kind}")
    if weights.shape != scores.shape or weights.device != scores.device:
        raise ValueError(
            f"weighing must return one weight for each score, shape {tuple(scores.shape)} on "
            f"{scores.device}, got {tuple(weights.shape)} on {weights.device}"
        )
    return weights.detach().to(scores.dtype)


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)
