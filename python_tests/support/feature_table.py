"""Features of models and what each engine makes of them.

Every row is a small model with its batches. ``engines/test_feature_table.py`` proves every cell in
float64 against the oracle; ``PYTHONPATH=python_tests python -m support.feature_table
docs/coverage.md`` writes the table of the documentation.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from support.models import CLASSES, ENGINES, cross_entropy, model_of, token_loss

Batch = tuple[Any, Any]
Made = tuple[nn.Module, Batch, Batch]

COMMAND = "PYTHONPATH=python_tests python -m support.feature_table docs/coverage.md"
"""What writes the table of the documentation anew."""


@dataclass(frozen=True)
class Refusal:
    """An engine says that it does not do this, in a message that ``match`` finds."""

    match: str
    reason: str
    """A few words for the table."""
    error: type[Exception] | None = None
    """None for NotExactError."""


Verdict = Refusal | None
"""None where the engine is exact."""


@dataclass(frozen=True)
class Feature:
    """One row."""

    group: str
    name: str
    make: Callable[[], Made]
    loss: Callable[[Any, Any], Tensor] = cross_entropy
    layerwise: Verdict = None
    forward: Verdict = None
    double_backward: Verdict = None
    copied: bool = True
    """Whether the model can be copied; where not, the oracle runs on the model itself."""
    copied_again: bool = True
    """Whether it still can after a forward, as a second step of the test needs it."""

    def verdict(self, engine: str) -> Verdict:
        """What the named engine makes of it."""
        found: Verdict = getattr(self, engine)
        return found

    @property
    def auto(self) -> str | None:
        """The engine that ``engine="auto"`` takes; None if all refuse."""
        return next((e for e in ENGINES if self.verdict(e) is None), None)


def _no_rule(operation: str) -> Refusal:
    return Refusal(f"goes into {operation}, which has no layer-wise rule", "no rule")


_MIXES = Refusal("mixes examples", "examples reach each other")
_BATCH_NORM = Refusal("BatchNorm in train mode couples", "examples reach each other")
_NO_MAXIMA = Refusal("embedding_bag of maxima has no forward-mode", "no forward mode in torch")
_NO_FORWARD_MODE = Refusal(
    "the forward engine fails where plain training does not", "no forward mode in torch"
)
_CHANGED = Refusal("was changed during the forward", "changed in the forward")
_FUNC = Refusal("inside a torch.func transform", "inside a `torch.func` transform")


def _no_second(operation: str) -> Refusal:
    return Refusal(
        f"derivative for .*{operation}.* is not implemented",
        "no second derivative in torch",
    )


FEATURES: list[Feature] = []


def feature(group: str, name: str, **expected: Any) -> Callable[[Callable[[], Made]], Any]:
    """Add a row made by the decorated function."""

    def add(make: Callable[[], Made]) -> Callable[[], Made]:
        FEATURES.append(Feature(group, name, make, **expected))
        return make

    return add


# Batches.


def classes(n: int) -> Tensor:
    """Random classes."""
    return torch.randint(CLASSES, (n,))


def numbers(n: int, *shape: int) -> Tensor:
    """(n, *shape) in float64."""
    return torch.randn(n, *shape, dtype=torch.float64)


def batches(*shape: int, clean: tuple[int, ...] | None = None) -> tuple[Batch, Batch]:
    """Five training and three clean examples of the shape."""
    clean = shape if clean is None else clean
    return (numbers(5, *shape), classes(5)), (numbers(3, *clean), classes(3))


def tokens(length: int = 6, clean_length: int | None = None) -> tuple[Batch, Batch]:
    """Sequences of token indices; the next token is the target."""
    index = torch.randint(9, (5, length + 1))
    clean = torch.randint(9, (3, (clean_length or length) + 1))
    return (index[:, :-1], index[:, 1:]), (clean[:, :-1], clean[:, 1:])


def pooled(layer: nn.Module, channels: int, *shape: int, **options: Any) -> Made:
    """A layer on (N, C, *s) with a linear head on channel means."""
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.layer(x)).flatten(2).mean(2)),
        layer=layer,
        head=nn.Linear(channels, CLASSES),
    )
    return model, *batches(*shape, **options)


def on_sequences(layer: nn.Module, width: int, *shape: int, **options: Any) -> Made:
    """A layer on (N, T, d) with a linear head on position means."""
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.layer(x)).mean(1)),
        layer=layer,
        head=nn.Linear(width, CLASSES),
    )
    return model, *batches(*shape, **options)


def stacked(*layers: nn.Module, shape: tuple[int, ...] = (5,)) -> Made:
    """Layers one after the other, on vectors unless told."""
    return nn.Sequential(*layers).double(), *batches(*shape)


# Layers.


@feature("layers", "fully connected")
def _() -> Made:
    return stacked(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES))


@feature("layers", "fully connected on sequences, clean batch of another length")
def _() -> Made:
    return on_sequences(nn.Linear(5, 6), 6, 4, 5, clean=(3, 5))


_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def _convolutions(kinds: dict[int, Any], name: str, side: int, **options: Any) -> None:
    def model(spatial: int) -> Made:
        layer = kinds[spatial](4, 8, 3, **options)
        return pooled(layer, 8, 4, *[side] * spatial)

    for spatial in (1, 2, 3):
        feature("convolutions", f"{name}, {spatial}-D")(lambda spatial=spatial: model(spatial))


_convolutions(_CONVOLUTIONS, "strided, padded", 5, stride=2, padding=1)
_convolutions(_CONVOLUTIONS, "depthwise", 4, groups=4)
_convolutions(_CONVOLUTIONS, "grouped, dilated", 5, groups=2, dilation=2)
_convolutions(_CONVOLUTIONS, "`same`, dilated", 4, padding="same", dilation=2)
_convolutions(_CONVOLUTIONS, "circular", 4, padding=1, padding_mode="circular")
_convolutions(_CONVOLUTIONS, "reflecting", 4, padding=1, padding_mode="reflect")
_convolutions(_CONVOLUTIONS, "replicating", 4, padding=1, padding_mode="replicate")
_convolutions(_TRANSPOSED, "transposed", 3, stride=2, output_padding=1, groups=2)


@feature("layers", "`Bilinear`")
def _() -> Made:
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.pair(x, torch.cos(x)))),
        pair=nn.Bilinear(5, 5, 6),
        head=nn.Linear(6, CLASSES),
    )
    return model, *batches(5)


@feature("layers", "`PReLU` with a slope for each channel")
def _() -> Made:
    return pooled(nn.Sequential(nn.Conv2d(4, 6, 2), nn.PReLU(6)), 6, 4, 4, 4)


@feature("layers", "`Embedding` with a padding index", loss=token_loss)
def _() -> Made:
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.embedding(x))),
        embedding=nn.Embedding(9, 6, padding_idx=0),
        head=nn.Linear(6, 9),
    )
    return model, *tokens()


def _bag(how: str) -> Made:
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.bag(x))),
        bag=nn.EmbeddingBag(9, 6, mode=how, padding_idx=0),
        head=nn.Linear(6, CLASSES),
    )
    index, clean = torch.randint(9, (5, 6)), torch.randint(9, (3, 6))
    return model, (index, classes(5)), (clean, classes(3))


for _how in ("sum", "mean", "max"):
    feature(
        "layers",
        f"`EmbeddingBag`, {_how}",
        double_backward=_no_second("embedding_bag"),
        forward=_NO_MAXIMA if _how == "max" else None,
    )(lambda how=_how: _bag(how))


@feature(
    "layers",
    "`EmbeddingBag` with offsets",
    layerwise=_no_rule("embedding_bag with offsets"),
    double_backward=_no_second("embedding_bag"),
)
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        offsets = torch.arange(x.shape[0]) * x.shape[1]
        return model.head(torch.tanh(model.bag(x.flatten(), offsets)))

    model = model_of(forward, bag=nn.EmbeddingBag(9, 6), head=nn.Linear(6, CLASSES))
    index, clean = torch.randint(9, (5, 6)), torch.randint(9, (3, 6))
    return model, (index, classes(5)), (clean, classes(3))


@feature("layers", "`einsum`, weights on the left, a matrix for each head")
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        x = torch.einsum("btd,hdk->bhtk", x, model.split)
        x = torch.tanh(x @ model.mix)
        return model.head(torch.tanh(model.left @ x.flatten(1, 2)).flatten(1))

    model = model_of(
        forward,
        split=torch.randn(2, 5, 3),
        mix=torch.randn(2, 3, 4),
        left=torch.randn(2, 8),
        head=nn.Linear(8, CLASSES),
    )
    return model, *batches(4, 5)


# Normalisation.


@feature("normalisation", "`LayerNorm`, `RMSNorm`")
def _() -> Made:
    return on_sequences(nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 6), nn.RMSNorm(6)), 6, 4, 5)


@feature("normalisation", "`GroupNorm`, `InstanceNorm`")
def _() -> Made:
    norms = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
    return pooled(nn.Sequential(nn.Conv2d(4, 8, 2), *norms), 8, 4, 4, 4)


@feature("normalisation", "`BatchNorm` in eval mode")
def _() -> Made:
    return pooled(nn.Sequential(nn.Conv2d(4, 8, 2), nn.BatchNorm2d(8).eval()), 8, 4, 4, 4)


@feature("normalisation", "`BatchNorm` in train mode", layerwise=_BATCH_NORM)
def _() -> Made:
    return pooled(nn.Sequential(nn.Conv2d(4, 8, 2), nn.BatchNorm2d(8)), 8, 4, 4, 4)


@feature(
    "normalisation", "`BatchNorm` in train mode without running statistics", layerwise=_BATCH_NORM
)
def _() -> Made:
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    return stacked(nn.Linear(5, 8), norm, nn.Tanh(), nn.Linear(8, CLASSES))


# Recurrent networks.


class _Recurrent(nn.Module):
    """Reads all outputs of a recurrent layer."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.layer(x)
        return self.head(torch.tanh(out).mean(1))


