"""The methods that are compared: how each draws a batch, and what it leaves in ``p.grad``.

A method is one class here; ``@register`` makes it known by its name. Index letters: n examples in
the training batch, C classes, N examples in the training set. All losses are sums of w_i f_i.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2rw_ext import Reweighter

from ..errors import UsageError
from .order import Epochs, generator


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Unreduced cross entropy, shape (n,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


class Batch(NamedTuple):
    """Inputs (n, C, H, W) and targets (n,) on the model's device."""

    inputs: Tensor
    targets: Tensor


class Statistics(NamedTuple):
    """Losses f_i, weights w_i and, of a method that has them, scores u_i; (n,) and detached."""

    losses: Tensor
    weights: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """What a method may know of its run.

    Attributes:
        model: in training mode, on its device.
        targets: the training set's labels as they are, flipped or not, shape (N,).
        flipped: which of them are wrong, shape (N,): for oracles.
        classes: how many there are.
        size: examples in a batch.
        seed: of the run.
        clean_l2: times θ, part of the clean gradient, as in the authors' code; else 0.
        direction_decay: of an average of clean gradients, as the Reweighter takes it.
        confusion: share of each label among the hyper-validation images that a trained model
            takes for a class, shape (C, C), where the run starts from one.
    """

    model: nn.Module
    targets: Tensor
    flipped: Tensor
    classes: int
    size: int
    seed: int
    clean_l2: float = 0.0
    direction_decay: float = 0.0
    confusion: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(self.model.parameters()).device

    @property
    def counts(self) -> Tensor:
        """Training examples of each class, shape (C,), float64."""
        return torch.bincount(self.targets, minlength=self.classes).double()


class Method(ABC):
    """One way to train. :meth:`step` takes the place of ``loss.backward()``.

    Attributes:
        name: as the command line and the tables have it.
        uses_clean: whether steps get a clean batch.
        uses_training: whether they look at the training batch; else they get the clean one for it.
        trains_on_clean: whether clean images may be part of the training set; by default those of
            methods that have no other use for them.
    """

    name: ClassVar[str]
    uses_clean: ClassVar[bool] = False
    uses_training: ClassVar[bool] = True
    context: Context

    @property
    def trains_on_clean(self) -> bool:
        """See the class."""
        return not self.uses_clean

    def prepare(self, context: Context) -> None:
        """Called once, before the first step or before a checkpoint is loaded."""
        self.context = context
        self._order = Epochs(len(context.targets), context.size, context.seed, "training batches")

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the method itself, trained along with the model's."""
        return []

    def draw(self, step: int) -> Tensor:
        """Numbers of the training examples of a step, shape (n,); depends on seed and step only."""
        return self._order[step]

    @abstractmethod
    def step(self, number: int, batch: Batch, clean: Batch | None) -> Statistics:
        """Add the step's gradient to ``p.grad``."""

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers between steps, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        del state


METHODS: dict[str, type[Method]] = {}
Registered = TypeVar("Registered", bound=type[Method])


def register(method: Registered) -> Registered:
    """Make a method known by its name."""
    METHODS[method.name] = method
    return method


def make(name: str) -> Method:
    """A method by its name.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; known are {', '.join(METHODS)}")
    return METHODS[name]()


class Weighted(Method):
    """A method that computes weights from losses and labels, and needs no second look."""

    def step(self, number: int, batch: Batch, clean: Batch | None) -> Statistics:
        """One forward, one backward of Σ w_i f_i."""
        found = self.losses(batch)
        weights = self.weigh(number, batch, found.detach())
        torch.autograd.backward([(weights * found).sum()])
        return Statistics(found.detach(), weights)

    def losses(self, batch: Batch) -> Tensor:
        """Unreduced losses, shape (n,)."""
        return losses(self.context.model(batch.inputs), batch.targets)

    def weigh(self, number: int, batch: Batch, found: Tensor) -> Tensor:
        """The weights of the examples, shape (n,)."""
        return torch.full_like(found, 1 / len(found))


@register
class Ours(Method):
    """The paper's Algorithm 1, by the package: weights from the clean batch at every step."""

    name = "ours"
    uses_clean = True

    def prepare(self, context: Context) -> None:
        """Make the reweighter."""
        super().prepare(context)
        self._reweighter = Reweighter(
            context.model, losses, l2=context.clean_l2, direction_decay=context.direction_decay
        )

    def step(self, number: int, batch: Batch, clean: Batch | None) -> Statistics:
        """One call of :meth:`l2rw_ext.Reweighter.backward`."""
        done = self._reweighter.backward(batch, clean)
        return Statistics(done.losses, done.weights, done.scores)

    def state_dict(self) -> dict[str, Any]:
        """The reweighter's."""
        return self._reweighter.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._reweighter.load_state_dict(state)


@register
class Baseline(Weighted):
    """Plain training: the mean loss."""

    name = "baseline"


@register
class Proportion(Weighted):
    """Each example weighs the inverse frequency of its class; the mean over the set is 1/n."""

    name = "proportion"

    def prepare(self, context: Context) -> None:
        """Weights by class, N / (C N_c); a class without examples never asks for its own."""
        super().prepare(context)
        share = len(context.targets) / (context.classes * context.counts)
        self._of_class = share.to(context.device, torch.float32)

    def weigh(self, number: int, batch: Batch, found: Tensor) -> Tensor:
        """By class."""
        return self._of_class[batch.targets] / len(found)


