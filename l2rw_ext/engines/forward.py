"""Scores as a derivative along the direction: one forward carries losses and tangents."""

from __future__ import annotations

import threading

import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import set_checkpoint_early_stop

from ..plan import Explanation
from ..preserve import Snapshot
from ..rules.base import accumulation_dtype
from ..tangents import Tangents
from ..tangents.base import unpack
from ..watch import NotCapturableError
from .base import Direction, Engine, NotExactError, Scored, Task, require_grad
from .direction import clean_direction
from .graph import GraphScored, check_at_hand

_LEVEL = threading.RLock()
"""One level of forward mode is all that torch has: steps of several threads take turns."""


class Forward(Engine):
    """u = J v with J the Jacobian of the training losses with respect to the parameters.

    Exact also where examples reach each other's losses (BatchNorm in train mode). The primal of the
    one training forward keeps its graph, which serves the weighted backward.
    """

    name = "forward"

    def score(self, task: Task, snapshot: Snapshot, direction: Direction | None = None) -> Scored:
        """Clean forward and backward, then the training forward; see :class:`Engine`."""
        scored, _ = _score(task, snapshot, direction)
        return scored

    def explain(
        self, task: Task, snapshot: Snapshot, direction: Direction | None = None
    ) -> Explanation:
        """See :class:`Engine`."""
        _, mode = _score(task, snapshot, direction)
        reason = "the forward has a derivative along the direction; examples may share statistics"
        clean = "a clean forward and backward, " if direction is None else ""
        passes = f"{clean}a training forward with tangents"
        if mode.attention:
            passes += " (attention on the math kernel)"
        return Explanation.of_graph(self.name, task, reason, passes, forwards=5)


def _score(
    task: Task, snapshot: Snapshot, direction: Direction | None
) -> tuple[GraphScored, Tangents]:
    if direction is None:
        direction = clean_direction(task, snapshot)
    try:
        # Nothing is recomputed (see Tangents); were something, torch would count and find out.
        with _LEVEL, forward_ad.dual_level(), set_checkpoint_early_stop(False):
            mode = Tangents(task, direction)
            with mode:
                losses = task.forward_train()
            require_grad(losses)
            scores = mode.scores(losses).to(accumulation_dtype(losses.dtype))
            losses, _ = unpack(losses)
    except (NotCapturableError, NotExactError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        raise NotExactError(f"the forward cannot carry tangents: {line}") from error
    check_at_hand(task, losses, scores)
    return GraphScored(task, losses, scores, direction.clean_loss), mode