def _recurrent(kind: Any, width: int = 6, **options: Any) -> Made:
    layer = kind(5, 6, batch_first=True, **options)
    return _Recurrent(layer, width).double(), *batches(4, 5, clean=(3, 5))


feature("recurrent networks", "`LSTM`")(lambda: _recurrent(nn.LSTM))
feature("recurrent networks", "`LSTM`, two layers, two directions")(
    lambda: _recurrent(nn.LSTM, 12, num_layers=2, bidirectional=True)
)
feature("recurrent networks", "`GRU`, two layers, two directions")(
    lambda: _recurrent(nn.GRU, 12, num_layers=2, bidirectional=True)
)
feature("recurrent networks", "`RNN` with tanh or ReLU")(
    lambda: _recurrent(nn.RNN, nonlinearity="relu")
)
feature("recurrent networks", "`LSTM` with projected states", layerwise=_no_rule("lstm"))(
    lambda: _recurrent(nn.LSTM, 3, proj_size=3)
)


@feature("recurrent networks", "a packed sequence", layerwise=_no_rule("gru of a packed sequence"))
def _() -> Made:
    def forward(model: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return model.head(model.layer(packed)[1][0])

    model = model_of(forward, layer=nn.GRU(5, 6), head=nn.Linear(6, CLASSES))
    batch = (numbers(5, 4, 5), torch.tensor([2, 4, 1, 3, 4])), classes(5)
    return model, batch, ((numbers(3, 4, 5), torch.tensor([3, 1, 4])), classes(3))


@feature("recurrent networks", "cells in a loop")
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = model.cell(x[:, t], state)
        return model.head(state[0])

    model = model_of(forward, cell=nn.LSTMCell(5, 6), head=nn.Linear(6, CLASSES))
    return model, *batches(4, 5)


@feature("recurrent networks", "a trained initial state")
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        _, last = model.layer(x, model.state.expand(-1, x.shape[0], -1))
        return model.head(last[0])

    layer = nn.GRU(5, 6, batch_first=True)
    model = model_of(forward, layer=layer, state=torch.randn(1, 1, 6), head=nn.Linear(6, CLASSES))
    return model, *batches(4, 5)


# Attention.


@feature("attention", "`MultiheadAttention`")
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.head(model.attention(x, x, x)[0].mean(1))

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = model_of(forward, attention=attention, head=nn.Linear(8, CLASSES))
    return model, *batches(4, 8)


def _attention(backend: SDPBackend) -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        q, k, v = model.project(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return model.head(out.transpose(1, 2).flatten(2).mean(1))

    model = model_of(forward, project=nn.Linear(8, 24), head=nn.Linear(8, CLASSES))
    return model, *batches(4, 8)


feature("attention", "`scaled_dot_product_attention`, math kernel")(
    lambda: _attention(SDPBackend.MATH)
)
feature(
    "attention",
    "`scaled_dot_product_attention`, flash kernel",
    double_backward=_no_second("flash_attention"),
)(lambda: _attention(SDPBackend.FLASH_ATTENTION))


def _encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@feature("attention", "transformer encoder")
def _() -> Made:
    return on_sequences(_encoder(batch_first=True), 8, 4, 8)


@feature("attention", "transformer encoder, positions before examples: (T, N, E)")
def _() -> Made:
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.encoder(x)).mean(0)),
        encoder=_encoder(),
        head=nn.Linear(8, CLASSES),
    )
    inputs = torch.randn(4, 5, 8, dtype=torch.float64), torch.randn(4, 3, 8, dtype=torch.float64)
    return model, (inputs[0], classes(5)), (inputs[1], classes(3))


