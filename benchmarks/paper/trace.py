"""What a run's weights and its clean loss do between two looks at it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .evaluation import evaluating
from .training_methods import Batch, Statistics, losses


class Trace:
    """Sums over the steps since the last look.

    Args:
        classes: how many there are.
    """

    def __init__(self, classes: int) -> None:
        self._weights = torch.zeros(classes, dtype=torch.float64)
        self._steps = self._without = 0
        self._weighed = 0.0

    def add(self, targets: Tensor, statistics: Statistics) -> None:
        """Take the weights of a step, whose examples have these targets, shape (n,)."""
        weights = statistics.weights.detach().double()
        self._weights.index_add_(0, targets.cpu(), weights.cpu())
        self._steps += 1
        self._without += not weights.any()
        self._weighed += float((weights > 0).double().mean())

    def take(self, model: nn.Module, clean: Batch) -> dict[str, float]:
        """A point of the curve, after which the sums begin anew.

        Returns:
            ``clean_loss`` f and ``clean_gradient`` ‖∇f‖ at the model as it is in evaluation mode,
            for which the clean images are ``clean``; ``hardest``, the share of the hardest of
            them in the clean loss; ``weight_of_class_C``, the weight that a step gives to the
            examples of a class together, mean over the steps; ``weighed``, the percentage of
            examples with weight; ``without_weight``, the percentage of steps that weigh nothing.
        """
        with evaluating(model), torch.enable_grad():
            each = losses(model(clean.inputs), clean.targets)
            loss = each.mean()
            gradient = torch.autograd.grad(loss, list(model.parameters()))
        steps = max(1, self._steps)
        shares = (self._weights / steps).tolist()
        point = {
            "clean_loss": float(loss.detach()),
            "clean_gradient": float(nn.utils.get_total_norm(gradient)),
            "hardest": float((each.max() / each.sum()).detach()),
            **{f"weight_of_class_{c}": share for c, share in enumerate(shares)},
            "weighed": 100 * self._weighed / steps,
            "without_weight": 100 * self._without / steps,
        }
        self._weights.zero_()
        self._steps, self._without, self._weighed = 0, 0, 0.0
        return point

    def state_dict(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        counts = (self._steps, self._without, self._weighed)
        return {"weights": self._weights.clone(), "counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._weights.copy_(state["weights"])
        self._steps, self._without, self._weighed = state["counts"]
