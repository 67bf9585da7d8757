"""On random models of the supported parts every engine is exact or refuses, and auto is exact."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from l2rw_ext import NotExactError, Reweighter, reference
from l2rw_ext.reference import relative_error
from support.models import (
    CLASSES,
    ENGINE_OPTIONS,
    Affine,
    Residual,
    Transposed,
    Twice,
    cross_entropy,
)
from support.oracle import EXACT, assert_matches, truth

WIDTH = 4
Maker = Callable[[], nn.Module]


class _Recurrent(nn.Module):
    """The output sequence of a recurrent layer that keeps the width."""

    def __init__(
        self, kind: type[nn.RNNBase], *, both: bool, layers: int, batch_first: bool
    ) -> None:
        super().__init__()
        self.inner = kind(  # type: ignore[call-arg]
            WIDTH,
            WIDTH // 2 if both else WIDTH,
            bidirectional=both,
            num_layers=layers,
            batch_first=batch_first,
        )
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return self.inner(x)[0]
        return self.inner(x.transpose(0, 1))[0].transpose(0, 1)


class _Attention(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return x + self.inner(x, x, x, need_weights=False)[0]
        y = x.transpose(0, 1)
        return (y + self.inner(y, y, y)[0]).transpose(0, 1)


class _Over(nn.Module):
    """A layer for (N, C, T) or (N, C, H, W) on positions-last data."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(-1, 1)
        if isinstance(self.inner, nn.GroupNorm):
            x = x.contiguous()  # torch 2.13 crashes on strided input that needs no gradient
        return self.inner(x).movedim(1, -1)


class _Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, torch.tanh(x))


class _InPlace(nn.Module):
    """Writes to its activation, and to a view of it."""

    def forward(self, x: Tensor) -> Tensor:
        y = 0.5 * x
        y += torch.tanh(x)
        y[..., :1].mul_(1.5)
        return nn.functional.relu_(y + 0.1)