# Whole models.


class _Block(nn.Module):
    """Pre-norm attention and an MLP."""

    def __init__(self, width: int, norm: Any, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.projection(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class _GPT(nn.Module):
    """Tied embedding and head, RMSNorm, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.position = nn.Parameter(torch.randn(6, 8))
        self.blocks = nn.Sequential(*[_Block(8, nn.RMSNorm, causal=True) for _ in range(2)])
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.embedding(index) + self.position[: index.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@feature(
    "models", "GPT: tied embedding and head, `RMSNorm`, losses of tokens summed", loss=token_loss
)
def _() -> Made:
    return _GPT().double(), *tokens(6, 4)


class _ViT(nn.Module):
    """Patches by a convolution, class token, position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.Sequential(*[_Block(8, nn.LayerNorm, causal=False) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


@feature("models", "ViT: class token, position embedding")
def _() -> Made:
    return _ViT().double(), *batches(3, 4, 4)


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions; with ``widens`` a strided 1x1 convolution as shortcut."""

    def __init__(self, c_in: int, c_out: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        stride = 2 if c_out > c_in else 1
        self.first = nn.Sequential(norm(c_in), nn.ReLU())
        self.second = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
            norm(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
        )
        shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_out > c_in else nn.Identity()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.shortcut(z) + self.second(z)


def _resnet(norm: Callable[[int], nn.Module], widths: tuple[int, ...], depth: int) -> Made:
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False)]
    c_in = widths[0]
    for width in widths:
        for _ in range(depth):
            layers.append(_ResidualBlock(c_in, width, norm))
            c_in = width
    layers += [norm(c_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(c_in, CLASSES)).double()
    batch = numbers(8, 3, 8, 8), classes(8)
    return model, batch, (numbers(6, 3, 8, 8), classes(6))


feature("models", "ResNet with `GroupNorm`")(
    lambda: _resnet(lambda c: nn.GroupNorm(2, c), (4, 8), 2)
)
feature("models", "ResNet with `BatchNorm` in train mode", layerwise=_BATCH_NORM)(
    lambda: _resnet(nn.BatchNorm2d, (4, 8), 2)
)
feature("models", "wide ResNet with `BatchNorm` in train mode", layerwise=_BATCH_NORM)(
    lambda: _resnet(nn.BatchNorm2d, (8, 16, 32), 1)
)


# Weights that are computed.


def _wrapped(wrap: Callable[[nn.Module], nn.Module]) -> Made:
    return stacked(wrap(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, CLASSES))


def _old_weight_norm(module: nn.Module) -> nn.Module:
    """The hook that came before parametrizations; a copy of such a module needs a fresh weight."""
    return torch.nn.utils.weight_norm(module)


class _Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


def _pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", 0.4)


feature("weights that are computed", "`weight_norm`")(
    lambda: _wrapped(parametrizations.weight_norm)
)
feature("weights that are computed", "`weight_norm` by the older hook", copied=False)(
    lambda: _wrapped(_old_weight_norm)
)
feature("weights that are computed", "`spectral_norm` in train mode")(
    lambda: _wrapped(parametrizations.spectral_norm)
)
feature(
    "weights that are computed",
    "`spectral_norm` by the older hook, in train mode",
    copied_again=False,
)(lambda: _wrapped(torch.nn.utils.spectral_norm))
feature("weights that are computed", "`orthogonal`")(lambda: _wrapped(parametrizations.orthogonal))


@feature("weights that are computed", "a parametrization of one's own")
def _() -> Made:
    first = nn.Linear(5, 5)
    parametrize.register_parametrization(first, "weight", _Symmetric())
    return stacked(first, nn.Tanh(), nn.Linear(5, CLASSES))


feature("weights that are computed", "pruned weights", copied=False)(lambda: _wrapped(_pruned))


@feature(
    "weights that are computed",
    "a mask that is no buffer",
    layerwise=Refusal("mixes examples", "the mask counts as data"),
)
def _() -> Made:
    mask = torch.rand(6, 5).gt(0.3).double()
    model = model_of(
        lambda s, x: s.head(torch.tanh(F.linear(x, s.w * mask))),
        w=torch.randn(6, 5),
        head=nn.Linear(6, CLASSES),
    )
    return model, *batches(5)


def _low_rank(forward: Callable[[Any, Tensor], Tensor]) -> Made:
    model = model_of(
        forward,
        base=nn.Linear(5, 6),
        a=torch.randn(2, 5),
        b=torch.randn(6, 2),
        head=nn.Linear(6, CLASSES),
    )
    model.base.requires_grad_(False)
    return model, *batches(5)


feature("weights that are computed", "low-rank parts beside a frozen base")(
    lambda: _low_rank(lambda s, x: s.head(torch.tanh(s.base(x) + x @ s.a.T @ s.b.T)))
)
feature("weights that are computed", "low-rank parts merged into a frozen base")(
    lambda: _low_rank(
        lambda s, x: s.head(torch.tanh(F.linear(x, s.base.weight + s.b @ s.a, s.base.bias)))
    )
)


@feature("weights that are computed", "weights made from the input (a hypernetwork)")
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        w = model.hyper(x).unflatten(1, (CLASSES, 5))
        return (w @ x.unsqueeze(-1)).squeeze(-1)

    return model_of(forward, hyper=nn.Linear(5, 5 * CLASSES)), *batches(5)


# How parameters are held and used.


@feature("parameters", "a module called twice")
def _() -> Made:
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.inner(torch.tanh(s.inner(x))))),
        inner=nn.Linear(5, 5),
        head=nn.Linear(5, CLASSES),
    )
    return model, *batches(5)


@feature("parameters", "used directly: scale, shift, power, weighted sum")
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        x = torch.sigmoid(x * model.scale + model.shift) ** model.power.exp()
        return model.head(x + model.gate.sigmoid() * torch.sin(x))

    parts = {"scale": (5,), "shift": (5,), "power": (1,), "gate": ()}
    made = {name: torch.randn(shape) for name, shape in parts.items()}
    return model_of(forward, **made, head=nn.Linear(5, CLASSES)), *batches(5)


class _Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(5, 5) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": torch.randn(5)})
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for w in self.weights:
            x = torch.tanh(x @ w + self.named["shift"])
        return self.head(x)


feature("parameters", "`ParameterList`, `ParameterDict`")(lambda: (_Lists().double(), *batches(5)))


@feature("parameters", "`Lazy` modules after their first forward")
def _() -> Made:
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(CLASSES)).double()
    batch, clean = batches(5)
    model(batch[0])
    return model, batch, clean


@feature("parameters", "frozen layers below, between and above")
def _() -> Made:
    layers = [nn.Linear(5, 5) for _ in range(4)]
    for i in (0, 2):
        layers[i].requires_grad_(False)
    return stacked(*[part for x in layers for part in (x, nn.Tanh())], nn.Linear(5, CLASSES))


# Inputs and outputs.


@feature("inputs and outputs", "a tuple in, a dict out", loss=lambda o, y: cross_entropy(o["y"], y))
def _() -> Made:
    model = model_of(
        lambda s, a, b: {"y": s.head(torch.tanh(s.a(a) + s.b(b))), "hidden": [a, b]},
        a=nn.Linear(5, 6),
        b=nn.Linear(4, 6),
        head=nn.Linear(6, CLASSES),
    )
    batch = (numbers(5, 5), numbers(5, 4)), classes(5)
    return model, batch, ((numbers(3, 5), numbers(3, 4)), classes(3))


@feature("inputs and outputs", "a dict in, a tuple out", loss=lambda o, y: cross_entropy(o[0], y))
def _() -> Made:
    model = model_of(
        lambda s, a, scale: (s.head(torch.tanh(s.a(a) * scale)), None),
        a=nn.Linear(5, 6),
        head=nn.Linear(6, CLASSES),
    )
    batch = {"a": numbers(5, 5), "scale": numbers(5, 1)}, classes(5)
    return model, batch, ({"a": numbers(3, 5), "scale": numbers(3, 1)}, classes(3))


@feature(
    "inputs and outputs",
    "all rows of several graphs in one tensor, a target for each graph",
    layerwise=_MIXES,
)
def _() -> Made:
    def forward(model: Any, x: Tensor, graph: Tensor, count: Tensor) -> Tensor:
        nodes = torch.tanh(model.a(x))
        return model.head(nodes.new_zeros(len(count), 6).index_add(0, graph, nodes))

    def graphs(*rows: int) -> Batch:
        count = torch.tensor(rows)
        graph = torch.arange(len(rows)).repeat_interleave(count)
        return (numbers(sum(rows), 5), graph, count), classes(len(rows))

    model = model_of(forward, a=nn.Linear(5, 6), head=nn.Linear(6, CLASSES))
    return model, graphs(3, 1, 4, 2, 3), graphs(2, 5, 1)


def _of_boxes(outputs: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    pairs = zip(outputs, targets, strict=True)
    return torch.stack([(o - target["boxes"]).square().sum() for o, target in pairs])


@feature("inputs and outputs", "targets as a list of dicts", loss=_of_boxes)
def _() -> Made:
    def boxes(*counts: int) -> Batch:
        return numbers(len(counts), 5), [{"boxes": numbers(k, CLASSES)} for k in counts]

    model, *_ = stacked(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    return model, boxes(2, 0, 1, 3, 1), boxes(0, 2, 1)


class _ModelOutput(OrderedDict[str, Any]):
    """Reads like an object and like a dict, as outputs of some libraries do."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass
class _Outputs:
    logits: Tensor
    hidden: Tensor


def _object(make: Callable[..., Any]) -> Made:
    def forward(model: Any, x: Tensor) -> Any:
        hidden = torch.tanh(model.inner(x))
        return make(logits=model.head(hidden), hidden=hidden)

    model = model_of(forward, inner=nn.Linear(5, 6), head=nn.Linear(6, CLASSES))
    return model, *batches(5)


feature(
    "inputs and outputs",
    "an ordered dict with attributes out",
    loss=lambda o, y: cross_entropy(o.logits, y),
)(lambda: _object(_ModelOutput))
feature("inputs and outputs", "a dataclass out", loss=lambda o, y: cross_entropy(o.logits, y))(
    lambda: _object(_Outputs)
)


@feature("inputs and outputs", "a mask that both batches share")
def _() -> Made:
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)

    def forward(model: Any, x: Tensor, mask: Tensor) -> Tensor:
        return model.head(model.attention(x, x, x, attn_mask=mask)[0].mean(1))

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = model_of(forward, attention=attention, head=nn.Linear(8, CLASSES))
    return model, ((numbers(5, 4, 8), mask), classes(5)), ((numbers(3, 4, 8), mask), classes(3))


# What may stand in the way.


@feature("obstacles", "checkpoint, not reentrant")
def _() -> Made:
    model = model_of(
        lambda s, x: s.head(checkpoint(s.inner, x, use_reentrant=False)),
        inner=nn.Sequential(nn.Linear(5, 6), nn.Tanh()),
        head=nn.Linear(6, CLASSES),
    )
    return model, *batches(5)


@feature(
    "obstacles",
    "a scripted module",
    layerwise=Refusal("no torch function is seen", "operations are hidden"),
    forward=Refusal("hides how it depends on the parameters", "operations are hidden"),
    copied=False,
)
def _() -> Made:
    inner = torch.jit.script(nn.Sequential(nn.Linear(5, 6), nn.Tanh()).double())
    return nn.Sequential(inner, nn.Linear(6, CLASSES).double()), *batches(5)


@feature("obstacles", "an operation without a rule", layerwise=_no_rule("cosine_similarity"))
def _() -> Made:
    model = model_of(
        lambda s, x: s.head(F.cosine_similarity(x.unsqueeze(1), s.prototypes, dim=-1)),
        prototypes=torch.randn(6, 5),
        head=nn.Linear(6, CLASSES),
    )
    return model, *batches(5)


@feature(
    "obstacles",
    "sparse features",
    layerwise=_no_rule("mm"),
    forward=Refusal(
        "the forward engine fails where plain training does not", "no forward mode in torch"
    ),
)
def _() -> Made:
    model = model_of(
        lambda s, x: s.head(torch.tanh(torch.mm(x.to_sparse(), s.w))),
        w=torch.randn(5, 6),
        head=nn.Linear(6, CLASSES),
    )
    return model, *batches(5)


@feature(
    "obstacles",
    "sparse inputs",
    layerwise=_no_rule("mm"),
    forward=Refusal(
        "the forward engine fails where plain training does not", "no forward mode in torch"
    ),
)
def _() -> Made:
    model = model_of(lambda s, x: torch.mm(x, s.w), w=torch.randn(5, CLASSES))
    (x, y), (x_clean, y_clean) = batches(5)
    return model, (x.to_sparse(), y), (x_clean.to_sparse(), y_clean)


@feature(
    "obstacles",
    "a loop over the examples",
    layerwise=Refusal("order of the examples", "no use sees the whole batch"),
)
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        return torch.stack([model.head(torch.tanh(model.inner(one))) for one in x])

    return model_of(forward, inner=nn.Linear(5, 6), head=nn.Linear(6, CLASSES)), *batches(5)


@feature("obstacles", "a complex parameter", layerwise=_no_rule("mul"))
def _() -> Made:
    model = model_of(
        lambda s, x: s.head(
            torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(s.filter), n=5)
        ),
        filter=torch.randn(3, 2),
        head=nn.Linear(5, CLASSES),
    )
    return model, *batches(5)


class _Squash(torch.autograd.Function):
    """An activation with a backward alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class _Times(torch.autograd.Function):
    """A product with a backward alone, of data with a parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


@feature(
    "obstacles",
    "a custom activation without forward mode",
    forward=Refusal("the jvp function", "no forward mode"),
)
def _() -> Made:
    model = model_of(
        lambda s, x: s.head(_Squash.apply(s.inner(x))),
        inner=nn.Linear(5, 6),
        head=nn.Linear(6, CLASSES),
    )
    return model, *batches(5)


@feature(
    "obstacles",
    "a custom product with a parameter, without forward mode",
    layerwise=_no_rule("matmul"),
    forward=Refusal("hides how it depends on the parameters", "operations are hidden"),
)
def _() -> Made:
    model = model_of(lambda s, x: _Times.apply(torch.tanh(x), s.w), w=torch.randn(CLASSES, 5))
    return model, *batches(5)


@feature("obstacles", "`vmap` in the forward", layerwise=_FUNC, forward=_FUNC)
def _() -> Made:
    model = model_of(
        lambda s, x: torch.vmap(s.inner)(x), inner=nn.Sequential(nn.Linear(5, CLASSES))
    )
    return model, *batches(5)


@feature(
    "obstacles",
    "a parameter changed in place by the data",
    layerwise=_no_rule("add_"),
    forward=_CHANGED,
)
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            model.w.add_(x.mean())
        return F.linear(x, model.w)

    return model_of(forward, w=torch.randn(CLASSES, 5)), *batches(5)


@feature(
    "obstacles",
    "a derived weight changed in place after its use",
    layerwise=Refusal("was changed in place after", "changed after its use"),
)
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        w = model.w * 1
        x = x + w
        w.mul_(2)
        return model.head(x)

    return model_of(forward, w=torch.randn(5), head=nn.Linear(5, CLASSES)), *batches(5)


@feature(
    "obstacles",
    "`Embedding` with `max_norm`, which writes to its weight",
    layerwise=_no_rule("embedding"),
    forward=_CHANGED,
    loss=token_loss,
)
def _() -> Made:
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.embedding(x))),
        embedding=nn.Embedding(9, 6, max_norm=1.0),
        head=nn.Linear(6, 9),
    )
    return model, *tokens()


