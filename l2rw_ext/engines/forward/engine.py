"""Scores as a derivative along the direction: one forward carries losses and tangents."""

from __future__ import annotations

import functools
import threading
import warnings
from types import ModuleType

import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import set_checkpoint_early_stop

from l2rw_ext.engines.base import Engine, GraphScored, Scored
from l2rw_ext.engines.explanation import Explanation
from l2rw_ext.engines.proof import Proofs
from l2rw_ext.ops.arithmetic import accumulation_dtype
from l2rw_ext.task.isolation import Snapshot
from l2rw_ext.task.task import Direction, Task, check_losses

from . import rules  # noqa: F401  registers the rules of :class:`Tangents`
from .dual import unpack
from .mode import Tangents

_LEVEL = threading.RLock()
"""Torch has only one level of forward mode, so that steps of several threads take turns."""


class Forward(Engine):
    """u = J v with J the Jacobian of the training losses with respect to the parameters.

    It is exact also if examples reach each other's losses (BatchNorm in train mode). The primal of
    the one training forward keeps its graph, which serves the weighted backward.
    """

    name = "forward"

    def __init__(self) -> None:
        self._proofs = Proofs()

    def score(self, task: Task, snapshot: Snapshot, direction: Direction | None = None) -> Scored:
        """Clean forward and backward, then the training forward; see :class:`Engine`."""
        return self._proofs.along(task, snapshot, direction, _score)


def _score(task: Task, snapshot: Snapshot, direction: Direction, given: bool) -> Scored:
    # Tangents keeps what a checkpoint would drop. If something is recomputed after all, torch
    # counts what it saves and raises.
    with _LEVEL, _loaded().dual_level(), set_checkpoint_early_stop(False):
        mode = Tangents(task, direction)
        with mode:
            losses = task.forward_train()
        check_losses(losses, task)
        scores = mode.scores(losses).to(accumulation_dtype(losses.dtype))
        losses, _ = unpack(losses)
    reason = "the forward has a derivative along the direction; examples may share statistics"
    passes = "a training forward with tangents"
    if mode.attention:
        passes += " (attention on the math kernel)"
    explanation = Explanation.of_graph(Forward.name, task, reason, passes, forwards=5, given=given)
    return GraphScored(task, losses, scores, direction.clean_loss, explanation)


@functools.cache
def _loaded() -> ModuleType:
    """Torch's forward mode, which loads its derivatives when the first dual tensor is made.

    The derivatives are written in TorchScript, and torch warns that it is deprecated (2.14 by a
    FutureWarning, earlier ones by a DeprecationWarning); the warning is ignored here.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script")
        zero = torch.zeros((), device="cpu")
        with forward_ad.dual_level():
            forward_ad.make_dual(zero, zero)
    return forward_ad
