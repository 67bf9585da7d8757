"""From scores to weights, also in steps that give no usable ones, and the result of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from l2rw_ext import devices
from l2rw_ext.engines.plan import Plan
from l2rw_ext.task.isolation import BelowAutograd
from l2rw_ext.task.task import check_clean_loss
from l2rw_ext.weighing import Weighing, checked, name_of, own_function, rectified

from .gradients import Gradients

Degenerate = Literal["zero", "uniform", "skip"]


@dataclass(frozen=True)
class Rules:
    """How scores become weights; the arguments are those of :class:`~l2rw_ext.Reweighter`."""

    weighing: Weighing = rectified
    on_degenerate: Degenerate = "zero"
    check_finite: bool = False

    def waits(self, clean_loss: Tensor) -> bool:
        """Whether a step decides by its values before it accumulates gradients.

        A step that is traced does so when its graph has run.
        """
        at_once = self.check_finite or self.on_degenerate != "zero"
        return devices.synchronous(clean_loss) or at_once


@dataclass(frozen=True, repr=False)
class Step:
    """Weights and statistics of one step; all tensors are detached and on the model's device.

    Printed, it is one line of its statistics.

    Attributes:
        weights: w of Eq. 9, shape (n,), float32 (float64 for float64 losses); sums to one or is all
            zero. With another ``weighing``, what that returned.
        scores: u of Eq. 7 with α = η = 1, shape (n,), or cosines with ``normalize``; not finite for
            an excluded example.
        losses: unreduced training losses, shape (n,).
        engine: name of the engine that computed them.
        mask: with ``per="position"``, which positions count, if the loss function said so: shape
            (n, ...), as then all of these are. Scores and losses of the others are zero.

    The properties below read values; on CUDA each waits for the device. In a step over several
    processes the attributes are those of this rank's examples, and the properties those of the
    examples of all ranks.
    """

    weights: Tensor
    scores: Tensor
    losses: Tensor
    engine: str
    _clean_loss: Tensor
    _excluded: Tensor | None
    _contaminated: Tensor | None = None
    _invalid: Tensor | None = None
    """Whether the weights of a user's weighing are no weights, shape (); None if there is none."""
    mask: Tensor | None = None
    _empty: Tensor | None = None
    """Whether the weighing gave no example a weight, shape (); None if the weights say it."""
    _weighing: Weighing = rectified
    _union: Step | None = None
    """The step on the examples of all ranks, if there are others."""

    def __repr__(self) -> str:
        whole = self._union or self
        n = whole.weights.numel()
        parts = [f"n={n}", f"engine={self.engine!r}"]
        try:
            parts += [
                f"loss={float(self.loss):.4g}",
                f"clean_loss={float(self.clean_loss):.4g}",
                f"weighted={int((whole.weights != 0).sum())}",
                f"effective_sample_size={self.effective_sample_size:.4g}",
            ]
            if self.nonfinite:
                parts.append(f"nonfinite={self.nonfinite}")
        except ValueError as error:
            parts.append(f"error={str(error)!r}")
        return f"Step({', '.join(parts)})"

    def _checked(self) -> Step:
        """The step on all examples, if its numbers mean something."""
        whole = self._union or self
        check_clean_loss(whole._clean_loss)
        if whole._contaminated is not None and whole._contaminated:
            raise ValueError(
                "training batch: losses or gradients of some examples are not finite; the engine "
                f"{whole.engine!r} mixes examples in one backward and cannot leave them out. No "
                "gradient was accumulated"
            )
        if whole._invalid is not None and whole._invalid:
            raise no_weights(whole._weighing)
        return whole

    @property
    def weighed(self) -> Tensor:
        """The scores as a weighing gets them: minus infinity for what is left out, shape (n,)."""
        found = self.scores
        if self._excluded is not None:
            found = found.masked_fill(self._excluded, -math.inf)
        if self.mask is not None:
            found = found.masked_fill(~self.mask, -math.inf)
        return found.flatten()

    @property
    def clean_loss(self) -> Tensor:
        """Mean clean loss, shape ().

        Raises:
            ValueError: it is not finite (on CUDA, where the step could not wait to know).
        """
        return self._checked()._clean_loss

    @property
    def loss(self) -> Tensor:
        """Σ w_i f_i, shape (); comparable to a mean loss."""
        whole = self._checked()
        kept = whole.weights != 0
        return (whole.losses[kept].to(whole.weights.dtype) * whole.weights[kept]).sum()

    @property
    def degenerate(self) -> bool:
        """Whether the weights are all zero, as those of Eq. 9 if no score is positive.

        With ``on_degenerate="uniform"``, whether they would be.
        """
        whole = self._checked()
        return not whole.weights.any() if whole._empty is None else bool(whole._empty)

    @property
    def nonfinite(self) -> int:
        """How many training examples were left out because their loss or score is not finite."""
        excluded = self._checked()._excluded
        return 0 if excluded is None else int(excluded.sum())

    @property
    def effective_sample_size(self) -> float:
        """(Σ w_i)² / Σ w_i²; n for equal weights, 1 if one example counts, 0 if none does."""
        return effective_sample_size(self._checked().weights)