class _LowRank(nn.Module):
    """A frozen matrix and a trained product of two thin ones."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(WIDTH, 2) / 2)
        self.b = nn.Parameter(torch.randn(2, WIDTH) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


EVERYWHERE: list[Maker] = [
    lambda: nn.Linear(WIDTH, WIDTH),
    lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    lambda: nn.LayerNorm(WIDTH),
    lambda: nn.RMSNorm(WIDTH),
    lambda: Affine(WIDTH),
    lambda: Residual(nn.Linear(WIDTH, WIDTH)),
    lambda: Twice(nn.Linear(WIDTH, WIDTH)),
    lambda: Transposed(WIDTH, chunked=False),
    lambda: Transposed(WIDTH, chunked=True),
    lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)),
    lambda: nn.PReLU(),
    _Squared,
    _InPlace,
    _LowRank,
]
SEQUENCES: list[Maker] = [
    lambda: _Recurrent(nn.LSTM, both=False, layers=1, batch_first=True),
    lambda: _Recurrent(nn.LSTM, both=True, layers=2, batch_first=False),
    lambda: _Recurrent(nn.GRU, both=True, layers=1, batch_first=True),
    lambda: _Recurrent(nn.GRU, both=False, layers=2, batch_first=False),
    lambda: _Recurrent(nn.RNN, both=False, layers=1, batch_first=True),
    lambda: _Attention(batch_first=True),
    lambda: _Attention(batch_first=False),
    lambda: nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.0, batch_first=True),
    lambda: _Over(nn.Conv1d(WIDTH, WIDTH, 3, padding="same", padding_mode="circular")),
    lambda: _Over(nn.Conv1d(WIDTH, WIDTH, 2, padding="same", groups=WIDTH)),
    lambda: _Over(nn.BatchNorm1d(WIDTH)),
    lambda: _Over(nn.GroupNorm(2, WIDTH)),
    lambda: _Over(nn.PReLU(WIDTH)),
]
IMAGES: list[Maker] = [
    lambda: _Over(nn.Conv2d(WIDTH, WIDTH, 3, padding=1)),
    lambda: _Over(nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2, groups=2, bias=False)),
    lambda: _Over(nn.Conv2d(WIDTH, WIDTH, 2, padding="same", padding_mode="reflect")),
    lambda: _Over(nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2)),
    lambda: _Over(nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1, groups=2)),
    lambda: _Over(nn.BatchNorm2d(WIDTH)),
    lambda: _Over(nn.BatchNorm2d(WIDTH, track_running_stats=False)),
    lambda: _Over(nn.BatchNorm2d(WIDTH).eval()),
    lambda: _Over(nn.GroupNorm(2, WIDTH)),
    lambda: _Over(nn.InstanceNorm2d(WIDTH, affine=True)),
    lambda: _Over(nn.MaxPool2d(3, 1, 1)),
]
VECTORS: list[Maker] = [
    lambda: nn.BatchNorm1d(WIDTH),
    lambda: nn.BatchNorm1d(WIDTH).eval(),
]


class _Model(nn.Module):
    """Layers on (N, ..., WIDTH), from vectors, sequences, images or words, to classes."""

    def __init__(self, layers: list[nn.Module], *, words: bool, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, WIDTH) if words else None
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        if x.dim() > 2:
            x = x.flatten(1, -2).mean(1)
        if self.tied and self.embedding is not None:
            return self.head(x) + x @ self.embedding.weight[:CLASSES].t()
        return self.head(x)


@dataclass
class _Drawn:
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    clean: tuple[Tensor, Tensor]
    low_memory: bool

    @property
    def coupled(self) -> bool:
        """Whether examples share statistics."""
        norms = (nn.BatchNorm1d, nn.BatchNorm2d)
        return any(isinstance(m, norms) and m.training for m in self.model.modules())


@st.composite
def _networks(draw: st.DrawFn) -> _Drawn:
    torch.manual_seed(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["vectors", "sequences", "words", "images"]))
    makers = {
        "vectors": EVERYWHERE + VECTORS,
        "sequences": EVERYWHERE + SEQUENCES,
        "words": EVERYWHERE + SEQUENCES,
        "images": EVERYWHERE + IMAGES,
    }[kind]
    chosen = draw(st.lists(st.sampled_from(makers), min_size=1, max_size=5))
    model = _Model([make() for make in chosen], words=kind == "words", tied=draw(st.booleans()))
    model.double()
    shape: list[int] = {"vectors": [], "images": [5, 4]}.get(kind, [draw(st.integers(3, 4))])
    clean_shape = shape
    if shape and draw(st.booleans()):
        clean_shape = [shape[0] + 1, *shape[1:]]
    for p in list(model.parameters())[:-1]:
        if draw(st.integers(0, 7)) == 0:
            p.requires_grad_(False)
    n, m = draw(st.integers(3, 6)), draw(st.integers(3, 6))  # of two, batch norm leaves signs

    def batch(size: int, shape: list[int]) -> tuple[Tensor, Tensor]:
        y = torch.randint(CLASSES, (size,))
        if kind == "words":
            return torch.randint(7, (size, *shape)), y
        return torch.randn(size, *shape, WIDTH, dtype=torch.float64), y

    return _Drawn(model, batch(n, shape), batch(m, clean_shape), draw(st.booleans()))


def _tolerance(drawn: _Drawn) -> float:
    """1e-12; with batch statistics, what the oracle's own two ways agree to, if that is more."""
    if not drawn.coupled:
        return EXACT
    ways = (reference.single_gradient_scores, reference.meta_scores)
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        a, b = (
            way(copy.deepcopy(drawn.model), cross_entropy, drawn.batch, drawn.clean) for way in ways
        )
    return max(EXACT, 8 * relative_error(a, b))


@pytest.mark.filterwarnings("ignore")
def test_random_models() -> None:
    steps: Counter[str] = Counter()

    @settings(max_examples=120)
    @given(_networks())
    def check(drawn: _Drawn) -> None:
        expected = truth(drawn.model, cross_entropy, drawn.batch, drawn.clean)
        if float(expected.scores.abs().max()) < 1e-9:
            return  # a saturated loss, whose gradients are rounding
        tolerance = _tolerance(drawn)
        after = copy.deepcopy(drawn.model)
        after(drawn.batch[0])
        for engine in ENGINE_OPTIONS:
            model = copy.deepcopy(drawn.model)
            reweighter = Reweighter(
                model,
                cross_entropy,
                engine=engine,  # type: ignore[arg-type]
                low_memory=drawn.low_memory,
            )
            refusal: Any = contextlib.nullcontext()
            if engine in ("layerwise", "forward"):
                refusal = contextlib.suppress(NotExactError)
            with refusal:
                step = reweighter.backward(drawn.batch, drawn.clean)
                steps[engine] += 1
                assert_matches(step, model, expected, tolerance)
                for name, buffer in after.named_buffers():
                    found = model.get_buffer(name)
                    assert torch.allclose(found, buffer, rtol=1e-12, atol=1e-12), name

    check()
    assert all(steps[engine] for engine in ENGINE_OPTIONS), steps
