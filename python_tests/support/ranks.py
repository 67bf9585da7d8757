"""Steps on several ranks, and what one process makes of the same batches.

A :class:`Setup` is pickled to the workers, which make model and reweighter from it. Batches are
lists by step and rank: ``steps[k][r]`` is the pair of training and clean batch of rank r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from l2rw_ext import Reweighter, Step, reference
from l2rw_ext.reference import relative_error
from support.models import (
    CLASSES,
    Mean,
    Tokens,
    Twice,
    cross_entropy,
    mlp,
    normed,
    vectors,
)
from support.oracle import EXACT, Truth, flat, gradients_of, truth_of_ranks

Batches = list[list[tuple[Any, Any]]]


def _convolutions() -> nn.Module:
    layers = (nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), Mean(last=False))
    return nn.Sequential(*layers, nn.Linear(4, CLASSES)).double()


def _tokens() -> nn.Module:
    return Tokens(3, batch_first=True, norm_first=True, padding=0, tied=True).double()


def _shared() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), Twice(nn.Linear(8, 8)), nn.Linear(8, CLASSES)).double()


def _weight_normed() -> nn.Module:
    layers = (weight_norm(nn.Linear(5, 8)), nn.Tanh(), weight_norm(nn.Linear(8, CLASSES)))
    return nn.Sequential(*layers).double()


class Chunked(nn.Module):
    """Calls its layers once for so many positions; what comes out does not depend on the number."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once = 1
        self.up = nn.Linear(1, 4, dtype=torch.float64)
        self.down = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        parts = x[..., None].split(self.at_once, 1)
        return torch.cat([self.down(torch.tanh(self.up(part))) for part in parts], 1).sum(1)