def effective_sample_size(weights: Tensor) -> float:
    """(Σ w_i)² / Σ w_i²; reads the weights."""
    w = weights.double()
    total = float(w.sum())
    return total * total / float((w * w).sum()) if total > 0 else 0.0


@dataclass
class Computed:
    """What one step has computed and not yet delivered to ``p.grad``."""

    step: Step
    for_gradient: Tensor | None
    """Weights of the gradient, shape (n,); None where all are zero."""
    uniform: bool = False
    """Whether no score was positive and equal weights are used instead."""
    skip: bool = False
    """Whether no score was positive and no gradient is to be accumulated."""
    overflow: Tensor | None = None
    """Whether gradients overflowed under a loss scale, shape (); None if that was not checked."""
    gradients: Gradients = field(default_factory=list)
    """d(Σ w_i f_i)/dp of each parameter p that the training losses reach."""
    factor: Tensor | None = None
    """By what the gradients are still to be multiplied, shape (); None for one."""
    index: Tensor | None = None
    """The numbers in the training set of all examples that were scored, of all ranks."""
    plan: Plan | None = None
    """The plan that the engine has followed, if it is of a kind that makes plans."""


def weigh(
    scores: Tensor,
    losses: Tensor,
    clean_loss: Tensor,
    engine: str,
    rules: Rules,
    *,
    mask: Tensor | None = None,
    mixes: bool,
    scaled: bool,
    partial: bool = False,
) -> Computed:
    """The weights of scores; the gradients are still to be formed.

    On CUDA nothing here waits for the device, unless ``check_finite`` or an ``on_degenerate`` other
    than "zero" needs a decision. A step that is traced decides nothing: see :func:`settle`.

    Args:
        scores: u, shape (n,), or (n, ...) if there is one for each position.
        losses: the training losses, of the same shape.
        clean_loss: the mean clean loss, shape ().
        engine: name of the engine that computed them.
        rules: how scores become weights.
        mask: which positions count, of the same shape; None for all.
        mixes: whether the engine cannot leave out an example.
        scaled: whether there is a loss scale.
        partial: whether other ranks have scores too, so that these alone are never degenerate.

    Raises:
        ValueError, TypeError: see :func:`_all_finite`; or a user's weighing returned no weights.
    """
    decides = rules.waits(clean_loss) and not devices.tracing()
    finite = decides and _all_finite(
        clean_loss, losses, scores, engine, mixes=mixes, scaled=scaled, partial=partial
    )
    excluded = overflow = contaminated = invalid = None
    with BelowAutograd():
        if not finite:
            excluded = ~(losses.isfinite() & scores.isfinite())
            if scaled:
                overflow = (excluded & losses.isfinite()).any()
            if mixes and not decides:
                found = _contaminating(losses, scores, scaled=scaled)
                contaminated = torch.stack(list(found.values())).any()
                excluded = excluded | contaminated
    weighing = rules.weighing
    step = Step(scores, scores, losses, engine, clean_loss, excluded, contaminated, mask=mask)
    weighed = step.weighed
    weights = _weights(weighing, weighed)
    with BelowAutograd():
        if own_function(weighing) is not None:
            weights = weights.masked_fill(weighed == -math.inf, 0)
            valid = (weights.isfinite() & (weights >= 0)).all()
            if decides and not valid:
                raise no_weights(weighing)
            if not decides:
                invalid = ~valid
                weights = weights.masked_fill(invalid, 0)
        if not decides:
            weights = weights.where(clean_loss.isfinite(), torch.zeros_like(weights))
        empty = ~weights.any()
        for_gradient: Tensor | None = weights
        uniform = skip = False
        if partial or devices.tracing():
            if rules.on_degenerate == "uniform":
                for_gradient = weights = torch.where(empty, equal(weighed), weights)
        elif decides and empty:
            for_gradient = None
            skip = rules.on_degenerate == "skip" and not (overflow is not None and bool(overflow))
            if rules.on_degenerate == "uniform":
                same = equal(weighed)
                uniform = bool(same.any())
                if uniform:
                    weights = for_gradient = same
        weights = weights.view(scores.shape)
        if for_gradient is not None:
            for_gradient = for_gradient.view(scores.shape)
    step = replace(step, weights=weights, _invalid=invalid, _empty=empty, _weighing=weighing)
    return Computed(step, for_gradient, uniform, skip, overflow)