@register
class Resample(Weighted):
    """Batches with an equal share of each class, each class through epochs of its own."""

    name = "resample"

    def prepare(self, context: Context) -> None:
        """Epochs for each class that has examples; the first classes get what does not divide."""
        super().prepare(context)
        members = [torch.nonzero(context.targets == c).flatten() for c in range(context.classes)]
        members = [m for m in members if len(m)]
        share, rest = divmod(context.size, len(members))
        sizes = [share + (c < rest) for c in range(len(members))]
        self._classes = [
            (m, Epochs(len(m), size, context.seed, f"training batches, class {c}"))
            for c, (m, size) in enumerate(zip(members, sizes, strict=True))
            if size
        ]

    def draw(self, step: int) -> Tensor:
        """The same number of each class."""
        return torch.cat([members[order[step]] for members, order in self._classes])


@register
class OursWithClean(Ours):
    """Ours, with the clean images in the training set too."""

    name = "ours +clean"
    trains_on_clean = True


@register
class OursResampled(Ours, Resample):
    """Ours on batches that RESAMPLE draws."""

    name = "ours +resample"


@register
class HardMining(Weighted):
    """Of the majority only the highest losses count, as many as the batch has minority examples.

    The majority are all classes but the rarest; at least one of them is kept. The paper says no
    more than that the highest losses of the majority are selected; on balanced classes this is
    nearly plain training.
    """

    name = "hard mining"

    def prepare(self, context: Context) -> None:
        """Find the rarest class that has examples."""
        super().prepare(context)
        counts = context.counts
        self._rarest = int(counts.where(counts > 0, float("inf")).argmin())

    def weigh(self, number: int, batch: Batch, found: Tensor) -> Tensor:
        """Equal weights for the examples that are kept, none for the others."""
        rare = batch.targets == self._rarest
        order = found.masked_fill(rare, float("inf")).argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        few = rare.sum()
        kept = (rank < few + few.clamp(min=1)).to(found.dtype)
        return kept / kept.sum()


@register
class Random(Weighted):
    """Weights from a rectified Gaussian that sum to one, drawn anew at each step (Eq. 16)."""

    name = "random"

    def weigh(self, number: int, batch: Batch, found: Tensor) -> Tensor:
        """Equation (16)."""
        draw = generator(self.context.seed, "random weights", number)
        positive = torch.randn(len(found), generator=draw).clamp(min=0).to(found)
        total: Tensor = positive.sum()
        return positive / total.where(total > 0, 1)


@register
class CleanOnly(Weighted):
    """Plain training on the clean batch; the training batch is not looked at."""

    name = "clean only"
    uses_clean = True
    uses_training = False


@register
class Oracle(Weighted):
    """WEIGHTED: by the true share of clean labels in each class; the mean over the set is 1/n."""

    name = "weighted"

    def prepare(self, context: Context) -> None:
        """Weights by class, from the true noise."""
        super().prepare(context)
        right = torch.bincount(context.targets[~context.flipped], minlength=context.classes)
        share = right / context.counts.clamp(min=1)
        share = share / share[context.targets].mean()
        self._of_class = share.to(context.device, torch.float32)

    def weigh(self, number: int, batch: Batch, found: Tensor) -> Tensor:
        """By class."""
        return self._of_class[batch.targets] / len(found)


class Reed(Weighted):
    """Bootstrapping (Reed et al., 2014): the target is β times the label, 1-β the prediction."""

    beta: ClassVar[float]

    def losses(self, batch: Batch) -> Tensor:
        """Cross entropy with the mixed target."""
        log_p = F.log_softmax(self.context.model(batch.inputs), 1)
        label = log_p.gather(1, batch.targets[:, None])[:, 0]
        return -(self.beta * label + (1 - self.beta) * self.own(log_p))

    @abstractmethod
    def own(self, log_p: Tensor) -> Tensor:
        """Log-likelihood of the model's own prediction, shape (n,)."""


@register
class ReedSoft(Reed):
    """The prediction is the distribution; the gradient flows through it too, as in its paper."""

    name = "reed soft"
    beta = 0.95

    def own(self, log_p: Tensor) -> Tensor:
        """Negative entropy."""
        return (log_p.exp() * log_p).sum(1)


@register
class ReedHard(Reed):
    """The prediction is the most likely class."""

    name = "reed hard"
    beta = 0.8

    def own(self, log_p: Tensor) -> Tensor:
        """Log-probability of the most likely class."""
        return log_p.amax(1)


@register
class SModel(Weighted):
    """A softmax layer after the outputs models the noise (Goldberger & Ben-Reuven, 2017).

    p(label = k) = Σ_c p(true = c) softmax(T_c)_k; T is trained along. It starts at the logarithm of
    the identity or, where the run has one, of a trained model's confusion of labels, each plus a
    thousandth, as in the code of Ren et al. From a smoother start the layer can learn before the
    model does, which then takes all images for the commonest label. Tests use the outputs before
    that layer.
    """

    name = "s-model"
    smoothing = 1e-3

    def prepare(self, context: Context) -> None:
        """Transition logits T, shape (C, C), from the true class to the label."""
        super().prepare(context)
        start = torch.eye(context.classes)
        if context.confusion is not None:
            start = context.confusion.float()
        self._transition = nn.Parameter((start + self.smoothing).log().to(context.device))

    def parameters(self) -> list[nn.Parameter]:
        """The transition logits."""
        return [self._transition]

    def losses(self, batch: Batch) -> Tensor:
        """Cross entropy of what the noise makes of the prediction."""
        log_p = F.log_softmax(self.context.model(batch.inputs), 1)
        noise = F.log_softmax(self._transition, 1)[:, batch.targets].T
        return -torch.logsumexp(log_p + noise, 1)

    def state_dict(self) -> dict[str, Any]:
        """The transition logits."""
        return {"transition": self._transition.detach().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        with torch.no_grad():
            self._transition.copy_(state["transition"])
