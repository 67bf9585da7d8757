"""Multiply-adds of a reweighted step over those of a plain step on the union of both batches.

The ratio is what the layer-wise products allow when everything but matrix products is free; the
measured ratio stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .cases import Case

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class LayerUse:
    """One product with a weight in a forward of one example.

    T positions, ``size`` = d_in d_out (for a convolution d_in is what one output position reads),
    and whether gradients of the layer's input and of its weight are needed.
    """

    positions: int
    d_in: int
    d_out: int
    data_gradient: bool
    trained: bool = True

    @property
    def size(self) -> int:
        return self.d_in * self.d_out


class _Recorder(TorchFunctionMode):
    """Records every product of a forward, found as calls and not as modules (tied heads count)."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[LayerUse] = []
        self.attention = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            x, weight = args[0], args[1]
            d_out, d_in = weight.shape
            positions = x.numel() // d_in
            self.uses.append(
                LayerUse(positions, d_in, d_out, x.requires_grad, weight.requires_grad)
            )
        elif func in _CONVOLUTIONS:
            x, weight = args[0], args[1]
            positions = out[0, 0].numel()
            self.uses.append(
                LayerUse(positions, weight[0].numel(), weight.size(0), x.requires_grad)
            )
        elif func is torch.lstm:
            self._lstm(*args)
        elif func is F.scaled_dot_product_attention:
            query, key = args[0], args[1]
            self.attention += 2 * query.numel() * key.size(-2)
        return out

    def _lstm(self, x: Tensor, hx: Any, parameters: Sequence[Tensor], *options: Any) -> None:
        """One layer in one direction: its input projection, then its recurrence."""
        w_input, w_hidden = parameters[:2]
        steps = x.numel() // x.size(-1)
        for weight, data_gradient in ((w_input, x.requires_grad), (w_hidden, True)):
            self.uses.append(LayerUse(steps, weight.size(1), weight.size(0), data_gradient))


def layer_uses(case: Case) -> tuple[list[LayerUse], int]:
    """The products of one example's forward, and the multiply-adds of its attention."""
    recorder = _Recorder()
    model = case.copy().model
    with recorder:
        model(case.train[0][:1])
    return recorder.uses, recorder.attention


def union_operations(case: Case) -> int:
    """Multiply-adds of forward, weight gradient and data gradient on n + m examples."""
    uses, attention = layer_uses(case)
    per_example = sum(u.positions * u.size * (1 + u.data_gradient + u.trained) for u in uses)
    return (case.spec.n + case.spec.m) * (per_example + 3 * attention)


def reweighted_operations(case: Case) -> float:
    """The fewest multiply-adds of an exact step: each layer in its cheapest form.

    Coupled models need a forward tangent instead: 5n + 3m forwards of one example.
    """
    n, m, rho = case.spec.n, case.spec.m, case.rho
    uses, attention = layer_uses(case)
    if case.spec.coupled:
        train = sum(u.positions * u.size * (3 + 2 * u.data_gradient) for u in uses)
        clean = sum(u.positions * u.size * (2 + u.data_gradient) for u in uses)
        return n * (train + 5 * attention) + m * (clean + 3 * attention)
    total: float = (n + m) * 3 * attention
    for u in uses:
        t, size = u.positions, u.size
        factored = n * t * m * t * (u.d_in + u.d_out) + rho * n * t * size
        dense = (n + m) * t * size + rho * n * t * size
        per_example = (n + m) * t * size + 2 * n * size
        total += (n + m) * t * size * (1 + u.data_gradient)
        total += min(factored, dense, per_example) if u.trained else 0
    return total


def operation_bound(case: Case) -> float:
    """The ratio that operation counts allow at the ρ of the case."""
    return reweighted_operations(case) / union_operations(case)
