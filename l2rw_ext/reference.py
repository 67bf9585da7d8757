"""The paper, equation by equation, in plain PyTorch: the oracle of the tests.

Nothing here is fast. There are two independent ways to the scores u. :func:`meta_scores`
differentiates through the look-ahead step (Eq. 4-7, Algorithm 1). :func:`single_gradient_scores`
forms the inner products <∇f_i, v> of Eq. 12 one example at a time, which needs only first
derivatives. The engine ``double_backward`` shares :func:`look_ahead` with the first; the second
shares nothing with any engine.

Scaling: f_i is the unreduced loss of training example i, and v is the gradient of the *mean* clean
loss. Scores are u = -∂/∂ε (1/m) Σ_j f'_j with α = η = 1; both cancel in Eq. 9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .data.batch import Batch, LossFn, forward, forward_with
from .task.state import State
from .tracing.members import Members


def trainable(
    model: nn.Module, loss_fn: Any = None, clean_loss_fn: Any = None
) -> dict[str, nn.Parameter]:
    """The parameters that require grad, by name; a tied parameter is listed once.

    Those of a loss that is a module have names that begin with ``loss_fn.`` or ``clean_loss_fn.``.
    """
    members = Members.of(model, loss_fn, clean_loss_fn)
    return {name: p for name, p in members.parameters if p.requires_grad}


def sgd_step(parameters: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> list[Tensor]:
    """Eq. 3 (and Eq. 5): θ - α ∇, out of place and differentiable."""
    return [p - lr * g for p, g in zip(parameters, gradients, strict=True)]


def perturbed_loss(losses: Tensor, epsilon: Tensor) -> Tensor:
    """Eq. 4, summed as in Eq. 5: Σ_i ε_i f_i for losses and ε of shape (n,)."""
    return (epsilon * losses).sum()


def look_ahead(
    parameters: Sequence[Tensor], losses: Tensor, epsilon: Tensor, lr: float = 1.0
) -> list[Tensor]:
    """Eq. 5: θ̂(ε) = θ - α ∇_θ Σ_i ε_i f_i(θ) of each parameter, differentiable in ε."""
    gradients = torch.autograd.grad(
        perturbed_loss(losses, epsilon), parameters, create_graph=True, allow_unused=True
    )
    pairs = zip(parameters, gradients, strict=True)
    return sgd_step(parameters, [torch.zeros_like(p) if g is None else g for p, g in pairs], lr)


class _Objective(nn.Module):
    """The mean clean loss as one module, of which a loss that is a module is a part."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, inputs: Any, targets: Any) -> Tensor:
        return self.loss_fn(forward(self.model, inputs), targets).mean()


def clean_objective(
    model: nn.Module, loss_fn: LossFn, clean: Batch, values: Mapping[int, Tensor]
) -> Tensor:
    """Eq. 6's objective: the mean clean loss (1/m) Σ_j f'_j at other values of parameters, by id.

    The loss may read parameters as attributes of modules, but not by a reference taken before.
    """
    objective: Tensor = forward_with(_Objective(model, loss_fn), values, clean)
    return objective


def meta_scores(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    clean: Batch,
    *,
    clean_loss_fn: LossFn | None = None,
) -> Tensor:
    """Eq. 7 with α = η = 1: u_i = -∂/∂ε_i of the clean objective at ε = 0, by double backward.

    Args:
        model: any twice differentiable module; its state ends as after one training forward.
        loss_fn: (outputs, targets) -> unreduced losses of shape (n,).
        batch: (inputs, targets) of n training examples.
        clean: (inputs, targets) of m clean examples.
        clean_loss_fn: losses of the clean batch; default ``loss_fn``.

    Returns:
        u, shape (n,), in the dtype of the losses.
    """
    parameters = list(trainable(model, loss_fn, clean_loss_fn).values())
    members = Members.of(model, loss_fn, clean_loss_fn)
    before = State(members, whole=True)
    inputs, targets = batch
    losses = loss_fn(forward(model, inputs), targets)
    after_training = State(members, whole=True)
    epsilon = torch.zeros_like(losses, requires_grad=True)
    stepped = look_ahead(parameters, losses, epsilon)
    before.restore()
    # If the training forward wrote to a parameter, the clean one starts from its old value too.
    values = {id(p): q + (p - q).detach() for p, q in zip(parameters, stepped, strict=True)}
    objective = clean_objective(model, clean_loss_fn or loss_fn, clean, values)
    (gradient,) = torch.autograd.grad(objective, epsilon)
    after_training.restore()
    return -gradient


