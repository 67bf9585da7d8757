"""The interface that all engines share, and what those that keep autograd's graph share."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor, nn

from l2rw_ext.task.isolation import Snapshot
from l2rw_ext.task.task import Direction, Task

from .explanation import Explanation
from .plan import Plan


class Scored(abc.ABC):
    """The result of a score pass: scores, losses, and all that the weighted gradient needs."""

    plan: Plan | None = None
    """The plan that the engine follows, if it is of a kind that makes plans."""
    cannot_exclude: ClassVar[bool] = False
    """Whether one backward serves all examples at once, so that it can leave out none of them."""
    scores: Tensor
    """u, shape (n,), accumulation dtype; not finite where an example is excluded."""
    losses: Tensor
    """Training losses, shape (n,), detached."""
    clean_loss: Tensor
    """Mean clean loss, shape (), detached."""

    @abc.abstractmethod
    def weighted_gradients(self, weights: Tensor | None) -> list[tuple[nn.Parameter, Tensor]]:
        """(p, d/dp Σ w_i f_i) for every parameter that the training losses reach.

        ``weights`` has shape (n,); None stands for weights that are all zero.
        """


class GraphScored(Scored):
    """Scores of an engine that keeps the graph; its one backward mixes all examples.

    Args:
        task: the step.
        losses: of the training batch, attached to the graph, shape (n,).
        scores: u, shape (n,), detached.
        clean_loss: mean clean loss, shape (), detached.
    """

    cannot_exclude = True

    def __init__(self, task: Task, losses: Tensor, scores: Tensor, clean_loss: Tensor) -> None:
        self._task = task
        self._attached = losses
        self.scores = scores
        self.losses = losses.detach()
        self.clean_loss = clean_loss

    def weighted_gradients(self, weights: Tensor | None) -> list[tuple[nn.Parameter, Tensor]]:
        """Step 13 of Algorithm 1."""
        if weights is None:
            seeds = torch.zeros_like(self._attached)
        else:
            seeds = weights.to(self._attached.dtype)
        parameters = self._task.parameters
        gradients = torch.autograd.grad(
            self._attached, parameters, self._task.scaled(seeds), allow_unused=True
        )
        pairs = zip(parameters, gradients, strict=True)
        return [(p, g) for p, g in pairs if g is not None]


class Engine(abc.ABC):
    """A way to compute Eq. 7 exactly."""

    name: str

    @abc.abstractmethod
    def score(self, task: Task, snapshot: Snapshot, direction: Direction | None = None) -> Scored:
        """Run the score pass.

        ``snapshot`` is the state before the step, to which the caller returns after an error. On
        success the buffers are those of one plain training forward. No gradient of a leaf is
        touched. Without a ``direction`` the engine gets that of the clean batch.

        Raises:
            NotExactError: the numbers would be wrong for this model.
        """

    @abc.abstractmethod
    def explain(
        self, task: Task, snapshot: Snapshot, direction: Direction | None = None
    ) -> Explanation:
        """What :meth:`score` would do and cost; the caller restores the snapshot.

        Raises:
            NotExactError: as :meth:`score`.
        """
