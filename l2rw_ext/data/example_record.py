"""What a run has learnt about each training example, by its index in the training set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2rw_ext.ops.arithmetic import accumulation_dtype

from .label_issues import LabelIssues, find_issues


class ExampleRecord:
    """Scores of examples over the steps that named the examples by ``index``.

    The tables grow with the largest index seen; index runs from 0 to ``len(record) - 1``. Examples
    with wrong labels collect low scores: :meth:`issues` lists them.

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
        self.scores = torch.zeros(0)
        """The last score u of each example; NaN where it was never scored."""
        self._visits = torch.zeros(0, dtype=torch.int64)
        self._positive = torch.zeros(0)
        self._negative = torch.zeros(0)
        self._total = torch.zeros(0)
        self._counted: Tensor | None = None

    def __repr__(self) -> str:
        scored = int((self.visits > 0).sum())
        visits = int(self.visits.sum())
        return f"ExampleRecord({scored} of {len(self)} examples scored, visits={visits})"

    def __len__(self) -> int:
        return self.scores.numel()

    @property
    def visits(self) -> Tensor:
        """How often each example was scored, int64, on the CPU."""
        if self._counted is None:
            self._counted = self._visits.cpu()
        return self._counted

    @property
    def mean_scores(self) -> Tensor:
        """The mean score of each example; NaN where it was never scored."""
        return self._mean(self._total)

    @property
    def kept_share(self) -> Tensor:
        """The share of its visits in which an example had a positive score; NaN without visits."""
        return self._mean(self._positive)

    def issues(self, labels: Any, outputs: Any = None) -> LabelIssues:
        """Which examples are probably mislabelled, one row an example.

        The label score of an example is the share of its visits in which its score u was positive;
        a visit with the score zero counts half. An example is an issue if its label score is below
        a half: more often than not, a step on it would have raised the clean loss. The more visits,
        the finer the label score: after one epoch it is 0 or 1, and ``mean_scores`` ranks further.

        Args:
            labels: the labels that were trained on, integers or strings, a tensor, an array or a
                list of shape (N,); row i belongs to the example of index i.
            outputs: predicted labels of shape (N,), or logits or probabilities of shape
                (N, classes), for the column ``predicted_label``.

        Returns:
            A NumPy record array of N rows, of which ``pandas.DataFrame(issues)`` makes a table and
            ``issues.to_csv(path)`` a file. Its columns are ``index``; ``is_label_issue``, bool;
            ``label_score``, float64 in [0, 1], NaN for an example that was never scored, which is
            no issue; ``given_label``; and ``predicted_label`` if there are outputs.

        Raises:
            TypeError: labels are neither integers nor strings.
            ValueError: no step had an ``index``; there are fewer labels than examples in the
                record; or shapes do not agree.

        Example:
            >>> import torch
            >>> from torch.nn import functional as F
            >>> import l2rw_ext as l2rw
            >>> x = torch.tensor([[-3.0], [-2.0], [-1.0], [1.0], [2.0], [3.0]])
            >>> y = torch.tensor([0, 0, 1, 1, 1, 1])
            >>> clean = torch.tensor([[-4.0], [4.0]]), torch.tensor([0, 1])
            >>> reweighter = l2rw.Reweighter(
            ...     torch.nn.Linear(1, 2), lambda out, y: F.cross_entropy(out, y, reduction="none")
            ... )
            >>> _ = reweighter.backward((x, y), clean, index=range(6))
            >>> issues = reweighter.record.issues(y)
            >>> issues.index[issues.is_label_issue].tolist()
            [2]
        """
        if not self.visits.any():
            raise ValueError(
                "the record holds no scores: give backward() each example's number as index="
            )
        balance = (self._positive - self._negative).double()
        return find_issues(0.5 + self._mean(balance) / 2, labels, outputs)

    def knows(self, index: Tensor) -> bool:
        """Whether all of these examples have been scored."""
        index = index.cpu()
        return int(index.max()) < len(self) and bool((self.visits[index] > 0).all())

    def add(self, index: Tensor, scores: Tensor) -> None:
        """Add those scores of a step that are finite.

        Nothing waits for the device of the scores, if ``index`` is on the CPU.
        """
        scores = scores.to(accumulation_dtype(scores.dtype))
        self._grow(int(index.max()) + 1, scores)
        # To the CPU a copy is waited for: what follows there reads it at once.
        index = index.to(scores.device, non_blocking=scores.device.type != "cpu")
        finite = scores.isfinite()
        known = scores.where(finite, 0)
        self._visits.index_add_(0, index, finite.to(self._visits))
        self._positive.index_add_(0, index, (known > 0).to(known))
        self._negative.index_add_(0, index, (known < 0).to(known))
        self._total.index_add_(0, index, known)
        self.scores[index] = scores.where(finite, self.scores[index])
        self._counted = None

    def state_dict(self) -> dict[str, Any]:
        """The tables, for a checkpoint."""
        return {
            "visits": self.visits.clone(),
            "positive": self._positive.clone(),
            "negative": self._negative.clone(),
            "last": self.scores.clone(),
            "total": self._total.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._visits = state["visits"].to(state["last"].device, copy=True)
        self._positive = state["positive"].clone()
        self.scores = state["last"].clone()
        self._total = state["total"].clone()
        # States of before there was this table say only which scores were not positive.
        self._negative = state.get("negative", self._visits - self._positive).clone()
        self._counted = None

    def _mean(self, total: Tensor) -> Tensor:
        mean: Tensor = total / self._visits.to(total)
        return mean

    def _grow(self, size: int, like: Tensor) -> None:
        """Make room for ``size`` examples, on the device and in the dtype of the scores."""
        more = max(size - len(self), 0)
        if more == 0 and self.scores.device == like.device and self.scores.dtype == like.dtype:
            return
        zeros = like.new_zeros(more)
        visits = self._visits.to(like.device)
        self._visits = torch.cat([visits, visits.new_zeros(more)])
        self._positive, self._negative, self._total = (
            torch.cat([x.to(like), zeros]) for x in (self._positive, self._negative, self._total)
        )
        self.scores = torch.cat([self.scores.to(like), zeros + float("nan")])


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
