"""Cosines in place of inner products: norms of single gradients, and what they are taken over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from l2rw_ext import NotExactError, Reweighter, reference
from l2rw_ext.engines.layerwise import norms
from l2rw_ext.reference import relative_error
from support.models import (
    CELLS,
    CLASSES,
    ENGINES,
    RECURRENT,
    Affine,
    Mean,
    Residual,
    Transposed,
    Twice,
    cross_entropy,
    mlp,
    model_of,
    normed,
    short_sequences,
    vectors,
)
from support.oracle import EXACT, flat, gradients_of, unchanged
from support.single_gradients import MODELS as COMMON
from support.single_gradients import direction_of, single_gradients

Model = tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]


def _images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 5, 4, dtype=torch.float64), torch.randint(CLASSES, (n,))


def _words(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(5, (n, 6)), torch.randint(CLASSES, (n,))


def _sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double()


def _tied(inputs_first: bool, position: bool = False) -> nn.Module:
    """A table that is looked up, multiplied with, and perhaps added."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.embedding(x)
        h = torch.tanh(h + m.embedding(x + 2) * m.scale)
        if position:
            h = h + m.embedding.weight.sum() * 0 + m.embedding.weight[:6]
        if inputs_first:
            h = torch.tanh(m.up(h)) @ m.embedding.weight
        else:
            h = F.linear(h, m.embedding.weight)
        return h.mean(1)[:, :CLASSES]  # type: ignore[no-any-return]

    embedding = nn.Embedding(7, 4)
    return model_of(run, embedding=embedding, scale=torch.ones(4), up=nn.Linear(4, 7))


def _unrolled(cell: nn.RNNCellBase) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        state: Any = None
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
        return m.head(state[0] if isinstance(state, tuple) else state)  # type: ignore[no-any-return]

    return model_of(run, cell=cell, head=nn.Linear(6, CLASSES))


def _siamese() -> nn.Module:
    """A convolution and a norm that both halves of an image share, with other sizes."""

    def run(m: Any, x: Tensor) -> Tensor:
        parts = x[:, :, :2], x[:, :, 2:]
        return m.head(sum(torch.tanh(m.norm(m.conv(part))).mean((2, 3)) for part in parts))

    return model_of(
        run,
        conv=nn.Conv2d(2, 4, 2, padding=1),
        norm=nn.GroupNorm(2, 4),
        head=nn.Linear(4, CLASSES),
    )


def _decoder() -> nn.Module:
    return model_of(
        lambda m, x: m.head(m.decoder(x, x[:, :2]).mean(1)),
        decoder=nn.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True),
        head=nn.Linear(4, CLASSES),
    )


MODELS: dict[str, Model] = {
    **COMMON,
    "positions": (
        lambda: _sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES), Mean(last=True)),
        lambda n: (torch.randn(n, 9, 5).double(), torch.randint(CLASSES, (n,))),
    ),
    "tied": (lambda: _tied(False), _words),
    "tied, inputs first": (lambda: _tied(True), _words),
    "tied, derived": (lambda: _tied(False, position=True), _words),
    "bag": (
        lambda: _sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, CLASSES)),
        lambda n: (_words(n)[0].int(), _words(n)[1]),
    ),
    "siamese": (_siamese, _images),
    "few pixels": (
        lambda: _sequential(
            nn.Conv2d(2, 16, 3, stride=2, padding=(1, 2), dilation=(1, 2)),
            nn.Tanh(),
            nn.Conv2d(16, 16, 3, padding="same", groups=2),
            nn.Tanh(),
            nn.Conv2d(16, 12, 3, padding="same", bias=False),
            nn.Flatten(),
            nn.Linear(72, CLASSES),
        ),
        _images,
    ),
    "frames": (
        lambda: model_of(
            lambda m, x: m.head(m.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(1)),
            conv=nn.Conv2d(4, 8, 3),
            head=nn.Linear(16, CLASSES),
        ),
        lambda n: (torch.randn(n, 2, 4, 3, 3).double(), torch.randint(CLASSES, (n,))),
    ),
    "transposed convolution": (
        lambda: _sequential(
            nn.ConvTranspose2d(2, 3, 2, 2), nn.Tanh(), Mean(last=False), nn.Linear(3, CLASSES)
        ),
        _images,
    ),
    "broadcast": (
        lambda: _sequential(Affine(5), Residual(Affine(1, 5)), nn.LayerNorm(5), nn.Linear(5, 3)),
        vectors,
    ),
    "matrix twice with other rows": (
        lambda: model_of(
            lambda m, x: m.b(m.a(x).mean(1) + m.a(x[:, 0]) + m.a(x[:, :2]).sum(1)),
            a=nn.Linear(5, 5),
            b=nn.Linear(5, CLASSES),
        ),
        short_sequences,
    ),
    "heads": (
        lambda: model_of(
            lambda m, x: torch.einsum("nthd,hkd->nhk", x.unflatten(2, (-1, 1)), m.w).sum(1),
            w=torch.randn(5, CLASSES, 1),
        ),
        short_sequences,
    ),
    "weight norm": (
        lambda: _sequential(weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, CLASSES)),
        vectors,
    ),
    "transposed weight": (
        lambda: _sequential(Transposed(5, chunked=False), nn.Linear(5, CLASSES)),
        vectors,
    ),
    "weight in parts": (
        lambda: _sequential(Transposed(5, chunked=True), nn.Linear(5, CLASSES)),
        vectors,
    ),
    "cross attention": (_decoder, lambda n: (torch.randn(n, 3, 4).double(), vectors(n)[1])),
    "twice": (
        lambda: _sequential(
            Twice(nn.Linear(5, 5)), Twice(nn.LayerNorm(5)), nn.Linear(5, CLASSES), Mean(last=True)
        ),
        short_sequences,
    ),
    **{
        f"cell {name}": (lambda cell=cell: _unrolled(cell(5, 6)), short_sequences)  # type: ignore[misc]
        for name, cell in CELLS.items()
    },
    **{
        f"recurrent {name}": (
            lambda make=make: model_of(  # type: ignore[misc]
                lambda m, x: m.head(m.rnn(x)[0][:, -1]),
                rnn=make(5, 6, 2, batch_first=True, bidirectional=True),
                head=nn.Linear(12, CLASSES),
            ),
            short_sequences,
        )
        for name, make in RECURRENT.items()
    },
}


