"""Scores that are remembered from earlier steps, followed by a plain weighted step."""

from __future__ import annotations

from torch import Tensor

from l2rw_ext.task.isolation import Snapshot
from l2rw_ext.task.task import Direction, Task, check_losses

from .base import Engine, GraphScored, Scored
from .explanation import Explanation


class Remembered(Engine):
    """One forward and one weighted backward of the training batch.

    Args:
        scores: the remembered scores of the examples of the batch, shape (n,).
        clean_loss: the mean clean loss when a clean batch was last seen.
    """

    name = "remembered"

    def __init__(self, scores: Tensor, clean_loss: Tensor) -> None:
        self.scores = scores
        self.clean_loss = clean_loss

    def score(self, task: Task, snapshot: Snapshot, direction: Direction | None = None) -> Scored:
        """See :class:`Engine`."""
        losses = task.forward_train()
        snapshot.keep_trained()
        check_losses(losses, task)
        scores, clean_loss = (x.to(losses.device) for x in (self.scores, self.clean_loss))
        passes = "one training forward and one weighted backward"
        reason = "the scores of all examples are remembered"
        explanation = Explanation.of_graph(self.name, task, reason, passes, forwards=3, given=True)
        return GraphScored(task, losses, scores, clean_loss, explanation)
