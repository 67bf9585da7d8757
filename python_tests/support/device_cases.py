"""Models with batches whose steps must run without synchronisation, and can be captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from support.models import Affine, Tokens, Twice, cross_entropy, mlp, model_of, vectors

Batch = tuple[Any, Any]


@dataclass
class Case:
    """A model, and how to draw a batch of it."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Any, Any], Tensor] = cross_entropy
    engine: str = "layerwise"
    options: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int] = (7, 4)


def _images(count: int) -> Batch:
    return torch.randn(count, 2, 6, 6, dtype=torch.float64), torch.randint(3, (count,))


def _sequences(count: int) -> Batch:
    return torch.randn(count, 5, 8, dtype=torch.float64), torch.randint(3, (count,))


def _conv_net(norm: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        norm(),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False),
        norm(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    head = nn.Linear(8, 3).double()
    return model_of(lambda m, x: m.head(m.layer(x).mean(1)), layer=layer, head=head)


def _recurrent() -> nn.Module:
    cell = nn.LSTM(8, 6, batch_first=True).double()
    head = nn.Linear(6, 3).double()
    return model_of(lambda m, x: m.head(m.cell(x)[0][:, -1]), cell=cell, head=head)


def _heads() -> nn.Module:
    return model_of(
        lambda m, x: torch.einsum("nhd,hkd->nhk", x.view(-1, 1, 5).expand(-1, 2, -1), m.weight).sum(
            1
        ),
        weight=torch.randn(2, 3, 5),
    )


def _embedded() -> nn.Module:
    table, head = nn.Embedding(9, 6, padding_idx=0).double(), nn.Linear(6, 3).double()
    return model_of(lambda m, x: m.head(m.table(x).sum(1)), table=table, head=head)


def _tokens(n: int) -> Batch:
    return torch.randint(7, (n, 4)), torch.randint(3, (n,))


def _tied() -> nn.Module:
    return Tokens(4, batch_first=False, norm_first=True, padding=0, tied=True).double()


CASES = {
    "mlp": Case(mlp, vectors),
    "mlp, equal sizes": Case(mlp, vectors, sizes=(5, 5)),
    "mlp, low memory": Case(mlp, vectors, options={"low_memory": True}),
    "group norm": Case(lambda: _conv_net(lambda: nn.GroupNorm(2, 4)), _images),
    "transformer": Case(_transformer, _sequences),
    "embedding": Case(_embedded, lambda n: (torch.randint(9, (n, 5)), torch.randint(3, (n,)))),
    "recurrent": Case(_recurrent, _sequences),
    "tied tokens": Case(_tied, _tokens),
    "broadcast": Case(lambda: nn.Sequential(Affine(5), mlp()).double(), vectors),
    "called twice": Case(
        lambda: nn.Sequential(Twice(nn.Linear(5, 5)), nn.Linear(5, 3)).double(), vectors
    ),
    "heads": Case(_heads, vectors),
    "group norm, cosines": Case(
        lambda: _conv_net(lambda: nn.GroupNorm(2, 4)), _images, options={"normalize": "example"}
    ),
    "tied tokens, cosines": Case(_tied, _tokens, options={"normalize": "example"}),
    "batch norm": Case(lambda: _conv_net(lambda: nn.BatchNorm2d(4)), _images, engine="forward"),
    "forward mlp": Case(mlp, vectors, engine="forward"),
    "double backward": Case(mlp, vectors, engine="double_backward"),
}