def _weights(weighing: Weighing, scores: Tensor) -> Tensor:
    """What a weighing makes of the scores that it gets, shape (n,)."""
    if own_function(weighing) is None:
        with BelowAutograd():
            return weighing(scores)
    with torch.no_grad():
        return checked(weighing(scores.clone()), scores)


def no_weights(weighing: Weighing) -> ValueError:
    """The error of a user's function whose numbers cannot be weights."""
    return ValueError(
        f"weighing {name_of(weighing)} returned weights that are negative or not finite. No "
        "gradient was accumulated"
    )


def settle(computed: Computed, rules: Rules) -> None:
    """Decide by the values of a step whose graph has run what :func:`weigh` decides at once.

    Raises:
        ValueError: see :func:`weigh`.
    """
    step, overflow = computed.step, computed.overflow
    if not rules.waits(step._clean_loss):
        return
    mixes, scaled = step._contaminated is not None, overflow is not None
    _all_finite(
        step._clean_loss,
        step.losses,
        step.scores,
        step.engine,
        mixes=mixes,
        scaled=scaled,
        partial=False,
    )
    if rules.on_degenerate != "zero" and step.degenerate:
        computed.uniform = rules.on_degenerate == "uniform" and bool(step.weights.any())
        computed.skip = rules.on_degenerate == "skip" and not (scaled and bool(overflow))
    step._checked()


def kept(weighed: Tensor) -> Tensor:
    """One for each example that is not left out, shape (n,)."""
    return (weighed > -math.inf).to(weighed.dtype)


def equal(weighed: Tensor) -> Tensor:
    """Equal weights of all examples that are not left out, shape (n,); zeros if all are."""
    same = kept(weighed)
    return same / same.sum().clamp(min=1)


def _all_finite(
    clean_loss: Tensor,
    losses: Tensor,
    scores: Tensor,
    engine: str,
    *,
    mixes: bool,
    scaled: bool,
    partial: bool,
) -> bool:
    """Whether all losses and scores are finite; reads values.

    Args:
        clean_loss: the mean clean loss, shape ().
        losses: the training losses, shape (n,).
        scores: u, shape (n,).
        engine: its name.
        mixes: whether the engine cannot leave out an example.
        scaled: whether there is a loss scale.
        partial: whether other ranks have scores too, which may be finite where none of these is.

    Raises:
        ValueError: the clean loss is not finite, or no score is although the losses are; or some
            training example is not finite and the engine cannot leave it out.
    """
    check_clean_loss(clean_loss)
    if math.isfinite((losses.sum() + scores.sum()).item()):
        return True
    for what, bad in _contaminating(losses, scores, scaled=scaled).items() if mixes else ():
        if bad.any():
            raise ValueError(
                f"training batch: {what} of examples {bad.nonzero().squeeze(-1).tolist()[:8]} "
                f"are not finite; the engine {engine!r} mixes examples in one backward and "
                "cannot leave them out"
            )
    if not scaled and not partial and bool((losses.isfinite() & ~scores.isfinite()).all()):
        raise ValueError(
            "no score is finite, although the losses are: the gradient of the clean "
            "loss overflowed. No gradient was accumulated"
        )
    return False


def _contaminating(losses: Tensor, scores: Tensor, *, scaled: bool) -> dict[str, Tensor]:
    """Which examples contaminate a backward over all of them, shape (n,), by what is not finite.

    If no score is finite, the clean loss is the reason. Under a loss scale an overflow is left to
    the gradient scaler.
    """
    found = {"losses": ~losses.isfinite()}
    if not scaled:
        finite = scores.isfinite()
        found["gradients"] = ~finite & finite.any()
    return found
