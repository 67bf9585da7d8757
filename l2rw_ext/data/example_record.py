"""What a run has learnt about each training example, by its index in the training set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ExampleRecord:
    """Scores of examples over the steps that named the examples by ``index``.

    The tables grow with the largest index seen; index runs from 0 to ``len(record) - 1``. Examples
    with wrong labels collect low scores: ``record.mean_scores.argsort()`` lists the most suspicious
    first (NaN, for examples never seen, sorts last).

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> import l2rw_ext as l2rw
        >>> reweighter = l2rw.Reweighter(
        ...     torch.nn.Linear(4, 3), lambda out, y: F.cross_entropy(out, y, reduction="none")
        ... )
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> _ = reweighter.backward((x, y), (x[:2].clone(), y[:2]), index=torch.arange(10, 18))
        >>> reweighter.record.visits[8:12].tolist()
        [0, 0, 1, 1]
    """

    def __init__(self) -> None:
        self.visits = torch.zeros(0, dtype=torch.int64)
        """How often each example was scored, int64, on the CPU."""
        self.scores = torch.zeros(0)
        """The last score u of each example; NaN where it was never scored."""
        self._positive = torch.zeros(0)
        self._total = torch.zeros(0)

    def __len__(self) -> int:
        return self.visits.numel()

    @property
    def mean_scores(self) -> Tensor:
        """The mean score of each example; NaN where it was never scored."""
        mean: Tensor = self._total / self.visits.to(self._total)
        return mean

    @property
    def kept_share(self) -> Tensor:
        """The share of its visits in which an example had a positive score; NaN without visits."""
        share: Tensor = self._positive / self.visits.to(self._positive)
        return share

    def knows(self, index: Tensor) -> bool:
        """Whether all of these examples have been scored."""
        index = index.cpu()
        return int(index.max()) < len(self) and bool((self.visits[index] > 0).all())

    def add(self, index: Tensor, scores: Tensor) -> None:
        """Add those scores of a step that are finite."""
        self._grow(int(index.max()) + 1, scores)
        on_cpu, index = index.cpu(), index.to(scores.device)
        finite = scores.isfinite()
        self.visits.index_add_(0, on_cpu, finite.to(on_cpu))
        self._positive.index_add_(0, index, (finite & (scores > 0)).to(scores.dtype))
        self._total.index_add_(0, index, scores.where(finite, 0))
        self.scores[index] = scores.where(finite, self.scores[index])

    def state_dict(self) -> dict[str, Any]:
        """The tables, for a checkpoint."""
        return {
            "visits": self.visits.clone(),
            "positive": self._positive.clone(),
            "last": self.scores.clone(),
            "total": self._total.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.visits = state["visits"].clone()
        self._positive = state["positive"].clone()
        self.scores = state["last"].clone()
        self._total = state["total"].clone()

    def _grow(self, size: int, like: Tensor) -> None:
        more = size - len(self)
        if more > 0:
            self.visits = torch.cat([self.visits, self.visits.new_zeros(more)])
            zeros = like.new_zeros(more)
            self._positive = torch.cat([self._positive.to(like), zeros])
            self._total = torch.cat([self._total.to(like), zeros])
            self.scores = torch.cat([self.scores.to(like), zeros + float("nan")])
        elif self.scores.device != like.device or self.scores.dtype != like.dtype:
            self._positive, self._total, self.scores = (
                x.to(like) for x in (self._positive, self._total, self.scores)
            )


def check_index(index: Any) -> Tensor | None:
    """The index as an int64 tensor of numbers, none of which is negative; None if it is None.

    Raises:
        TypeError, ValueError: it is not.
    """
    if index is None:
        return None
    if not isinstance(index, Tensor):
        try:
            index = torch.as_tensor(index)
        except (TypeError, ValueError):
            raise TypeError(f"index must hold whole numbers, got {index!r:.80}") from None
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise TypeError(f"index must hold whole numbers, got {index.dtype}")
    if index.dim() != 1 or index.numel() == 0:
        raise ValueError(
            "index must have one number for each of the training examples, got shape "
            f"{tuple(index.shape)}"
        )
    if int(index.min()) < 0:
        raise ValueError(f"index must not be negative, got {int(index.min())}")
    found: Tensor = index.to(torch.int64)
    return found
