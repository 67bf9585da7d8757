"""The interface that all engines share, and what those that keep autograd's graph share."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from l2rw_ext.task.isolation import Snapshot
from l2rw_ext.task.task import Direction, Task

from .explanation import Explanation
from .plan import Plan

Give: TypeAlias = Callable[[list[tuple[nn.Parameter, Tensor]]], object]
"""Takes gradients of parameters, to be added to those that it took before."""


class Scored(abc.ABC):
    """The result of a score pass: scores, losses, and all that the weighted gradient needs."""

    plan: Plan | None = None
    """The plan that the engine follows, if it is of a kind that makes plans."""
    proof: str = ""
    """How the engine was compared with plain autograd, for ``explain()``."""
    cannot_exclude: ClassVar[bool] = False
    """Whether one backward serves all examples at once, so that it can leave out none of them."""
    scores: Tensor
    """u, shape (n,), accumulation dtype; not finite where an example is excluded. Along a
    :class:`~l2rw_ext.task.task.Combination` of q directions they are the scores of each, (n, q)."""
    norms: Tensor | None = None
    """|∇f_i|, shape (n,), if scores are divided by it."""
    losses: Tensor
    """Training losses, shape (n,), detached."""
    clean_loss: Tensor
    """Mean clean loss, shape (), detached."""

    @property
    def products(self) -> Tensor:
        """<∇f_i, v>, shape (n,), which is compared with plain autograd."""
        return self.scores

    @abc.abstractmethod
    def weighted_gradients(
        self, weights: Tensor | None, *, keep: bool = False
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """(p, d/dp Σ w_i f_i) for every parameter that the training losses reach.

        ``weights`` has shape (n,); None stands for weights that are all zero. What the gradients
        are formed from is freed, unless ``keep`` asks for another call.
        """

    def gradients_of(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        weights: Tensor | None,
        *,
        keep: bool = False,
        give: Give | None = None,
    ) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
        """As :meth:`weighted_gradients`, for one group of parameters after the other.

        What an engine finds in another order than that of the groups it may hand to ``give`` at
        once; then it does not yield that.
        """
        gradients = {id(p): g for p, g in self.weighted_gradients(weights, keep=keep)}
        for group in groups:
            yield [(p, gradients.pop(id(p))) for p in group if id(p) in gradients]

    @abc.abstractmethod
    def explain(self) -> Explanation:
        """Why the engine ran, and what the step costs."""


@dataclass
class GraphScored(Scored):
    """Scores of an engine that keeps the graph; its one backward mixes all examples."""

    cannot_exclude = True
    task: Task
    attached: Tensor
    """Training losses, attached to the graph, shape (n,)."""
    scores: Tensor
    clean_loss: Tensor
    explanation: Explanation

    def __post_init__(self) -> None:
        self.losses = self.attached.detach()

    def weighted_gradients(
        self, weights: Tensor | None, *, keep: bool = False
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Step 13 of Algorithm 1."""
        losses, parameters = self.attached, self.task.parameters
        seeds = torch.zeros_like(losses) if weights is None else weights.to(losses.dtype)
        gradients = torch.autograd.grad(
            losses, parameters, self.task.scaled(seeds), keep, allow_unused=True
        )
        pairs = zip(parameters, gradients, strict=True)
        return [(p, g) for p, g in pairs if g is not None]

    def explain(self) -> Explanation:
        """See :class:`Scored`."""
        return replace(self.explanation, proof=self.proof)


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

    def refuse(self, task: Task, direction: Direction | None, reason: str) -> None:  # noqa: B027  an engine need not
        """Note that steps of this kind go on to the next engine.

        An engine may remember it, and raise ``NotExactError(reason)`` at once in later steps.
        """
