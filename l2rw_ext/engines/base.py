"""The interface that all engines share."""

from __future__ import annotations

import abc
from typing import ClassVar

from torch import Tensor, nn

from l2rw_ext.task.clean_gradient import Direction
from l2rw_ext.task.isolation import Snapshot
from l2rw_ext.task.task import Task

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