def clean_direction(
    model: nn.Module, loss_fn: LossFn, clean: Batch, *, clean_loss_fn: LossFn | None = None
) -> dict[str, Tensor]:
    """The direction v = d/dθ (1/m) Σ_j f'_j(θ), by name; zero where no gradient arrives."""
    inputs, targets = clean
    named = trainable(model, loss_fn, clean_loss_fn)
    objective = (clean_loss_fn or loss_fn)(forward(model, inputs), targets).mean()
    gradients = torch.autograd.grad(objective, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), gradients, strict=True)
    }


def single_gradient_scores(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    clean: Batch,
    *,
    clean_loss_fn: LossFn | None = None,
) -> Tensor:
    """Eq. 12 without its layers: u_i = <∇f_i, v>, one backward for each training example.

    The training forward is one forward of the whole batch, so that a model that couples examples
    (BatchNorm in train mode) is scored with the semantics of Algorithm 1. Arguments and result as
    in :func:`meta_scores`.
    """
    before = State(Members.of(model, loss_fn, clean_loss_fn), whole=True)
    direction = clean_direction(model, loss_fn, clean, clean_loss_fn=clean_loss_fn)
    before.restore()
    return scores_along(direction, model, loss_fn, batch, clean_loss_fn=clean_loss_fn)


def scores_along(
    direction: Mapping[str, Tensor],
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    *,
    clean_loss_fn: LossFn | None = None,
) -> Tensor:
    """u_i = <∇f_i, v>, shape (n,), along a direction v that has an entry for each name."""
    inputs, targets = batch
    losses = loss_fn(forward(model, inputs), targets)
    named = trainable(model, loss_fn, clean_loss_fn)
    scores = []
    for i in range(losses.numel()):
        gradients = torch.autograd.grad(
            losses[i], list(named.values()), retain_graph=True, allow_unused=True
        )
        terms = [
            (g * direction[name]).sum()
            for name, g in zip(named, gradients, strict=True)
            if g is not None
        ]
        scores.append(torch.stack(terms).sum())
    return torch.stack(scores).detach()


def mlp_scores(
    layer_inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    clean_layer_inputs: Sequence[Tensor],
    clean_gradients: Sequence[Tensor],
    *,
    bias: bool = True,
) -> Tensor:
    """Eq. 12 as printed: u_i = Σ_l Σ_j (z̃'_jl·z̃_il + 1)(g'_jl·g_il); the 1 is the bias.

    Args:
        layer_inputs: z̃ of each layer, shape (n, d_in).
        gradients: g of each layer, of the summed training losses, shape (n, d_out).
        clean_layer_inputs: z̃' of each layer, shape (m, d_in).
        clean_gradients: g' of each layer, of the mean clean loss, shape (m, d_out).
        bias: whether the layers have one.
    """
    total: Tensor | None = None
    for z, g, zc, gc in zip(
        layer_inputs, gradients, clean_layer_inputs, clean_gradients, strict=True
    ):
        term = ((z @ zc.T + (1 if bias else 0)) * (g @ gc.T)).sum(1)
        total = term if total is None else total + term
    if total is None:
        raise ValueError("mlp_scores: no layers given")
    return total


def rectify(scores: Tensor) -> Tensor:
    """Eq. 8: w̃ = max(u, 0)."""
    return scores.clamp(min=0)


def normalize(rectified: Tensor) -> Tensor:
    """Eq. 9: w = w̃ / (Σ w̃ + δ(Σ w̃)), δ(0) = 1: the weights sum to one or are all zero."""
    total = rectified.sum()
    return rectified / (total + (total == 0).to(total.dtype))


def weights_from_scores(scores: Tensor) -> Tensor:
    """Eq. 8 and 9."""
    return normalize(rectify(scores))


def random_weights(n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Eq. 16: rectified Gaussian weights that sum to one (the RANDOM baseline), shape (n,)."""
    return normalize(rectify(torch.randn(n, generator=generator)))


def weighted_gradient(
    model: nn.Module, loss_fn: LossFn, batch: Batch, weights: Tensor
) -> dict[str, Tensor | None]:
    """d/dθ Σ_i w_i f_i by name, without the examples with w_i = 0; None if nothing reaches."""
    inputs, targets = batch
    losses = loss_fn(forward(model, inputs), targets)
    named = trainable(model, loss_fn)
    kept = weights != 0
    gradients = torch.autograd.grad(
        (losses[kept] * weights[kept].to(losses.dtype)).sum(),
        list(named.values()),
        allow_unused=True,
    )
    return dict(zip(named, gradients, strict=True))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖ / ‖exact‖ in the L2 norm, in float64; 0 for two zeros, infinite for one.

    The two tensors have one shape; they may be on different devices.
    """
    if found.shape != exact.shape:
        raise ValueError(f"relative_error: shapes {tuple(found.shape)} and {tuple(exact.shape)}")
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    error, norm = float((found - exact).norm()), float(exact.norm())
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return error / norm
