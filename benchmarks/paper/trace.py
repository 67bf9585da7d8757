"""What a run's weights and its clean loss do between two looks at it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .training_methods import Batch, Statistics, losses


class Trace:
    """Sums over the steps since the last look.

    Args:
        classes: how many there are.
    """

    def __init__(self, classes: int) -> None:
        self._weights = torch.zeros(classes, dtype=torch.float64)
        self._steps = self._without = 0

    def add(self, targets: Tensor, statistics: Statistics) -> None:
        """Take the weights of a step, whose examples have these targets, shape (n,)."""
        weights = statistics.weights.detach().double()
        self._weights.index_add_(0, targets.cpu(), weights.cpu())
        self._steps += 1
        self._without += not weights.any()

    def take(self, model: nn.Module, clean: Batch) -> dict[str, float]:
        """A point of the curve, after which the sums begin anew.

        Returns:
            ``clean_loss`` f and ``clean_gradient`` ‖∇f‖ at the model as it is in evaluation mode,
            for which the clean images are ``clean``; ``weight_of_class_C``, the weight that a step
            gives to the examples of a class together, mean over the steps; ``without_weight``,
            the share of steps that weigh nothing.
        """
        training = model.training
        model.eval()
        loss = losses(model(clean.inputs), clean.targets).mean()
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        model.train(training)
        steps = max(1, self._steps)
        shares = (self._weights / steps).tolist()
        point = {
            "clean_loss": float(loss.detach()),
            "clean_gradient": float(nn.utils.get_total_norm(gradient)),
            **{f"weight_of_class_{c}": share for c, share in enumerate(shares)},
            "without_weight": self._without / steps,
        }
        self._weights.zero_()
        self._steps = self._without = 0
        return point

    def state_dict(self) -> dict[str, Tensor | int]:
        """The sums, for a checkpoint."""
        return {"weights": self._weights, "steps": self._steps, "without": self._without}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Continue from :meth:`state_dict`."""
        self._weights.copy_(torch.as_tensor(state["weights"]))
        self._steps, self._without = int(state["steps"]), int(state["without"])
