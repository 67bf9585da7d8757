"""The look-ahead step of Eq. 5 under SGD, Adam and AdamW instead of plain gradient descent.

Algorithm 1 looks one step of plain gradient descent ahead. Under another optimiser the derivative
of θ̂ in ε_i is -P ∇f_i, with P diagonal, and the clean gradient is taken at another point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Preconditioner:
    """P and the look-ahead point of an optimiser, from its present state.

    SGD (momentum μ, dampening τ, Nesterov, weight decay): P is the rate of the parameter over that
    of the first parameter, and the clean gradient is taken at the point to which the optimiser
    would go with a zero gradient.

    Adam, AdamW: P is that ratio over sqrt(v̂) + eps, where v̂ is the second moment that a zero
    gradient would leave. The dependence of v̂ on ε, and the move along the first moment, are
    neglected. Before the first step P is only the ratio.

    If all rates are zero, as at the start of a warm-up, they count as equal. A rate is negative
    under ``maximize``, so that only groups that differ in it change scores.

    Raises:
        TypeError: another optimiser.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam)):
            raise TypeError(
                "preconditioner must be a torch.optim.SGD, Adam or AdamW, got "
                f"{type(optimizer).__name__}"
            )
        self._optimizer = optimizer

    def describe(self) -> str:
        """One sentence for ``explain()``."""
        if isinstance(self._optimizer, torch.optim.SGD):
            return "preconditioner=SGD: v is taken at the point where momentum leads"
        return f"preconditioner={type(self._optimizer).__name__}: v is divided by sqrt(v̂) + eps"

    def diagonal(self, parameters: Sequence[nn.Parameter]) -> dict[int, Tensor]:
        """P by id of the parameter, in its shape or ().

        Raises:
            ValueError: the optimiser does not hold a parameter.
        """
        groups = self._groups(parameters)
        rates = {id(p): self._rate(p, groups[id(p)]) for p in parameters}
        first = next(filter(None, rates.values()), None)
        if first is None:
            rates, first = dict.fromkeys(rates, 1.0), 1.0
        adam = isinstance(self._optimizer, torch.optim.Adam)
        begun = adam and any(self._optimizer.state.get(p) for p in parameters)
        factors = {}
        for p in parameters:
            rate = torch.full((), rates[id(p)] / first, dtype=torch.float64, device=p.device)
            factors[id(p)] = rate / self._denominator(p, groups[id(p)]) if begun else rate
        return factors

    def point(self, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """The point to which SGD would go with a zero gradient; empty if that is θ itself.

        Raises:
            ValueError: the optimiser does not hold a parameter.
        """
        if not isinstance(self._optimizer, torch.optim.SGD):
            return {}
        groups = self._groups(parameters)
        point = {}
        for p in parameters:
            group = groups[id(p)]
            momentum, decay = group["momentum"], group["weight_decay"]
            buffer = self._optimizer.state.get(p, {}).get("momentum_buffer")
            if not decay and (buffer is None or not momentum):
                continue
            gradient = decay * p.detach()
            step = gradient
            if momentum:
                if buffer is not None:
                    step = buffer * momentum + (1 - group["dampening"]) * gradient
                if group["nesterov"]:
                    step = gradient + momentum * step
            point[p] = p.detach() - float(group["lr"]) * step
        return point

    def _groups(self, parameters: Sequence[nn.Parameter]) -> dict[int, dict[str, Any]]:
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        if any(id(p) not in groups for p in parameters):
            raise ValueError("preconditioner: the optimizer does not hold all trainable parameters")
        return groups

    def _rate(self, p: nn.Parameter, group: dict[str, Any]) -> float:
        """How far the optimiser moves p for a unit of gradient, but for the denominator of Adam."""
        rate = -float(group["lr"]) if group["maximize"] else float(group["lr"])
        if isinstance(self._optimizer, torch.optim.SGD) and group["momentum"]:
            begun = self._optimizer.state.get(p, {}).get("momentum_buffer") is not None
            gain = 1 - group["dampening"] if begun else 1
            rate *= 1 + group["momentum"] * gain if group["nesterov"] else gain
        elif isinstance(self._optimizer, torch.optim.Adam):
            decay = float(group["betas"][0])
            rate *= (1 - decay) / (1 - decay ** self._next_step(p))  # of the first moment
        return rate

    def _next_step(self, p: nn.Parameter) -> float:
        state = self._optimizer.state.get(p)
        return float(state["step"]) + 1 if state else 1.0

    def _denominator(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """sqrt(v̂) + eps after a step with a zero gradient."""
        state = self._optimizer.state.get(p)
        eps = float(group["eps"])
        if not state:
            return torch.full((), eps, dtype=torch.float64, device=p.device)
        decay = float(group["betas"][1])
        moment: Tensor = decay * state["exp_avg_sq"]
        if group["weight_decay"] and not group.get("decoupled_weight_decay"):
            moment = moment + (1 - decay) * (group["weight_decay"] * p.detach()).square()
        if group["amsgrad"]:
            moment = torch.maximum(state["max_exp_avg_sq"], moment)
        root: Tensor = (moment / (1 - decay ** self._next_step(p))).sqrt()
        return root + eps