# What the forward or the loss keeps.


class _Momentum(nn.Module):
    """An encoder, and a frozen one that follows it in each forward, in the way that is named."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.query = nn.Linear(5, 4)
        self.key = nn.Linear(5, 4).requires_grad_(False)
        self.head = nn.Linear(4, CLASSES)

    @torch.no_grad()
    def _follow(self) -> None:
        for name, q in self.query.named_parameters():
            k = self.key.get_parameter(name)
            if self.how == "in place":
                k.mul_(0.9).add_(q, alpha=0.1)
            elif self.how == "aliased":
                k.data.mul_(0.9).add_(q.data, alpha=0.1)
            elif self.how == "data":
                k.data = k.data * 0.9 + q.data * 0.1
            else:
                setattr(self.key, name, nn.Parameter(k * 0.9 + q * 0.1, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        self._follow()
        return self.head(self.query(x) * torch.tanh(self.key(x)))


@feature("state", "a frozen encoder that follows another, written in place")
def _() -> Made:
    return _Momentum("in place").double(), *batches(5)


@feature("state", "the same, written in place through `.data`")
def _() -> Made:
    return _Momentum("aliased").double(), *batches(5)


@feature("state", "the same, by another tensor for `.data`")
def _() -> Made:
    return _Momentum("data").double(), *batches(5)


@feature("state", "the same, by another parameter")
def _() -> Made:
    return _Momentum("replaced").double(), *batches(5)


@feature("state", "a weight normalised through `.data` in the forward", forward=_CHANGED)
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        model.head.weight.data = F.normalize(model.head.weight.data)
        return model.head(x)

    return model_of(forward, head=nn.Linear(5, CLASSES)), *batches(5)


@feature("state", "numbers, strings and tuples that the forward assigns")
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        model.count = getattr(model, "count", 0) + 1
        model.last = (len(x), "examples", None)
        return model.head(x) * (1 + 0.1 * model.count)

    return model_of(forward, head=nn.Linear(5, CLASSES)), *batches(5)


@feature("state", "a tensor that is an attribute, assigned")
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        model.mean = 0.9 * getattr(model, "mean", 0) + 0.1 * x.mean(0)
        return model.head(x - model.mean)

    return model_of(forward, head=nn.Linear(5, CLASSES)), *batches(5)


@feature("state", "a tensor that is an attribute, written in place")
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        model.scale.mul_(1.1)
        return model.head(x * model.scale)

    model = model_of(forward, head=nn.Linear(5, CLASSES))
    model.scale = torch.ones(5, dtype=torch.float64)
    return model, *batches(5)


@feature("state", "a buffer in the graph of the losses, written in place")
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        model.scale.mul_(1.1)
        return model.head(x) * model.scale

    model = model_of(forward, head=nn.Linear(5, CLASSES))
    model.register_buffer("scale", torch.ones(CLASSES, dtype=torch.float64))
    return model, *batches(5)


@feature("state", "a module with two names, and a parameter that is zero")
def _() -> Made:
    inner = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES))
    return model_of(lambda s, x: s.first(x), first=inner, second=inner), *batches(5)


class _Prototypes(nn.Module):
    """Losses with a trained weight, and a buffer that follows the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, CLASSES, dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.scale.lerp_(outputs.detach().abs().mean(), 0.1)
        return cross_entropy(F.linear(outputs / self.scale, self.weight), targets)


