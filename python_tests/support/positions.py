"""Models with a loss for each position, and what plain autograd says of their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import reference
from support.models import CLASSES, cross_entropy

VOCABULARY, LENGTH = 7, 4
PADDING = 0


class Language(nn.Module):
    """A tiny causal language model with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=torch.float64)
        h = self.block(self.embedding(x), mask, is_causal=True)
        return h @ self.embedding.weight.T


class Recurrent(nn.Module):
    """An LSTM over words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


def _segmentation() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, CLASSES, 1)
    )


def words(n: int) -> tuple[Tensor, Tensor]:
    """Texts of several lengths, padded, and what follows each word."""
    words = torch.randint(1, VOCABULARY, (n, LENGTH + 1))
    for i in range(n):
        words[i, 2 + i % LENGTH :] = PADDING
    return words[:, :-1], words[:, 1:]


def _images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 3, 4, dtype=torch.float64), torch.randint(CLASSES, (n, 3, 4))


def next_word(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss for each position."""
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")


def masked(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and which positions are no padding."""
    return next_word(outputs, targets), targets != PADDING


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], Any]] = {
    "language": (Language, words, next_word),
    "masked": (Language, words, masked),
    "recurrent": (Recurrent, words, masked),
    "segmentation": (_segmentation, _images, cross_entropy),
}
"""Model, batch of n, and a loss of each position."""


def _split(found: Any) -> tuple[Tensor, Tensor]:
    """Losses, those that do not count being zero, and the mask."""
    losses, mask = found if isinstance(found, tuple) else (found, torch.ones_like(found) > 0)
    return losses.where(mask, 0.0), mask


def expected_of(
    model: nn.Module,
    loss_fn: Any,
    batch: Any,
    clean: Any,
    weigh: Callable[[Tensor], Tensor] = reference.weights_from_scores,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Scores by one plain backward for each position, weights and the weighted gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, mask = _split(loss_fn(model(clean[0]), clean[1]))
    v = torch.autograd.grad(losses.sum() / mask.sum(), parameters)
    losses, mask = _split(loss_fn(model(batch[0]), batch[1]))
    scores = torch.zeros_like(losses)
    for place in mask.nonzero().tolist():
        g = torch.autograd.grad(losses[tuple(place)], parameters, retain_graph=True)
        scores[tuple(place)] = sum((a * b).sum() for a, b in zip(g, v, strict=True))
    weights = torch.zeros_like(losses)
    weights[mask] = weigh(scores[mask])
    gradients = torch.autograd.grad((weights * losses).sum(), parameters)
    return scores.detach(), weights.detach(), list(gradients)