class Checkpointed(nn.Module):
    """A layer that is recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 8, dtype=torch.float64), nn.Tanh())
        self.head = nn.Linear(8, CLASSES, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


class Branches(nn.Module):
    """One layer that only batches of an odd size reach, and one that none reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, CLASSES, dtype=torch.float64)
        self.odd = nn.Linear(5, CLASSES, dtype=torch.float64)
        self.unused = nn.Linear(5, CLASSES, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.odd(x) if len(x) % 2 else self.body(x)


class MeetsIfOdd(nn.Module):
    """Examples meet in batches of an odd size, which the layer-wise engine refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return z - z.mean(0).square() if len(x) % 2 else z


class ScaledCrossEntropy(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((CLASSES,), 0.7, dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs * self.scale, targets)


def _linear() -> nn.Module:
    return nn.Linear(5, CLASSES, dtype=torch.float64)


def _images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 5, 4, dtype=torch.float64), torch.randint(CLASSES, (n,))


def _words(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(7, (n, 3)), torch.randint(CLASSES, (n,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, vectors),
    "linear": (_linear, vectors),
    "convolutions": (_convolutions, _images),
    "tokens": (_tokens, _words),
    "shared": (_shared, vectors),
    "batch norm": (normed, vectors),
    "checkpointed": (Checkpointed, vectors),
    "chunked": (lambda: nn.Sequential(Chunked(), nn.Linear(3, CLASSES).double()), vectors),
    "weight norm": (_weight_normed, vectors),
    "branches": (Branches, vectors),
    "meets if odd": (MeetsIfOdd, vectors),
}
"""Float64 models and their batches of n examples, by name."""

COUPLED = {"batch norm", "meets if odd"}
"""Those whose examples meet, which the layer-wise engine refuses."""

SIZES = {
    "even": [(4, 2)] * 3,
    "uneven": [(5, 2), (2, 4), (7, 3)],
    "one rank without clean examples": [(3, 2), (4, 0), (2, 3)],
}
"""n and m of three ranks; of fewer ranks, the first ones."""


def draw(model: str, sizes: Sequence[tuple[int, int]], steps: int = 1, seed: int = 0) -> Batches:
    """Batches for so many steps; a clean batch of no examples is None."""
    torch.manual_seed(seed)
    make = MODELS[model][1]
    return [[(make(n), make(m) if m else None) for n, m in sizes] for _ in range(steps)]


WRAPPERS: dict[str, dict[str, Any] | None] = {"wrapped": {}, "group given": None}
"""How a group gets to the reweighter: see ``Setup.wrapper``."""


@dataclass(frozen=True)
class Setup:
    """How every rank trains."""

    model: str = "mlp"
    loss: type[nn.Module] | None = None
    """A loss that is a module; None for cross entropy."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the reweighter; ``preconditioner=True`` stands for the optimiser."""
    wrapper: Mapping[str, Any] | None = field(default_factory=dict)
    """Of DistributedDataParallel; None for no wrapper, and a group given to the reweighter."""
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    rate: float = 0.1
    dtype: torch.dtype = torch.float64


class Rank:
    """Model, reweighter and optimiser of one rank; of one process for all if the group is None."""

    def __init__(self, group: dist.ProcessGroup | None, setup: Setup) -> None:
        torch.manual_seed(1)
        self.inner = MODELS[setup.model][0]().to(setup.dtype)
        self.loss: Any = cross_entropy if setup.loss is None else setup.loss()
        self.model = self.inner
        options = dict(setup.options)
        if group is None:
            options.pop("replicated_clean", None)
        elif setup.wrapper is None:
            options["process_group"] = group
        else:
            self.model = DistributedDataParallel(self.inner, process_group=group, **setup.wrapper)
        self.optimizer = setup.optimizer(self.parameters(), lr=setup.rate)
        if options.get("preconditioner"):
            options["preconditioner"] = self.optimizer
        self.reweighter = Reweighter(self.model, self.loss, **options)

    def parameters(self) -> list[nn.Parameter]:
        """Those of the model and of the loss."""
        return list(reference.trainable(self.inner, self.loss).values())

    def outcome(self, step: Step) -> Outcome:
        """What a step that has just been made has left."""
        gradients = gradients_of(self.inner, self.loss)
        return Outcome(
            step.scores,
            step.weights,
            {name: None if g is None else g.clone() for name, g in gradients.items()},
            step.clean_loss,
            step.degenerate,
            step.nonfinite,
            step.effective_sample_size,
            step.engine,
        )

    def train(self, batch: Any, clean: Any, **arguments: Any) -> Outcome:
        """One step, and the optimiser's."""
        self.optimizer.zero_grad()
        outcome = self.outcome(self.reweighter.backward(batch, clean, **arguments))
        self.optimizer.step()
        return outcome


@dataclass
class Outcome:
    """What a step leaves on one rank."""

    scores: Tensor
    weights: Tensor
    gradients: dict[str, Tensor | None]
    clean_loss: Tensor
    degenerate: bool
    nonfinite: int
    effective_sample_size: float
    engine: str


def train(group: dist.ProcessGroup, setup: Setup, steps: Batches) -> list[Outcome]:
    """The steps of a rank."""
    rank = Rank(group, setup)
    return [rank.train(*batches[dist.get_rank(group)]) for batches in steps]


def truths(setup: Setup, steps: Batches) -> list[list[Truth]]:
    """What the oracle says of each step and rank, in one process that trains by its gradients."""
    own, found = Rank(None, setup), []
    for batches in steps:
        found.append(truth_of_ranks(own.inner, own.loss, *zip(*batches, strict=True)))
        named = reference.trainable(own.inner, own.loss)
        for name, gradient in found[-1][0].gradients.items():
            named[name].grad = None if gradient is None else gradient.clone()
        own.optimizer.step()
    return found


def of_one_process(setup: Setup, steps: Batches) -> list[list[Truth]]:
    """What a reweighter in one process says of the union of all ranks' batches."""
    own = Rank(None, setup)
    return [in_parts(own.train(*union(batches)), batches) for batches in steps]


def union(batches: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """All ranks' training batches as one, and their clean batches."""
    kinds = zip(*batches, strict=True)
    return tuple(
        tuple(map(torch.cat, zip(*[b for b in kind if b is not None], strict=True)))
        for kind in kinds
    )


def in_parts(outcome: Outcome, batches: Sequence[tuple[Any, Any]]) -> list[Truth]:
    """What each rank must see of a step on the union."""
    sizes = [len(batch[1]) for batch, _ in batches]
    return [
        Truth(u, w, outcome.gradients, outcome.clean_loss)
        for u, w in zip(outcome.scores.split(sizes), outcome.weights.split(sizes), strict=True)
    ]


def assert_step(
    found: Sequence[Outcome], expected: Sequence[Truth], tolerance: float = EXACT
) -> None:
    """A step on several ranks, given by rank, is what is expected; all know of all examples."""
    scores = torch.cat([t.scores for t in expected])
    weights = torch.cat([t.weights for t in expected])
    total, squares = float(weights.sum()), float(weights.square().sum())
    for rank, (outcome, t) in enumerate(zip(found, expected, strict=True)):
        assert outcome.scores.shape == t.scores.shape, rank
        finite = t.scores.isfinite()
        assert torch.equal(outcome.scores.isfinite(), finite), rank
        # Relative to the scores of all: those of one rank may be small, or cancel.
        for ours, theirs, of_all in (
            (outcome.scores[finite], t.scores[finite], scores[scores.isfinite()]),
            (outcome.weights, t.weights, weights),
            (outcome.clean_loss, t.clean_loss, t.clean_loss),
        ):
            assert float((ours - theirs).norm()) <= tolerance * float(of_all.norm()), rank
        assert outcome.degenerate == (not bool((scores > 0).any())), rank
        assert outcome.nonfinite == int((~scores.isfinite()).sum()), rank
        size = total * total / squares if squares else 0.0
        assert abs(outcome.effective_sample_size - size) <= 10 * tolerance * size, rank
        assert {k for k, g in outcome.gradients.items() if g is not None} == {
            k for k, g in t.gradients.items() if g is not None
        }, rank
        ours, theirs = flat(outcome.gradients.values()), flat(t.gradients.values())
        assert relative_error(ours, theirs) <= tolerance, rank
        assert torch.equal(ours, flat(found[0].gradients.values())), rank


def assert_steps(
    found: Sequence[Sequence[Outcome]],
    expected: Sequence[Sequence[Truth]],
    tolerance: float = EXACT,
) -> None:
    """Several steps, given by rank and step, are what is expected of them, by step and rank."""
    for by_rank, truth in zip(zip(*found, strict=True), expected, strict=True):
        assert_step(by_rank, truth, tolerance)
