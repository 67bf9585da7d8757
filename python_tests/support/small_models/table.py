"""The table of small models, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N, T, D = 6, 5, 8

Case = tuple[nn.Module, Callable[[Any, Any], Tensor], tuple[Any, Tensor]]
"""A model, a loss function, and a batch (inputs, targets)."""


class Row(NamedTuple):
    expected: str
    """The kind of verdict."""
    apart: bool
    """Whether values keep to their example."""
    make: Callable[[], Case]


CASES: dict[str, Row] = {}


def case(
    name: str, expected: str, apart: bool | None = None
) -> Callable[[Callable[[], Case]], None]:
    def add(make: Callable[[], Case]) -> None:
        CASES[name] = Row(expected, expected == "certain" if apart is None else apart, make)

    return add


class Of(nn.Module):
    """A model from modules, parameters and buffers, and a function of them and the inputs."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.run = forward

    def forward(self, *x: Any) -> Any:
        return self.run(self, *x)


def ce(o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y, reduction="none")


def tokens(o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def rows(n: int = N, d: int = D) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d), torch.randint(4, (n,))


def images(n: int = N, size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, size, size), torch.randint(4, (n,))


def sequences(n: int = N, t: int = T) -> tuple[Tensor, Tensor]:
    return torch.randn(n, t, D), torch.randint(4, (n,))


def words(n: int = N, t: int = T) -> tuple[Tensor, Tensor]:
    return torch.randint(20, (n, t)), torch.randint(4, (n,))


def head(d: int = D) -> nn.Linear:
    return nn.Linear(d, 4)


def body(**more: Any) -> dict[str, Any]:
    return {"a": nn.Linear(D, D), "f": head(), **more}
