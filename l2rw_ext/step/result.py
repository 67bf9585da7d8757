"""The result of one reweighted step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Weights and statistics of one step; all tensors are detached and on the model's device.

    Attributes:
        weights: w of Eq. 9, shape (n,), float32 (float64 for float64 losses); sums to one or is all
            zero.
        scores: u of Eq. 7 with α = η = 1, shape (n,); not finite for an excluded example.
        losses: unreduced training losses, shape (n,).
        engine: name of the engine that computed them.

    The properties below read values; on CUDA each waits for the device.
    """

    weights: Tensor
    scores: Tensor
    losses: Tensor
    engine: str
    _clean_loss: Tensor = field(repr=False)
    _excluded: Tensor | None = field(repr=False)
    _contaminated: Tensor | None = field(default=None, repr=False)

    def _check(self) -> None:
        if not self._clean_loss.isfinite():
            raise clean_loss_error(self._clean_loss)
        if self._contaminated is not None and self._contaminated:
            raise ValueError(
                "training batch: losses or gradients of some examples are not finite; the engine "
                f"{self.engine!r} mixes examples in one backward and cannot leave them out. No "
                "gradient was accumulated"
            )

    @property
    def clean_loss(self) -> Tensor:
        """Mean clean loss, shape ().

        Raises:
            ValueError: it is not finite (on CUDA, where the step could not wait to know).
        """
        self._check()
        return self._clean_loss

    @property
    def loss(self) -> Tensor:
        """Σ w_i f_i, shape (); comparable to a mean loss."""
        self._check()
        kept = self.weights != 0
        return (self.losses[kept].to(self.weights.dtype) * self.weights[kept]).sum()

    @property
    def degenerate(self) -> bool:
        """Whether no score was positive, so that Eq. 9 gives zeros."""
        self._check()
        positive = self.scores > 0
        return not bool((positive if self._excluded is None else positive & ~self._excluded).any())

    @property
    def nonfinite(self) -> int:
        """How many training examples were left out because their loss or score is not finite."""
        self._check()
        return 0 if self._excluded is None else int(self._excluded.sum())

    @property
    def effective_sample_size(self) -> float:
        """(Σ w_i)² / Σ w_i²; n for equal weights, 1 if one example counts, 0 if none does."""
        self._check()
        w = self.weights.double()
        total = float(w.sum())
        return total * total / float((w * w).sum()) if total > 0 else 0.0


def clean_loss_error(value: Tensor) -> ValueError:
    """The error for a clean loss that is not finite."""
    return ValueError(
        f"clean batch: the mean loss is {float(value)}; weights from it would be meaningless. "
        "No gradient was accumulated"
    )