def _cosines(model: nn.Module, batch: Any, clean: Any, **names: Any) -> Tensor:
    gradients, v = single_gradients(model, batch, **names), direction_of(model, clean, **names)
    lengths = gradients.norm(dim=1) * v.norm()
    return torch.where(lengths > 0, gradients @ v / lengths, 0)


def _assert_step(step: Any, model: nn.Module, batch: Any, exact: Tensor, tolerance: float) -> None:
    """Scores, weights and gradient are those of the cosines."""
    assert step.engine == "layerwise"
    assert relative_error(step.scores, exact) <= tolerance
    weights = reference.weights_from_scores(exact)
    assert relative_error(step.weights, weights) <= tolerance
    expected = reference.weighted_gradient(copy.deepcopy(model), cross_entropy, batch, weights)
    found = flat(gradients_of(model).values())
    assert relative_error(found, flat(expected.values())) <= tolerance


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    torch.manual_seed(0)
    make, draw = MODELS[name]
    model, batch, clean = make(), draw(5), draw(3)
    exact = _cosines(model, batch, clean)
    for options in ({}, {"low_memory": True}, {"compile": "eager"}):
        reweighter = Reweighter(model, cross_entropy, normalize="example", **options)  # type: ignore[arg-type]
        for _ in range(4 if "compile" in options else 2):
            model.zero_grad()
            _assert_step(reweighter.backward(batch, clean), model, batch, exact, EXACT)
        lines = str(reweighter.explain(batch, clean))
        assert "normalize='example': scores are cosines, <∇f_i, v> / (|∇f_i| |v|)" in lines
        assert "agrees with plain autograd" in lines or "compile" in options
        assert "one graph" in lines or "compile" not in options


