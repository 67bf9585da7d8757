"""Models that tests compose and draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from l2rw_ext.reweighter import EngineName

CLASSES = 3

ENGINE_OPTIONS = get_args(EngineName)
"""Every value of the option ``engine``."""
ENGINES = tuple(engine for engine in ENGINE_OPTIONS if engine != "auto")
"""The engines themselves, in the order in which "auto" tries them."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Unreduced."""
    return F.cross_entropy(outputs, targets, reduction="none")


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The sum over the positions of a sequence."""
    flat = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(targets.shape).sum(1)


RECURRENT: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}

CELLS: dict[str, type[nn.RNNCellBase]] = {
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "RNN": nn.RNNCell,
}


def mlp(*, dtype: torch.dtype = torch.float64, width: int = 8) -> nn.Sequential:
    """Two linear layers on five features."""
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, CLASSES))
    return model.to(dtype)


def normed() -> nn.Sequential:
    """With batch statistics, so that examples meet."""
    layers = (nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
    return nn.Sequential(*layers).double()


def vectors(
    n: int, features: int = 5, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A batch of n vectors and classes."""
    return torch.randn(n, features, dtype=dtype), torch.randint(CLASSES, (n,))


def short_sequences(n: int) -> tuple[Tensor, Tensor]:
    """A batch of n sequences of three float64 vectors, and classes."""
    return torch.randn(n, 3, 5, dtype=torch.float64), torch.randint(CLASSES, (n,))


class Function(nn.Module):
    """A model made of a function and named submodules or parameters."""

    def __init__(self, fn: Callable[..., Any], **parts: nn.Module | Tensor | None) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self._fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._fn(self, *args, **kwargs)


def model_of(fn: Callable[..., Any], **parts: nn.Module | Tensor | None) -> Function:
    """A float64 model; ``fn(model, inputs)`` is its forward."""
    return Function(fn, **parts).double()


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Affine(nn.Module):
    """x * p + q with parameters in one of the shapes that broadcast."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.p = nn.Parameter(1 + 0.3 * torch.randn(shape))
        self.q = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.p + self.q


class Transposed(nn.Module):
    """x @ W with W the transpose of a parameter, or a half of a larger one."""

    def __init__(self, width: int, *, chunked: bool) -> None:
        super().__init__()
        self.chunked = chunked
        self.weight = nn.Parameter(torch.randn(2 * width if chunked else width, width) / width)

    def forward(self, x: Tensor) -> Tensor:
        if self.chunked:
            first, second = self.weight.chunk(2)
            return torch.tanh(x @ first) @ second.t()
        return x @ self.weight.T


class Twice(nn.Module):
    """A module called twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


class Mean(nn.Module):
    """The mean over all positions: (N, T..., d) for ``last``, else (N, d, T...)."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x
        return x.flatten(1, -2).mean(1) if self.last else x.flatten(2).mean(2)


class Tokens(nn.Module):
    """Embedding with a padding index, position embedding, class token, encoder, tied head."""

    def __init__(
        self,
        length: int,
        *,
        batch_first: bool,
        norm_first: bool,
        padding: int | None,
        tied: bool,
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.tied = tied
        self.embedding = nn.Embedding(7, 8, padding_idx=padding)
        self.position = nn.Parameter(torch.randn(1, length, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.0, batch_first=batch_first, norm_first=norm_first
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embedding(index) + self.position[:, : index.shape[1]]
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = self.layer(x) if self.batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1)
        if self.tied:
            return F.linear(x[:, 0], self.embedding.weight)[:, :CLASSES] + self.head(x[:, 0])
        return self.head(x[:, 0])


@dataclass
class Drawn:
    """A drawn model with its two batches."""

    model: nn.Module
    batch: tuple[Any, Tensor]
    clean: tuple[Any, Tensor]
    loss_fn: Callable[[Any, Any], Tensor] = cross_entropy


def _frozen(draw: st.DrawFn, model: nn.Module) -> nn.Module:
    """Some parameters frozen, never all, and never the last."""
    for p in list(model.parameters())[:-1]:
        if draw(st.integers(0, 5)) == 0:
            p.requires_grad_(False)
    return model


def _activation(draw: st.DrawFn) -> nn.Module:
    return draw(st.sampled_from([nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid]))()


@st.composite
def networks_on_vectors(draw: st.DrawFn) -> Drawn:
    """Linear layers and what goes with them, on (N, d) or (N, T, d)."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    width = draw(st.integers(1, 6))
    positions: list[int] = draw(st.lists(st.integers(1, 3), max_size=2))
    makers: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(width, width, bias=False),
        lambda: nn.Linear(width, width),
        lambda: nn.LayerNorm(width),
        lambda: nn.LayerNorm(width, bias=False),
        lambda: nn.RMSNorm(width),
        lambda: Affine(width),
        lambda: Affine(1),
        lambda: Affine(),
        lambda: Affine(*[1] * (len(positions) + 1), width),
        lambda: Residual(nn.Linear(width, width)),
        lambda: Twice(nn.Linear(width, width)),
        lambda: Transposed(width, chunked=False),
        lambda: Transposed(width, chunked=True),
        lambda: parametrizations.weight_norm(nn.Linear(width, width)),
        lambda: parametrizations.spectral_norm(nn.Linear(width, width)),
    ]
    if not positions:
        makers.append(lambda: nn.BatchNorm1d(width).eval())
    layers: list[nn.Module] = []
    for make in draw(st.lists(st.sampled_from(makers), min_size=1, max_size=4)):
        layers += [make(), _activation(draw)]
    model = nn.Sequential(*layers, Mean(last=True), nn.Linear(width, CLASSES)).double()
    n, m = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    clean_positions = positions
    if positions and draw(st.booleans()):
        clean_positions = draw(st.lists(st.integers(1, 3), min_size=1, max_size=1))
        clean_positions = clean_positions + positions[1:]

    def batch(size: int, shape: list[int]) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, *shape, width, dtype=torch.float64)
        return x, torch.randint(CLASSES, (size,))

    return Drawn(_frozen(draw, model), batch(n, positions), batch(m, clean_positions))


