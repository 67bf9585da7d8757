"""The algorithm that Lemma 1 and Theorem 2 speak of, on problems whose constants are known.

Both are about weights as they are before Eq. 9 makes them sum to one: with
a_i = max(<∇f_i, ∇G>, 0) and G the clean loss, over all clean examples at each step,

    θ ← θ - α/n Σ_i a_i ∇f_i.

The paper does not write this step down; with any larger factor than 1/n less would hold. For an
L-smooth G and training gradients of at most σ, Cauchy-Schwarz in the last line gives

    G(θ_{t+1}) ≤ G(θ_t) - α/n Σ a_i² + L/2 |α/n Σ a_i ∇f_i|²
               ≤ G(θ_t) - α/n (1 - L α σ²/2) Σ a_i²,

so that G never rises for α ≤ 2/(L σ²). The paper's condition, α ≤ 2n/(L σ²), is n times as wide. It
would follow if |Σ a_i ∇f_i|² were at most Σ |a_i ∇f_i|², which holds where the gradients in a batch
are orthogonal, and fails where they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2rw_ext import Reweighter

LossFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Training and clean examples, a linear model's losses, and their constants.

    Attributes:
        train: inputs (N, d) and targets (N,), float64; the clean examples are among them.
        clean: inputs (M, d) and targets (M,).
        loss_fn: (outputs (n, 1), targets (n,)) -> unreduced losses.
        smoothness: L, a Lipschitz constant of ∇G.
        bound: σ, the largest norm of a training gradient, anywhere.
    """

    train: tuple[Tensor, Tensor]
    clean: tuple[Tensor, Tensor]
    loss_fn: LossFn
    smoothness: float
    bound: float

    @property
    def largest_step(self) -> float:
        """2/(L σ²): G falls at every step that is not longer."""
        return 2 / (self.smoothness * self.bound**2)


def logistic(seed: int, *, features: int = 5, size: int = 2000, clean: int = 20) -> Problem:
    """Logistic regression on unit vectors; 40% of the training labels are flipped.

    A loss log(1 + exp(-y <θ, x>)) has gradients of at most |x| = 1, and a second derivative of at
    most xxᵀ/4: σ = 1, and L is a quarter of the largest eigenvalue of the mean xxᵀ over the clean
    examples.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = F.normalize(normal(size + clean, features), dim=1)
    y = torch.sign(x @ normal(features) + 0.1 * normal(size + clean))
    x_clean, y_clean = x[size:], y[size:].clone()
    flipped = torch.rand(size, generator=generator) < 0.4
    y[:size][flipped] *= -1

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.softplus(-targets * outputs.squeeze(1))

    largest = torch.linalg.eigvalsh(x_clean.T @ x_clean / clean)[-1]
    return Problem((x, y), (x_clean, y_clean), losses, float(largest) / 4, 1.0)


def tail(power: float = 0.25) -> Problem:
    """One example, one parameter from 0 on, and a loss that falls as (1 + θ)^-power.

    The slow case: training and clean gradient fade together, |∇G|² as T^(-2q/(3q+1)) with
    q = power + 1, which comes close to T^(-1/2) for small powers. σ = power and L = power q hold
    for all θ ≥ 0, and θ only grows.
    """
    one = torch.ones(1, 1, dtype=torch.float64)

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return (targets + outputs.squeeze(1)) ** -power

    example = (one, one[0])
    return Problem(example, example, losses, power * (power + 1), power)


@dataclass(frozen=True)
class Visit:
    """Where a step began: G(θ_t) and |∇G(θ_t)|²."""

    clean_loss: float
    squared_gradient: float


def descend(problem: Problem, batches: Iterator[Tensor], step_size: float) -> Iterator[Visit]:
    """Follow the algorithm from θ = 0, one step for each batch.

    Args:
        problem: what to minimise.
        batches: indices of training examples, each of shape (n,).
        step_size: α.

    Yields:
        what was found before each step, so that the last step is not looked at.
    """
    x, y = problem.train
    model = nn.Linear(x.shape[1], 1, bias=False, dtype=x.dtype)
    nn.init.zeros_(model.weight)
    reweighter = Reweighter(model, problem.loss_fn)
    for index in batches:
        outputs = model(problem.clean[0])
        loss = problem.loss_fn(outputs, problem.clean[1]).mean()
        (gradient,) = torch.autograd.grad(loss, [model.weight])
        yield Visit(loss.item(), float(gradient.square().sum()))
        model.zero_grad()
        step = reweighter.backward((x[index], y[index]), problem.clean)
        # p.grad is Σ w_i ∇f_i with w_i = a_i / Σ a_j (Eq. 9); the factor takes the division back.
        total = step.scores.clamp(min=0).sum()
        with torch.no_grad():
            assert model.weight.grad is not None
            model.weight -= step_size / len(index) * total * model.weight.grad


def drawn(problem: Problem, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` batches of ``size`` training examples, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(len(problem.train[1]), (size,), generator=generator)


def copies(problem: Problem, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` batches, each of one of the clean examples, ``size`` times."""
    generator = torch.Generator().manual_seed(seed)
    first = len(problem.train[1]) - len(problem.clean[1])
    for _ in range(steps):
        one = torch.randint(first, len(problem.train[1]), (1,), generator=generator)
        yield one.expand(size)
