"""The numbers that every method must reproduce, in float64 from ``l2rw_ext.reference``."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from l2rw_ext import reference
from l2rw_ext.reference import relative_error

from .cases import Batch, Case


@dataclass(frozen=True)
class Oracle:
    """Scores and weights, shape (n,), and gradients by parameter name, in float64.

    ``gradient`` is the weighted one, ``union_gradient`` that of a plain step on both batches, and
    ``training_gradient`` that of one on the training batch alone.
    """

    scores: Tensor
    weights: Tensor
    gradient: dict[str, Tensor | None]
    union_gradient: dict[str, Tensor | None]
    training_gradient: dict[str, Tensor | None]

    @property
    def rho(self) -> float:
        """The share of examples with a positive weight."""
        return float((self.weights > 0).double().mean())


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def oracle(case: Case) -> Oracle:
    """Scores by a loop of single gradients, weights, and weighted gradient, of a float64 copy.

    An uncoupled model runs on one example at a time. In a coupled one a single gradient needs the
    whole batch, n times; there Algorithm 1 itself, in float64, is the oracle.
    """
    model = copy.deepcopy(case.model).cpu().double()
    x, y = (t.cpu() for t in case.train)
    x_clean, y_clean = (t.cpu() for t in case.clean)
    batch, clean = (_double(x), y), (_double(x_clean), y_clean)
    with sdpa_kernel(SDPBackend.MATH):
        if case.spec.coupled:
            scores = reference.meta_scores(copy.deepcopy(model), case.loss, batch, clean)
        else:
            scores = _single_gradient_scores(case, model, batch, clean)
        weights = reference.weights_from_scores(scores)
        gradient = reference.weighted_gradient(model, case.loss, batch, weights)
        union, training = (
            _mean_gradient(case, model, plain_batch) for plain_batch in (case.union, case.train)
        )
    return Oracle(scores, weights, gradient, union, training)


def _mean_gradient(case: Case, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor | None]:
    """The gradient of the mean loss of a batch."""
    x, y = (t.cpu() for t in batch)
    equal = torch.full(y.shape[:1], 1 / y.size(0), dtype=torch.float64)
    return reference.weighted_gradient(model, case.loss, (_double(x), y), equal)


def _single_gradient_scores(
    case: Case, model: torch.nn.Module, batch: tuple[Tensor, Tensor], clean: tuple[Tensor, Tensor]
) -> Tensor:
    direction = reference.clean_direction(model, case.loss, clean)
    parameters = list(reference.trainable(model).values())
    inputs, targets = batch
    scores = []
    for i in range(targets.size(0)):
        (loss,) = case.loss(model(inputs[i : i + 1]), targets[i : i + 1])
        gradients = torch.autograd.grad(loss, parameters)
        terms = [(g * v).sum() for g, v in zip(gradients, direction.values(), strict=True)]
        scores.append(torch.stack(terms).sum())
    return torch.stack(scores)


def gradient_error(model: torch.nn.Module, gradient: dict[str, Tensor | None]) -> float:
    """The relative error of all ``p.grad`` of a model, as one vector."""
    ours, theirs = [], []
    for name, p in model.named_parameters():
        expected = gradient.get(name)
        wanted = torch.zeros(p.shape, dtype=torch.float64) if expected is None else expected
        got = torch.zeros_like(wanted) if p.grad is None else p.grad.detach().cpu().double()
        ours.append(got.flatten())
        theirs.append(wanted.flatten())
    return relative_error(torch.cat(ours), torch.cat(theirs))
