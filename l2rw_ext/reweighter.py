"""Reweighter: what users hold."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import ops
from .accumulate import accumulate
from .batch import LossFn, batch_size, check_same_kind, in_order_of, unpack
from .engines.base import Engine, NotExactError, Scored, Task
from .engines.double_backward import DoubleBackward
from .engines.layerwise import Layerwise
from .engines.scoring import BelowAutograd
from .members import Members
from .plan import Explanation
from .preserve import Snapshot, preserved
from .result import Step, clean_loss_error

EngineName = Literal["auto", "layerwise", "double_backward"]
Degenerate = Literal["zero", "uniform", "skip"]


class Reweighter:
    """Weighs each training example by how well its gradient agrees with the clean batch's (Eq. 12).

    One call of :meth:`backward` takes the place of ``loss.backward()``: it scores the examples,
    normalises the scores to weights (Eq. 8-9) and accumulates d(Σ w_i f_i)/dθ into ``p.grad``. The
    model is not modified, and any optimiser follows.

    Scaling: Σ w_i = 1, so Σ w_i f_i is comparable to a *mean* loss and learning rates carry over.
    Whether a loss over a sequence sums or averages its positions changes the scores, as it changes
    the gradients. The clean loss is the mean over the clean batch.

    Args:
        model: any ``nn.Module``.
        loss_fn: (outputs, targets) -> unreduced losses, shape (n,).
        engine: ``"auto"`` takes the first engine that is exact for the model: ``"layerwise"``
            (about the price of a plain step), else ``"double_backward"`` with one warning. A forced
            engine that would be wrong is an error.
        clean_loss_fn: losses of the clean batch; default ``loss_fn``.
        on_degenerate: what to do when no score is positive, which is common at high imbalance:
            ``"zero"`` accumulates zeros, ``"uniform"`` falls back to equal weights, ``"skip"``
            leaves ``p.grad`` untouched.
        check_finite: on CUDA, wait for the device and raise at once if the clean loss is not
            finite. Elsewhere the check is free and always made.

    Raises:
        TypeError, ValueError: an argument is not of the kind above.

    Source: Ren, Zeng, Yang, Urtasun, *Learning to Reweight Examples for Robust Deep Learning*,
    ICML 2018, Algorithm 1.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> import l2rw_ext as l2rw
        >>> model = torch.nn.Linear(4, 3)
        >>> loss_fn = lambda out, y: F.cross_entropy(out, y, reduction="none")
        >>> reweighter = l2rw.Reweighter(model, loss_fn)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> step = reweighter.backward((x, y), (x[:2].clone(), y[:2]))
        >>> step.weights.shape, step.engine
        (torch.Size([8]), 'layerwise')
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        engine: EngineName = "auto",
        clean_loss_fn: LossFn | None = None,
        on_degenerate: Degenerate = "zero",
        check_finite: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, fn in (("loss_fn", loss_fn), ("clean_loss_fn", clean_loss_fn)):
            if not callable(fn) and not (name == "clean_loss_fn" and fn is None):
                raise TypeError(f"{name} must be callable, got {type(fn).__name__}")
        _one_of("engine", engine, get_args(EngineName))
        _one_of("on_degenerate", on_degenerate, get_args(Degenerate))
        self.model = model
        self.loss_fn = loss_fn
        self.clean_loss_fn = clean_loss_fn
        self.on_degenerate = on_degenerate
        self.check_finite = check_finite
        self.engine = engine
        self._layerwise = Layerwise()
        self._double_backward = DoubleBackward()
        self._warned: set[str] = set()

    def backward(self, batch: Any, clean: Any) -> Step:
        """Score, weigh, and accumulate d(Σ w_i f_i)/dθ into ``p.grad``, like ``Tensor.backward``.

        Args:
            batch: (inputs, targets) of n training examples. ``inputs`` is a tensor, a tuple
                (``model(*inputs)``) or a dict (``model(**inputs)``).
            clean: (inputs, targets) of m clean examples, of the same structure.

        Returns:
            A :class:`~l2rw_ext.Step`.

        Raises:
            ValueError, TypeError: a batch, or what ``loss_fn`` returns, is not as documented; the
                clean loss is not finite; a training loss is not finite and the engine cannot leave
                its example out.
            NotExactError: a forced engine would give wrong numbers for this model.

        After an error the model, its buffers, its gradients and torch's generators are as before.
        """
        task = self._task(batch, clean)
        with preserved(task.members, always=False) as snapshot:
            engine, scored = self._score(task, snapshot)
            step, weights = self._weigh(engine, scored)
            gradients = None if weights is _SKIP else scored.weighted_gradients(weights)
        if gradients is not None:
            accumulate(gradients)
        return step

    def weights(self, batch: Any, clean: Any) -> Tensor:
        """The weights alone, shape (n,): Eq. 9; gradients, buffers and generators stay untouched.

        Arguments and errors as in :meth:`backward`. With ``on_degenerate="skip"`` the weights of a
        degenerate step are zeros.
        """
        task = self._task(batch, clean)
        with preserved(task.members, always=True) as snapshot:
            engine, scored = self._score(task, snapshot)
            step, _ = self._weigh(engine, scored)
        return step.weights

    def explain(self, batch: Any, clean: Any) -> Explanation:
        """Which engine would run and why; layer by layer the form, its cost and its memory.

        Arguments and errors as in :meth:`backward`; nothing is changed. Print the result, or take
        ``dict(result)``-like data from its ``as_dict()``.
        """
        task = self._task(batch, clean)
        with preserved(task.members, always=True) as snapshot:
            if self.engine == "double_backward":
                return Explanation.double_backward(task, "asked for by engine='double_backward'")
            try:
                return self._layerwise.explain(task, snapshot)
            except NotExactError as error:
                if self.engine == "layerwise":
                    raise
                return Explanation.double_backward(task, str(error))

    def _task(self, batch: Any, clean: Any) -> Task:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("scores need gradients: leave torch.inference_mode for this call")
        if not torch.is_grad_enabled():
            raise RuntimeError("scores need gradients: leave torch.no_grad for this call")
        inputs, targets = unpack(batch, "training batch")
        clean_inputs, clean_targets = unpack(clean, "clean batch")
        clean_inputs = in_order_of(inputs, clean_inputs)
        check_same_kind(inputs, clean_inputs)
        members = Members.of(self.model)
        parameters = [p for _, p in members.parameters if p.requires_grad]
        if not parameters:
            raise ValueError("model has no parameter that requires grad: there is nothing to score")
        for p in parameters:
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(
                    "model has uninitialised lazy parameters; run one forward before the first step"
                )
        return Task(
            self.model,
            members,
            self.loss_fn,
            self.clean_loss_fn or self.loss_fn,
            inputs,
            targets,
            clean_inputs,
            clean_targets,
            batch_size(inputs, targets, "training batch"),
            batch_size(clean_inputs, clean_targets, "clean batch"),
            parameters,
        )

    def _score(self, task: Task, snapshot: Snapshot) -> tuple[Engine, Scored]:
        if self.engine == "double_backward":
            return self._double_backward, self._double_backward.score(task, snapshot)
        if self.engine == "layerwise":
            return self._layerwise, self._layerwise.score(task, snapshot)
        try:
            return self._layerwise, self._layerwise.score(task, snapshot)
        except NotExactError as error:
            reason = str(error)
        snapshot.restore()
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"l2rw_ext: {reason}. Using the double_backward engine, which is exact and about "
                "three times slower",
                stacklevel=3,
            )
        return self._double_backward, self._double_backward.score(task, snapshot)

    def _weigh(self, engine: Engine, scored: Scored) -> tuple[Step, Tensor | None]:
        """The step's result, and the weights for the gradient: None for zeros, or ``_SKIP``."""
        clean_loss, losses, scores = scored.clean_loss, scored.losses, scored.scores
        deferred = clean_loss.device.type != "cpu" and not self.check_finite
        if not deferred and not math.isfinite(clean_loss.item()):
            raise clean_loss_error(clean_loss)
        with BelowAutograd():
            if not deferred and math.isfinite((losses.sum() + scores.sum()).item()):
                excluded = None
                weights = ops.normalize_weights(scores)
            else:
                excluded = ~(losses.isfinite() & scores.isfinite())
                if not deferred and bool((excluded & losses.isfinite()).all()):
                    raise ValueError(
                        "no score is finite, although the losses are: the gradient of the clean "
                        "loss overflowed. No gradient was accumulated"
                    )
                weights = ops.normalize_weights(scores.masked_fill(excluded, 0))
            if deferred:
                weights = weights.where(clean_loss.isfinite(), torch.zeros_like(weights))
            for_gradient: Tensor | None = weights
            waits = self.on_degenerate != "zero" or weights.device.type == "cpu"
            if waits and not weights.any():
                for_gradient = None
                if self.on_degenerate == "skip":
                    for_gradient = _SKIP
                elif self.on_degenerate == "uniform":
                    kept = torch.ones_like(weights) if excluded is None else (~excluded)
                    if kept.any():
                        weights = kept.to(weights.dtype) / kept.sum()
                        for_gradient = weights
        step = Step(weights, scored.scores, scored.losses, engine.name, clean_loss, excluded)
        return step, for_gradient


_SKIP = torch.empty(0)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")
