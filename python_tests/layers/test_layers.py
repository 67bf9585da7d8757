"""Each family of layers is exact in the layer-wise engine, with every option that it reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import Reweighter
from l2rw_ext.engines.layerwise import engine as layerwise
from l2rw_ext.layers.base import Use
from l2rw_ext.reference import relative_error
from l2rw_ext.tracing.interception import Interception
from l2rw_ext.tracing.members import Members
from support.models import CLASSES, Function, cross_entropy, model_of
from support.oracle import (
    EXACT,
    assert_exact,
    assert_float32_errs_little,
    assert_matches,
    truth,
)

Forward = Callable[[Any, Tensor], Tensor]


def sequences(n: int, length: int = 4, features: int = 6) -> tuple[Tensor, Tensor]:
    """(n, length, features) and classes."""
    return torch.randn(n, length, features, dtype=torch.float64), torch.randint(CLASSES, (n,))


def check(model: nn.Module, batch_of: Callable[..., Any], *other: Any) -> None:
    """Exact in one forward, in two (a clean batch of another shape), and with n = m."""
    assert_exact(model, cross_entropy, batch_of(6), batch_of(4), engine="layerwise")
    assert_exact(model, cross_entropy, batch_of(3), batch_of(3), engine="layerwise")
    if other:
        assert_exact(model, cross_entropy, batch_of(5), batch_of(3, *other), engine="layerwise")


class _Nothing:
    """A sink for forwards alone."""


def forward_under_rules(model: nn.Module, *inputs: Tensor) -> tuple[Any, list[Use]]:
    """The outputs of a forward whose operations run as their rules run them."""
    sink = _Nothing()
    interception = Interception(Members.of(model), sink)
    with interception:
        out = model(*inputs)
    return out, interception.uses


# Transposed convolutions.

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _images(spatial: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def batch(n: int, side: int = 4) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 4, *[side] * spatial, dtype=torch.float64)
        return x, torch.randint(CLASSES, (n,))

    return batch


@settings(max_examples=60)
@given(st.data())
def test_transposed_convolutions(data: st.DataObject) -> None:
    spatial = data.draw(st.integers(1, 3))
    stride, dilation = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    kernel, padding = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
    output_padding = data.draw(st.integers(0, max(stride, dilation) - 1))
    side = data.draw(st.integers(1, 4))
    assume((side - 1) * stride + dilation * (kernel - 1) + output_padding - 2 * padding >= 0)
    torch.manual_seed(0)
    conv = _TRANSPOSED[spatial - 1](
        4,
        6,
        kernel,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        groups=data.draw(st.sampled_from([1, 2])),
        bias=data.draw(st.booleans()),
        dilation=dilation,
    )
    if data.draw(st.booleans()):
        conv.weight.requires_grad_(False)
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.conv(x)).flatten(2).mean(2)),
        conv=conv,
        head=nn.Linear(6, CLASSES),
    )
    batch_of = _images(spatial)
    clean_side = side + data.draw(st.sampled_from([0, 1]))
    assert_exact(
        model, cross_entropy, batch_of(4, side), batch_of(3, clean_side), engine="layerwise"
    )


@pytest.mark.parametrize("clean_frames", [3, 2])
def test_frames_as_rows_of_a_transposed_convolution(clean_frames: int) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        frames = model.up(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return model.head(torch.tanh(frames).flatten(3).mean((1, 3)))

    def batch(n: int, frames: int = 3) -> Any:
        x = torch.randn(n, frames, 2, 3, 3, dtype=torch.float64)
        return x, torch.randint(CLASSES, (n,))

    up = nn.ConvTranspose2d(2, 4, 2, stride=2)
    model = model_of(forward, up=up, head=nn.Linear(4, CLASSES))
    check(model, batch, clean_frames)


# Recurrent layers and cells.


def _by_recurrence(model: Any, x: Tensor) -> Tensor:
    """Reads all outputs and final states."""
    layer = model.recurrent
    out, state = layer(x if layer.batch_first else x.transpose(0, 1))
    states = state if isinstance(state, tuple) else (state,)
    out = out if layer.batch_first else out.transpose(0, 1)
    last = torch.cat([torch.sin(s).transpose(0, 1).flatten(1) for s in states], 1)
    return model.head(torch.tanh(out).mean(1)) + model.last(last)


def _recurrent(kind: Any, **options: Any) -> Function:
    layer = kind(6, 5, **options)
    directions = 2 if layer.bidirectional else 1
    states = 2 if isinstance(layer, nn.LSTM) else 1
    return model_of(
        _by_recurrence,
        recurrent=layer,
        head=nn.Linear(5 * directions, CLASSES),
        last=nn.Linear(5 * directions * layer.num_layers * states, CLASSES),
    )


_RECURRENT: list[tuple[Any, dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.GRU, {}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize(("kind", "options"), _RECURRENT)
@pytest.mark.parametrize(
    ("layers", "bidirectional", "bias", "batch_first"),
    [
        (1, False, True, True),
        (2, True, True, True),
        (2, False, False, True),
        (1, True, False, True),
        (1, False, True, False),
        (2, True, True, False),
    ],
)
def test_recurrent_layers(
    kind: Any,
    options: dict[str, Any],
    layers: int,
    bidirectional: bool,
    bias: bool,
    batch_first: bool,
) -> None:
    model = _recurrent(
        kind,
        num_layers=layers,
        bidirectional=bidirectional,
        bias=bias,
        batch_first=batch_first,
        **options,
    )
    check(model, sequences, 2)


@pytest.mark.parametrize(("kind", "options"), _RECURRENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrent_layers_compute_what_torch_computes(
    kind: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    layer = kind(6, 5, num_layers=2, bidirectional=True, dropout=0.4, **options).to(dtype)
    x = torch.randn(7, 3, 6, dtype=dtype)
    torch.manual_seed(0)
    expected, expected_state = layer(x)
    torch.manual_seed(0)
    (out, state), uses = forward_under_rules(layer, x)
    assert len(uses) == 8
    bound = 32 * torch.finfo(dtype).eps
    assert relative_error(out.detach(), expected.detach()) <= bound
    if kind is not nn.LSTM:
        state, expected_state = (state,), (expected_state,)
    for found, exact in zip(state, expected_state, strict=True):
        assert found.shape == exact.shape
        assert relative_error(found.detach(), exact.detach()) <= bound


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_dropout_between_recurrent_layers_draws_the_masks_of_torch(kind: Any) -> None:
    """Two passes, the clean batch first, so that the oracle can draw the same masks."""
    model = _recurrent(kind, num_layers=2, dropout=0.5, batch_first=True)
    (x, y), clean = sequences(5), sequences(3, 2)
    parameters = list(model.parameters())
    torch.manual_seed(1)
    clean_loss = cross_entropy(model(clean[0]), clean[1]).mean()
    direction = torch.autograd.grad(clean_loss, parameters)
    expected = torch.stack(
        [
            sum(
                (g * v).sum()
                for g, v in zip(
                    torch.autograd.grad(loss, parameters, retain_graph=True), direction, strict=True
                )
            )
            for loss in cross_entropy(model(x), y)
        ]
    )
    torch.manual_seed(1)
    step = Reweighter(model, cross_entropy, engine="layerwise").backward((x, y), clean)
    assert relative_error(step.scores, expected) <= EXACT


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("given", ["data", "trained", "repeated", "made"])
def test_initial_states(kind: Any, given: str) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        def state(parameter: Tensor) -> Tensor:
            if given == "data":
                return torch.tanh(model.first(x[:, 0])).unsqueeze(0) * parameter
            if given == "trained":
                return parameter.expand(-1, x.shape[0], -1)
            if given == "repeated":
                return parameter.repeat(1, x.shape[0], 1)
            return torch.ones(1, x.shape[0], 5, dtype=x.dtype)

        h, c = state(model.h), state(model.c)
        out, _ = model.recurrent(x, (h, c) if kind is nn.LSTM else h)
        return model.head(out[:, -1])

    model = model_of(
        forward,
        recurrent=kind(6, 5, batch_first=True),
        first=nn.Linear(6, 5),
        h=torch.randn(1, 1, 5),
        c=torch.randn(1, 1, 5),
        head=nn.Linear(5, CLASSES),
    )
    check(model, sequences, 2)


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "hh", "ih"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_with_frozen_parts(kind: Any, frozen: str) -> None:
    model = _recurrent(kind, batch_first=True)
    for name, p in model.recurrent.named_parameters():
        p.requires_grad_(frozen not in name)
    check(model, sequences)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_states_of_all_layers_and_directions_from_the_data(kind: Any) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        h, c = torch.tanh(model.first(x[:, 0])).unflatten(1, (8, 5)).transpose(0, 1).chunk(2)
        out, _ = model.recurrent(x, (h, c) if kind is nn.LSTM else h)
        return model.head(out.mean(1))

    layer = kind(6, 5, num_layers=2, bidirectional=True, batch_first=True)
    model = model_of(forward, recurrent=layer, first=nn.Linear(6, 40), head=nn.Linear(10, CLASSES))
    check(model, sequences, 2)


def test_outputs_of_a_recurrent_layer_that_are_changed_in_place() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        out, _ = model.recurrent(x)
        out[:, 0].mul_(2)
        return model.head(out.sum(1))

    layer = nn.GRU(6, 5, batch_first=True)
    check(model_of(forward, recurrent=layer, head=nn.Linear(5, CLASSES)), sequences)


def test_recurrent_layer_called_twice() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        ends = [model.recurrent(part)[0][:, -1] for part in (x, x.flip(1))]
        return model.head(torch.cat(ends, 1))

    layer = nn.LSTM(6, 5, batch_first=True)
    check(model_of(forward, recurrent=layer, head=nn.Linear(10, CLASSES)), sequences, 2)


def test_recurrent_weights_that_are_derived() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        zeros = torch.zeros(1, x.shape[0], 5, dtype=x.dtype)
        weights = [model.project, model.gain * model.hidden, model.b, model.b]
        out, *_ = torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, True, False, True)
        return model.head(out[:, -1])

    model = model_of(
        forward,
        project=torch.randn(20, 6),
        gain=torch.randn(20, 1),
        hidden=torch.randn(20, 5),
        b=torch.randn(20),
        head=nn.Linear(5, CLASSES),
    )
    check(model, sequences, 3)


def test_two_directions_that_share_their_weights() -> None:
    model = _recurrent(nn.GRU, bidirectional=True, batch_first=True)
    layer = model.recurrent
    layer.weight_hh_l0_reverse = layer.weight_hh_l0
    layer._init_flat_weights()
    check(model, sequences)


_CELLS = [(nn.LSTMCell, {}), (nn.GRUCell, {}), (nn.RNNCell, {}), (nn.RNNCell, {"bias": False})]


@pytest.mark.parametrize(("kind", "options"), _CELLS)
@pytest.mark.parametrize("first_state", ["none", "zeros", "trained"])
def test_recurrent_cells(kind: Any, options: dict[str, Any], first_state: str) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        state: Any = None
        if first_state != "none":
            h = model.state.expand(x.shape[0], -1)
            h = h if first_state == "trained" else torch.zeros(x.shape[0], 5, dtype=x.dtype)
            state = (h, h) if kind is nn.LSTMCell else h
        for t in range(x.shape[1]):
            state = model.cell(x[:, t], state)
        return model.head(state[0] if kind is nn.LSTMCell else state)

    model = model_of(
        forward,
        cell=kind(6, 5, **options),
        state=torch.randn(1, 5),
        head=nn.Linear(5, CLASSES),
    )
    check(model, sequences, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layers_called_once_for_each_step(dtype: torch.dtype) -> None:
    """Uses with few rows each are put side by side."""

    def forward(model: Any, index: Tensor) -> Tensor:
        h = torch.zeros(index.shape[0], 2, 5, dtype=model.scale.dtype)
        for t in range(index.shape[1]):
            x = model.embedding(index[:, t]).unsqueeze(1)
            mixed = torch.einsum("nhd,hdk->nhk", h, model.mix)
            h = torch.tanh(model.read(x) + mixed + model.keep(h) * model.scale)
        return model.head(h.flatten(1))

    model = model_of(
        forward,
        embedding=nn.Embedding(7, 4, padding_idx=1),
        read=nn.Linear(4, 5),
        keep=nn.Linear(5, 5, bias=False),
        mix=torch.randn(2, 5, 5) / 3,
        scale=torch.randn(5),
        head=nn.Linear(10, CLASSES),
    ).to(dtype)
    tolerance = EXACT if dtype == torch.float64 else 2e-5
    for clean_length in (5, 3):
        batch, clean = _indices(6), _indices(4, clean_length)
        assert_exact(model, cross_entropy, batch, clean, engine="layerwise", tolerance=tolerance)


def test_a_bias_shared_by_frozen_matrices_of_different_width() -> None:
    model = model_of(
        lambda s, x: s.head(F.linear(torch.tanh(F.linear(x, s.first, s.bias)), s.second, s.bias)),
        first=torch.randn(4, 5),
        second=torch.randn(4, 4),
        bias=torch.randn(4),
        head=nn.Linear(4, CLASSES),
    )
    model.first.requires_grad_(False)
    model.second.requires_grad_(False)
    batch, clean = (
        (torch.randn(n, 5, dtype=torch.float64), torch.randint(CLASSES, (n,))) for n in (6, 4)
    )
    assert_exact(model, cross_entropy, batch, clean, engine="layerwise")


# Products.

_PRODUCTS: dict[str, tuple[Forward, dict[str, Any]]] = {
    "linear with a vector": (
        lambda s, x: s.head(F.linear(x, s.w, s.b).tanh()),
        {"w": (6,), "b": (), "head": 4},
    ),
    "data @ vector": (lambda s, x: s.head((x @ s.w).tanh()), {"w": (6,), "head": 4}),
    "vector @ data": (lambda s, x: s.head((s.w @ x.mT).tanh()), {"w": (6,), "head": 4}),
    "mv": (
        lambda s, x: s.head(torch.stack([torch.mv(x[:, t], s.w) for t in range(4)], 1).tanh()),
        {"w": (6,), "head": 4},
    ),
    "weight @ matrix": (
        lambda s, x: s.head((s.w @ x.mean(1).t()).tanh().t()),
        {"w": (5, 6), "head": 5},
    ),
    "weight @ matrices": (
        lambda s, x: s.head((s.w @ x.mT).tanh().mean(-1)),
        {"w": (5, 6), "head": 5},
    ),
    "weight that mixes positions": (
        lambda s, x: s.head((s.w @ x).tanh().mean(1)),
        {"w": (5, 4), "head": 6},
    ),
    "one matrix a head": (
        lambda s, x: s.head((_heads(x) @ s.w).tanh().mean((1, 2))),
        {"w": (2, 3, 5), "head": 5},
    ),
    "one matrix a head on the left": (
        lambda s, x: s.head((s.w @ _heads(x).mT).tanh().mean((1, 3))),
        {"w": (2, 5, 3), "head": 5},
    ),
    "heads that share their data": (
        lambda s, x: s.head((x.unsqueeze(1) @ s.w).tanh().mean((1, 2))),
        {"w": (2, 6, 5), "head": 5},
    ),
    "heads that share their matrix": (
        lambda s, x: s.head((_heads(x) @ s.w).tanh().mean((1, 2))),
        {"w": (1, 1, 3, 5), "head": 5},
    ),
    "experts": (
        lambda s, x: s.head((x.mean(1) @ s.w).tanh().mean(0)),
        {"w": (3, 6, 5), "head": 5},
    ),
    "bmm": (
        lambda s, x: s.head(torch.bmm(_by_head(x), s.w).tanh().unflatten(1, (-1, 4)).mean((0, 2))),
        {"w": (2, 3, 5), "head": 5},
    ),
    "baddbmm": (
        lambda s, x: s.head(
            torch.baddbmm(s.b, _by_head(x), s.w, beta=0.5).tanh().unflatten(1, (-1, 4)).mean((0, 2))
        ),
        {"b": (2, 1, 5), "w": (2, 3, 5), "head": 5},
    ),
    "addmm": (
        lambda s, x: s.head(torch.addmm(s.b, x.mean(1), s.w).tanh()),
        {"b": (5,), "w": (6, 5), "head": 5},
    ),
    "addmm with factors": (
        lambda s, x: s.head(torch.addmm(s.b, x.mean(1), s.w, alpha=0.5, beta=2).tanh()),
        {"b": (1, 5), "w": (6, 5), "head": 5},
    ),
    "inner": (
        lambda s, x: s.head(torch.inner(x, s.w).tanh().mean(1)),
        {"w": (5, 6), "head": 5},
    ),
    "tensordot": (
        lambda s, x: s.head(torch.tensordot(x, s.w, 1).tanh().mean(1)),
        {"w": (6, 5), "head": 5},
    ),
    "tensordot over two dimensions": (
        lambda s, x: s.head(
            torch.tensordot(x.unflatten(2, (2, 3)), s.w, dims=([2, -1], [0, 1])).tanh().mean(1)
        ),
        {"w": (2, 3, 5), "head": 5},
    ),
}


def _heads(x: Tensor) -> Tensor:
    """(N, T, 6) -> (N, 2, T, 3)."""
    return x.unflatten(2, (2, 3)).transpose(1, 2)


def _by_head(x: Tensor) -> Tensor:
    """(N, T, 6) -> (2, N T, 3)."""
    return _heads(x).transpose(0, 1).flatten(1, 2)


_EINSUMS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "nd,od->no": ((5, 6), lambda x: x.mean(1)),
    "do,nd->no": ((6, 5), lambda x: x.mean(1)),
    "btd,hdk->bthk": ((2, 6, 5), lambda x: x),
    "btd,dhk->bhtk": ((6, 2, 5), lambda x: x),
    "bhtd,hdk->bthk": ((2, 3, 5), _heads),
    "bhtd,hdk->btk": ((2, 3, 5), _heads),
    "bhtd,hkd->hbtk": ((2, 5, 3), _heads),
    "...d,dk->...k": ((6, 5), lambda x: x),
    "n...d,...dk->n...k": ((4, 6, 5), lambda x: x),
    "ntd,dz": ((6, 5), lambda x: x),
    "btd,d->btd": ((6,), lambda x: x),
    "btd,td->bd": ((4, 6), lambda x: x),
    "btd,dk->bk": ((6, 5), lambda x: x),
    "b t d, s d -> b t": ((3, 6), lambda x: x),
}


def _product_model(forward: Forward, parts: dict[str, Any]) -> Function:
    made = {
        name: nn.Linear(shape, CLASSES) if name == "head" else torch.randn(shape)
        for name, shape in parts.items()
    }
    return model_of(forward, **made)


@pytest.mark.parametrize("name", _PRODUCTS)
def test_products(name: str) -> None:
    model = _product_model(*_PRODUCTS[name])
    check(model, sequences)
    assert_exact(model, cross_entropy, sequences(1), sequences(2), engine="layerwise")


@pytest.mark.parametrize("equation", _EINSUMS)
def test_einsum(equation: str) -> None:
    shape, prepare = _EINSUMS[equation]
    result = equation.replace(" ", "").partition("->")[2]

    def forward(model: Any, x: Tensor) -> Tensor:
        out = torch.tanh(torch.einsum(equation, *_ordered(prepare(x), model.w)))
        out = out.transpose(0, 1) if result.startswith("hb") else out
        return model.head(out.flatten(1))

    def _ordered(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return (w, x) if equation.startswith("do") else (x, w)

    size = forward(_Bare(torch.randn(shape)), sequences(1)[0].float()).shape[1]
    model = model_of(forward, w=torch.randn(shape), head=nn.Linear(size, CLASSES))
    check(model, sequences)


class _Bare:
    """A stand-in that returns the features before the head."""

    def __init__(self, w: Tensor) -> None:
        self.w = w

    def head(self, x: Tensor) -> Tensor:
        """The features."""
        return x


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("btd,odk,btk->bto", {"w": (5, 6, 6)}),
        ("btd,dr,btd,ro->bto", {"a": (6, 2), "b": (2, 5)}),
    ],
)
def test_einsum_of_several(equation: str, shapes: dict[str, Any]) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        weights = iter([getattr(model, name) for name in shapes])
        data = iter([x, torch.sin(x)])
        operands = [
            next(data) if part.startswith("b") else next(weights)
            for part in equation.partition("->")[0].split(",")
        ]
        return model.head(torch.einsum(equation, operands).tanh().mean(1))

    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    model = model_of(forward, **weights, head=nn.Linear(5, CLASSES))
    check(model, sequences, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
def test_bilinear(bias: bool, frozen: str | None) -> None:
    pair = nn.Bilinear(6, 6, 5, bias=bias)
    for name, p in pair.named_parameters():
        p.requires_grad_(name != frozen)
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.pair(x, torch.cos(x))).mean(1)),
        pair=pair,
        head=nn.Linear(5, CLASSES),
    )
    check(model, sequences, 3)


def _forced(form: str) -> Callable[..., Any]:
    def choose(use: Any, size: Any, *, without: tuple[str, ...] = ()) -> Any:
        costs = use.layer.costs(use, size)
        allowed = [f for f in (form, *costs) if f in costs and f not in without]
        return allowed[0], costs

    return choose


@pytest.mark.parametrize("form", ["factored", "dense", "per example"])
@pytest.mark.parametrize("frozen", [None, "w", "b"])
@pytest.mark.parametrize("clean_length", [4, 3])
@pytest.mark.parametrize("length", [4, 20])
def test_every_form_of_a_weight_that_has_its_inputs_first(
    monkeypatch: pytest.MonkeyPatch, form: str, frozen: str | None, clean_length: int, length: int
) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        rows = torch.addmm(model.b, x.flatten(0, 1), model.w).unflatten(0, x.shape[:2])
        mixed = torch.einsum("ntd,dk->ntk", torch.tanh(rows), model.mix)
        return (torch.tanh(mixed) @ model.head).mean(1)

    monkeypatch.setattr(layerwise, "choose_form", _forced(form))
    shapes = {"w": (6, 5), "b": (5,), "mix": (5, 4), "head": (4, CLASSES)}
    model = model_of(forward, **{name: torch.randn(shape) for name, shape in shapes.items()})
    if frozen is not None:
        getattr(model, frozen).requires_grad_(False)
    batch, clean = sequences(5, length), sequences(3, length - 4 + clean_length)
    assert_exact(model, cross_entropy, batch, clean, engine="layerwise")
    for p in model.parameters():
        assert p.grad is None or p.grad.is_contiguous()
    assert not any("derived" in layer.name for layer in _layers(model, batch, clean))


def _layers(model: nn.Module, batch: Any, clean: Any) -> Any:
    return Reweighter(model, cross_entropy, engine="layerwise").explain(batch, clean).layers


@pytest.mark.parametrize("form", ["dense", "per example"])
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
def test_every_form_of_a_transposed_convolution(
    monkeypatch: pytest.MonkeyPatch, form: str, frozen: str | None
) -> None:
    monkeypatch.setattr(layerwise, "choose_form", _forced(form))
    up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1)
    for name, p in up.named_parameters():
        p.requires_grad_(name != frozen)
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.up(x)).flatten(2).mean(2)),
        up=up,
        head=nn.Linear(6, CLASSES),
    )
    check(model, _images(2), 3)


# Activations and bags.


@pytest.mark.parametrize("parameters", [1, 4])
def test_prelu(parameters: int) -> None:
    model = model_of(
        lambda s, x: s.head(torch.sin(s.act(x)).mean(1)),
        act=nn.PReLU(parameters),
        head=nn.Linear(6, CLASSES),
    )
    check(model, sequences)
    one_row_each = nn.Sequential(nn.Linear(6, 4), nn.PReLU(parameters), nn.Linear(4, CLASSES))
    check(one_row_each.double(), lambda n: (sequences(n)[0][:, 0], torch.randint(CLASSES, (n,))))


def _indices(n: int, length: int = 5) -> tuple[Tensor, Tensor]:
    index = torch.randint(7, (n, length))
    index[0] = 0
    index[-1] = 6
    return index, torch.randint(CLASSES, (n,))


@pytest.mark.parametrize(
    ("how", "padding"), list(itertools.product(("sum", "mean", "max"), (None, 0, -1)))
)
def test_embedding_bags(how: str, padding: int | None) -> None:
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.bag(x))),
        bag=nn.EmbeddingBag(7, 4, mode=how, padding_idx=padding),
        head=nn.Linear(4, CLASSES),
    )
    check(model, _indices, 3)


@pytest.mark.parametrize("padding", [None, 1])
def test_weighted_embedding_bags(padding: int | None) -> None:
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.bag(x, per_sample_weights=s.weights(x).squeeze(-1)))),
        bag=nn.EmbeddingBag(7, 4, mode="sum", padding_idx=padding),
        weights=nn.Embedding(7, 1),
        head=nn.Linear(4, CLASSES),
    )
    check(model, _indices, 3)


# What all rules must do.


_MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "lstm": (lambda: _recurrent(nn.LSTM, batch_first=True), sequences),
    "gru": (lambda: _recurrent(nn.GRU, batch_first=True, num_layers=2), sequences),
    "heads": (lambda: _product_model(*_PRODUCTS["one matrix a head"]), sequences),
    "conv transpose": (
        lambda: model_of(
            lambda s, x: s.head(torch.tanh(s.up(x)).flatten(2).mean(2)),
            up=nn.ConvTranspose2d(4, 6, 3, stride=2),
            head=nn.Linear(6, CLASSES),
        ),
        _images(2),
    ),
    "bag": (
        lambda: model_of(
            lambda s, x: s.head(torch.tanh(s.bag(x))),
            bag=nn.EmbeddingBag(7, 4),
            head=nn.Linear(4, CLASSES),
        ),
        _indices,
    ),
}


def _as(batch: Any, dtype: torch.dtype) -> Any:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)


@pytest.mark.parametrize("name", [name for name in _MODELS if name != "bag"])
@pytest.mark.parametrize("clean_size", [4, 6])
def test_float32_errs_at_most_twice_as_much_as_double_backward(name: str, clean_size: int) -> None:
    make, batch_of = _MODELS[name]
    model = make().float()
    batch, clean = (_as(batch_of(n), torch.float32) for n in (6, clean_size))
    assert_float32_errs_little(model, batch, clean, "layerwise")


@pytest.mark.parametrize("layers", [None, ["*"]], ids=["merged", "two passes"])
@pytest.mark.parametrize("name", _MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype, layers: Any) -> None:
    make, batch_of = _MODELS[name]
    model = make().to(dtype)
    batch, clean = (_as(batch_of(n), dtype) for n in (6, 4))
    expected = truth(model, cross_entropy, batch, clean)
    reweighter = Reweighter(model, cross_entropy, engine="layerwise", layers=layers)
    step = reweighter.backward(batch, clean)
    assert_matches(step, model, expected, 64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", _MODELS)
def test_steps_of_a_plan_are_the_first_step_again(name: str) -> None:
    make, batch_of = _MODELS[name]
    model = make()
    held = Reweighter(model, cross_entropy, engine="layerwise")
    for _ in range(3):
        assert_exact(model, cross_entropy, batch_of(5), batch_of(3), reweighter=held)


@pytest.mark.parametrize("name", _MODELS)
def test_low_memory(name: str) -> None:
    make, batch_of = _MODELS[name]
    model = make()
    held = Reweighter(model, cross_entropy, engine="layerwise", low_memory=True)
    assert_exact(model, cross_entropy, batch_of(5), batch_of(3), reweighter=held)


@pytest.mark.parametrize("name", _MODELS)
def test_an_example_that_is_not_finite_is_left_out(name: str) -> None:
    """Its rows are never read: 0 times NaN is NaN."""
    make, batch_of = _MODELS[name]
    model = make()
    batch, clean = batch_of(6), batch_of(4)

    def spoiled(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = cross_entropy(outputs, targets)
        if targets is not batch[1]:
            return losses
        factor = torch.ones_like(losses)
        factor[2] = torch.nan
        return losses * factor

    step = Reweighter(model, spoiled, engine="layerwise", check_finite=False).backward(batch, clean)
    assert float(step.weights[2]) == 0
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
