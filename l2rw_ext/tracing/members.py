"""A model's parameters, buffers and modes, from one walk over its modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Members:
    """What a step needs to know of a model besides its forward.

    Every step walks the modules once, because any of them may have been exchanged, frozen or
    switched to another mode since the last step.
    """

    parameters: list[tuple[str, nn.Parameter]]
    """Name and parameter; a shared parameter is listed under its first name."""
    buffers: list[tuple[nn.Module, str, Tensor | None]]
    """Module, name in it, and buffer."""
    training: tuple[bool, ...]
    """The mode of every module."""

    @classmethod
    def of(cls, model: nn.Module) -> Members:
        """The members of ``model`` as it is now."""
        parameters: dict[int, tuple[str, nn.Parameter]] = {}
        buffers: list[tuple[nn.Module, str, Tensor | None]] = []
        training = []
        for prefix, module in model.named_modules():
            training.append(module.training)
            for name, p in module._parameters.items():
                if p is not None and id(p) not in parameters:
                    parameters[id(p)] = (f"{prefix}.{name}" if prefix else name, p)
            for name, buffer in module._buffers.items():
                buffers.append((module, name, buffer))
        return cls(list(parameters.values()), buffers, tuple(training))

    def devices(self) -> set[torch.device]:
        """Where the parameters are."""
        return {p.device for _, p in self.parameters}