@st.composite
def networks_on_images(draw: st.DrawFn) -> Drawn:
    """Convolutions of every kind with normalisation layers, in one to three dimensions."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    spatial = draw(st.integers(1, 3))
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[spatial - 1]
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[spatial - 1]
    channels, layers = draw(st.sampled_from([1, 2, 4])), []
    given_channels = channels
    for _ in range(draw(st.integers(1, 2))):
        out = draw(st.sampled_from([2, 4]))
        groups = draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == out % g == 0]))
        kernel = draw(st.integers(1, 3))
        dilation = draw(st.integers(1, 2))
        padding: Any = draw(st.sampled_from(["same", "valid", 1, 2]))
        if isinstance(padding, int):
            padding = min(padding, 2)
        stride = 1 if padding == "same" else draw(st.integers(1, 2))
        mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
        layers.append(
            convolution(
                channels,
                out,
                kernel,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                bias=draw(st.booleans()),
                padding_mode=mode,
            )
        )
        channels = out
        norms: list[Callable[[], nn.Module]] = [
            nn.Identity,
            lambda: nn.GroupNorm(2, out),  # noqa: B023
            lambda: instance(out, affine=True),  # noqa: B023
            lambda: batch_norm(out).eval(),  # noqa: B023
            lambda: Affine(out, *[1] * spatial),  # noqa: B023
        ]
        layers += [draw(st.sampled_from(norms))(), _activation(draw)]
    model = nn.Sequential(*layers, Mean(last=False), nn.Linear(channels, CLASSES)).double()
    side = {1: 12, 2: 9, 3: 7}[spatial]
    clean_side = side + draw(st.sampled_from([0, 0, 1]))
    layout = draw(st.booleans())

    def batch(size: int, side: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, given_channels, *[side] * spatial, dtype=torch.float64)
        if layout and spatial == 2:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, torch.randint(CLASSES, (size,))

    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    try:
        model(batch(n, side)[0])
    except ValueError:  # torch normalises no single value
        reject()
    return Drawn(_frozen(draw, model), batch(n, side), batch(m, clean_side))


@st.composite
def networks_on_tokens(draw: st.DrawFn) -> Drawn:
    """Small transformers on token indices."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    length = draw(st.integers(1, 4))
    model = Tokens(
        length,
        batch_first=draw(st.booleans()),
        norm_first=draw(st.booleans()),
        padding=draw(st.sampled_from([None, 0, -1])),
        tied=draw(st.booleans()),
    ).double()
    clean_length = draw(st.integers(1, length))
    n, m = draw(st.integers(1, 5)), draw(st.integers(1, 5))

    def batch(size: int, length: int) -> tuple[Tensor, Tensor]:
        return torch.randint(7, (size, length)), torch.randint(CLASSES, (size,))

    return Drawn(_frozen(draw, model), batch(n, length), batch(m, clean_length))


DRAWN_NETWORKS = {
    "vectors": networks_on_vectors(),
    "images": networks_on_images(),
    "tokens": networks_on_tokens(),
}
"""Every kind of drawn network, by what it reads."""