OPTIONS: dict[str, dict[str, Any]] = {
    "layers": {"layers": ["2"]},
    "biases": {"layers": ["*.bias"]},
    "l2": {"l2": 0.3},
    "decay": {"direction_decay": 0.5},
    "every": {"every": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_after_options_that_change_the_direction(name: str) -> None:
    torch.manual_seed(0)
    model, batch = mlp(), vectors(6)
    options = OPTIONS[name]
    chosen = {"layers": ["2.weight", "2.bias"], "biases": ["0.bias", "2.bias"]}.get(name, [])
    reweighter = Reweighter(model, cross_entropy, normalize="example", **options)
    plain = Reweighter(model, cross_entropy, **options)
    ones = single_gradients(model, batch, names=chosen).norm(dim=1)
    for _ in range(3):
        clean = vectors(4)
        found = reweighter.backward(batch, clean).scores
        model.zero_grad()
        along = plain.backward(batch, clean).scores / ones
        model.zero_grad()
        # |v| is not known here, and is the same for all examples.
        assert relative_error(found / found.norm(), along / along.norm()) <= EXACT
        assert float(found.abs().max()) <= 1
    if chosen:
        assert relative_error(found, _cosines(model, batch, clean, names=chosen)) <= EXACT


def test_length_of_the_direction_and_of_gradients_does_not_matter() -> None:
    torch.manual_seed(0)
    model, batch, clean = mlp(), vectors(6), vectors(4)
    scale = torch.tensor([1e-5, 1.0, 1e4, 1.0, 1.0, 0.0]).double()

    def scaled(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * scale

    def clean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 1e-7 * cross_entropy(outputs, targets)

    exact = _cosines(model, batch, clean)
    exact[5] = 0  # a gradient of zero
    found = Reweighter(model, scaled, clean_loss_fn=clean_loss, normalize="example")
    assert relative_error(found.scores(batch, clean), exact) <= EXACT


@pytest.mark.parametrize(
    "name", ["positions", "tied", "bag", "few pixels", "frames", "twice", "weight norm"]
)
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_squares_of_gradients_neither_vanish_nor_overflow(name: str, size: float) -> None:
    """In float32, where those of losses times 1e-25 would be zero."""
    make, draw = MODELS[name]
    model, batch, clean = make(), draw(5), draw(3)
    exact = _cosines(model, batch, clean)
    narrow = copy.deepcopy(model).float()
    (x, y), (x_clean, y_clean) = batch, clean
    if x.is_floating_point():
        x, x_clean = x.float(), x_clean.float()
    reweighter = Reweighter(
        narrow,
        lambda out, targets: cross_entropy(out, targets) * size,
        clean_loss_fn=cross_entropy,
        normalize="example",
    )
    assert relative_error(reweighter.scores((x, y), (x_clean, y_clean)), exact) < 1e-4


class Difference(nn.Module):
    """Two positions whose gradients are each other's negative, for inputs that are nearly equal."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.head(h[:, 1] - h[:, 0])


def test_a_gradient_much_smaller_than_its_terms() -> None:
    """In float32, whose Gram matrices would leave nothing of its norm."""
    torch.manual_seed(0)
    model = Difference()
    a, b, c = (torch.randn(8, 1, 64) for _ in range(3))
    near = torch.tensor([1, 1, 1, 1, 1e-2, 1e-3, 3e-4, 1e-4]).view(8, 1, 1)
    batch = torch.cat([a, a + near * c], 1), torch.randint(CLASSES, (8,))
    clean = torch.cat([b, b + c], 1)[:4], torch.randint(CLASSES, (4,))
    found = Reweighter(model, cross_entropy, normalize="example", layers=["inner"])
    scores = found.scores(batch, clean)
    (x, y), (x_clean, y_clean) = batch, clean
    names = ("inner.weight", "inner.bias")
    exact = _cosines(
        copy.deepcopy(model).double(), (x.double(), y), (x_clean.double(), y_clean), names=names
    )
    assert relative_error(scores, exact) < 1e-3


def test_a_direction_of_zero() -> None:
    model, batch, clean = mlp(), vectors(6), vectors(4)
    for clean_loss in (lambda o, y: o[:, 0] * 0, lambda o, y: y.double()):
        reweighter = Reweighter(model, cross_entropy, clean_loss_fn=clean_loss, normalize="example")
        step = reweighter.backward(batch, clean)
        assert step.degenerate
        assert not step.scores.any()


@pytest.mark.parametrize("engine", ENGINES)
def test_engines(engine: Any) -> None:
    if engine == "layerwise":
        model, batch, clean = normed(), vectors(6), vectors(4)
        for chosen in ("auto", engine):
            reweighter = Reweighter(model, cross_entropy, engine=chosen, normalize="example")
            with pytest.raises(NotExactError, match="BatchNorm"), unchanged(model):
                reweighter.backward(batch, clean)
            with pytest.raises(NotExactError, match="BatchNorm"), unchanged(model):
                reweighter.scores(batch, {"a": clean})
        return
    with pytest.raises(ValueError, match="normalize needs the layerwise engine"):
        Reweighter(mlp(), cross_entropy, engine=engine, normalize="example")
    with pytest.raises(ValueError, match="normalize must be None or 'example'"):
        Reweighter(mlp(), cross_entropy, normalize="batch")  # type: ignore[arg-type]


def test_several_sets() -> None:
    torch.manual_seed(0)
    model, batch = mlp(), vectors(6)
    sets = {"a": vectors(4), "b": vectors(1), "c": vectors(3)}
    exact = torch.stack([_cosines(model, batch, clean) for clean in sets.values()], 1)
    reweighter = Reweighter(model, cross_entropy, normalize="example")
    for _ in range(2):
        with unchanged(model):
            assert relative_error(reweighter.scores(batch, sets), exact) <= EXACT


def test_the_proof_holds_a_norm_to_plain_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = norms.Norms.finish
    monkeypatch.setattr(norms.Norms, "finish", lambda self: 1.01 * finish(self))
    model, batch, clean = mlp(), vectors(6), vectors(4)
    reweighter = Reweighter(model, cross_entropy, normalize="example")
    with pytest.raises(NotExactError, match="norm of the gradient of example"), unchanged(model):
        reweighter.backward(batch, clean)


def _assert_close(model: nn.Module, batch: Any, clean: Any, scores: Tensor, error: float) -> None:
    assert scores.dtype == torch.float32
    assert float((scores.double() - _cosines(model, batch, clean)).abs().max()) <= error


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in COMMON
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if (name, dtype) != ("LSTM", torch.float16)  # which torch has not on the CPU
    ],
)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """float32 by itself and under autocast: a cosine errs as much as its terms do."""
    torch.manual_seed(0)
    make, draw = COMMON[name]
    model = make().float()
    batch, clean = ((x.float() if x.is_floating_point() else x, y) for x, y in (draw(5), draw(4)))
    reweighter = Reweighter(model, cross_entropy, normalize="example")
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            step = reweighter.backward(batch, clean)
        model.zero_grad()
        _assert_close(model, batch, clean, step.scores, 16 * torch.finfo(dtype).eps)


def test_a_loss_scale_cancels_and_an_overflow_skips_the_step() -> None:
    torch.manual_seed(0)
    model = mlp(dtype=torch.float32)
    batch, clean = (vectors(n, dtype=torch.float32) for n in (6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    reweighter = Reweighter(model, cross_entropy, normalize="example")
    for _ in range(2):
        step = reweighter.backward(batch, clean, grad_scaler=scaler)
        model.zero_grad()
        _assert_close(model, batch, clean, step.scores, 1e-5)
    huge = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with torch.autocast("cpu", torch.float16):
        reweighter.backward(batch, clean, grad_scaler=huge)
    before = copy.deepcopy(model.state_dict())
    huge.step(optimizer)
    huge.update()
    assert huge.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("compiled", [False, "eager"])
def test_micro_batches(compiled: Any) -> None:
    torch.manual_seed(0)
    model, (x, y), clean = mlp(), vectors(7), vectors(4)
    reweighter = Reweighter(model, cross_entropy, normalize="example", compile=compiled)
    exact = _cosines(model, (x, y), clean)
    for _ in range(4):
        model.zero_grad()
        with reweighter.accumulate() as accumulation:
            for part in (slice(0, 3), slice(3, 7)):
                reweighter.backward((x[part], y[part]), clean)
        weights = torch.cat(accumulation.weights)
        assert relative_error(weights, reference.weights_from_scores(exact)) <= EXACT
        expected = reference.weighted_gradient(model, cross_entropy, (x, y), weights)
        assert relative_error(flat(gradients_of(model).values()), flat(expected.values())) <= EXACT


def test_remembered_scores_are_cosines() -> None:
    torch.manual_seed(0)
    model, batch, clean, index = mlp(), vectors(6), vectors(4), torch.arange(6)
    reweighter = Reweighter(model, cross_entropy, normalize="example", every=2, reuse="scores")
    first = reweighter.backward(batch, clean, index=index)
    second = reweighter.backward(batch, index=index)
    assert second.engine == "remembered"
    assert torch.equal(second.weights, first.weights)
    assert relative_error(reweighter.record.scores, _cosines(model, batch, clean)) <= EXACT


def test_an_example_that_is_not_finite_is_left_out() -> None:
    torch.manual_seed(0)
    model, (x, y), clean = mlp(), vectors(6), vectors(4)
    exact = _cosines(model, (x, y), clean)
    x[2] = float("inf")
    step = Reweighter(model, cross_entropy, normalize="example").backward((x, y), clean)
    assert step.nonfinite == 1
    kept = torch.tensor([0, 1, 3, 4, 5])
    assert relative_error(step.scores[kept], exact[kept]) <= EXACT
    assert float(step.weights[2]) == 0


def _rows(n: int, count: int, i: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, count, i).double(), torch.randn(n, count, k).double()


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_norms_of_products(count: int) -> None:
    """In each form, alone and together, and when a part is formed."""
    torch.manual_seed(0)
    n, i, k = 4, 6, 5
    rows, index = _rows(n, count, i, k), torch.randint(i, (n, count))
    looked_up = torch.randn(n, count, k).double()
    of_rows = rows[0].mT @ rows[1]
    of_indices = F.one_hot(index, i).double().mT @ looked_up
    root = torch.zeros(i, k)
    cases: list[tuple[list[Any], Tensor]] = [
        ([rows], of_rows),
        ([rows, rows], 2 * of_rows),
        ([(index, looked_up)], of_indices),
        ([rows, (index, looked_up)], of_rows + of_indices),
        ([rows, (index, looked_up), of_rows], 2 * of_rows + of_indices),
    ]
    for singles, exact in cases:
        held = norms._Held(root)
        for single in singles:
            held.add(single)
        assert relative_error(held.norms(), exact.flatten(1).norm(dim=1)) <= EXACT