@feature("state", "a loss with a weight and a buffer", loss=_Prototypes())
def _() -> Made:
    return stacked(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))


@feature("state", "the same after batch norm", loss=_Prototypes(), layerwise=_BATCH_NORM)
def _() -> Made:
    return stacked(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


# Examples that reach each other.


@feature("coupling", "features centred over the batch: `x - x.mean(0)`", layerwise=_MIXES)
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        z = torch.tanh(model.inner(x))
        return model.head(z - z.mean(0))

    return model_of(forward, inner=nn.Linear(5, 6), head=nn.Linear(6, CLASSES)), *batches(5)


@feature("coupling", "inputs centred over the batch, so that gradients do not show it")
def _() -> Made:
    return model_of(lambda s, x: s.head(x - x.mean(0)), head=nn.Linear(5, CLASSES)), *batches(5)


def _contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each example against all others of its batch."""
    z = F.normalize(outputs, dim=1)
    alike = z @ z.t() - torch.eye(len(z), dtype=z.dtype) * 1e3
    same = (targets[:, None] == targets).to(z.dtype) - torch.eye(len(z), dtype=z.dtype)
    return -(alike.log_softmax(1) * same).sum(1) + outputs.square().sum(1)


@feature("coupling", "a contrastive loss", layerwise=_MIXES, loss=_contrastive)
def _() -> Made:
    return stacked(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))


@feature("coupling", "a recurrence over the examples (`batch_first` forgotten)", layerwise=_MIXES)
def _() -> Made:
    model = model_of(
        lambda s, x: s.head(s.layer(x)[0].mean(1)),
        layer=nn.LSTM(5, 6),
        head=nn.Linear(6, CLASSES),
    )
    return model, *batches(4, 5)


@feature("coupling", "attention over the examples", layerwise=_MIXES)
def _() -> Made:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.head(model.attention(x, x, x)[0])

    attention = nn.MultiheadAttention(8, 2)
    return model_of(forward, attention=attention, head=nn.Linear(8, CLASSES)), *batches(8)


# The table.

_HEAD = ["model feature", *(f"`{engine}`" for engine in ENGINES), "`auto` takes"]


def table() -> str:
    """All rows, as Markdown, one table for each group."""
    parts = []
    for group in dict.fromkeys(f.group for f in FEATURES):
        rows = [
            [
                f.name,
                *(
                    "exact" if (v := f.verdict(e)) is None else f"error: {v.reason}"
                    for e in ENGINES
                ),
                f"`{f.auto}`" if f.auto else "error",
            ]
            for f in FEATURES
            if f.group == group
        ]
        lines = [_HEAD, ["---"] * len(_HEAD), *rows]
        parts.append(
            f"## {group.capitalize()}\n\n" + "\n".join("| " + " | ".join(r) + " |" for r in lines)
        )
    return "\n\n".join(parts)


_BEGIN, _END = "<!-- coverage: begin -->\n", "<!-- coverage: end -->"


def filled(page: str) -> str:
    """A page with the table between its two comments."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{table()}\n\n{_END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text()))
