"""Dropout, memory formats, repeatability, hooks and wrappers work as in a plain training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2rw_ext import NotExactError, Reweighter, reference
from support.models import CLASSES, ENGINES, Tokens, cross_entropy, mlp, model_of, vectors
from support.oracle import (
    Truth,
    assert_exact,
    assert_matches,
    flat,
    gradients_of,
    unchanged,
)


def _classes(n: int) -> Tensor:
    return torch.randint(CLASSES, (n,))


def _images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 8, 8, dtype=torch.float64), _classes(n)


# Dropout


class _DropPath(nn.Module):
    """Drops the residual branch of whole examples; the mask is drawn in one of two ways."""

    def __init__(self, inner: nn.Module, *, from_data: bool) -> None:
        super().__init__()
        self.inner, self.from_data = inner, from_data

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.inner(x)
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        if self.from_data:
            mask = x.new_empty(shape).bernoulli_(0.6)
        else:
            mask = (torch.rand(shape) < 0.6).to(x.dtype)
        return x + self.inner(x) * mask / 0.6


def _image_model(drop: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Tanh(), drop, nn.Flatten(), nn.Linear(6 * 36, CLASSES)
    ).double()


DROPOUTS: dict[str, Callable[[], nn.Module]] = {
    "dropout": nn.Dropout,
    "dropout2d": nn.Dropout2d,
    "alpha dropout": nn.AlphaDropout,
    "feature alpha dropout": nn.FeatureAlphaDropout,
    "drop path from data": lambda: _DropPath(nn.Conv2d(6, 6, 3, padding=1), from_data=True),
    "drop path of the model": lambda: _DropPath(nn.Conv2d(6, 6, 3, padding=1), from_data=False),
}


def _replayed(model: nn.Module, batch: Any, clean: Any, passes: str) -> Truth:
    """The loop of single gradients, on forwards that draw what the step's drew."""
    torch.manual_seed(5)
    (x, y), (x_clean, y_clean) = batch, clean
    if passes == "merged":
        out = model(torch.cat([x, x_clean]))
        train, clean_out = out[: len(x)], out[len(x) :]
    else:
        clean_out, train = model(x_clean), model(x)
    parameters = dict(model.named_parameters())
    losses = cross_entropy(train, y)

    def gradient(loss: Tensor) -> Tensor:
        return flat(torch.autograd.grad(loss, list(parameters.values()), retain_graph=True))

    clean_loss = cross_entropy(clean_out, y_clean).mean()
    v = gradient(clean_loss)
    scores = torch.stack([gradient(loss) @ v for loss in losses])
    weights = reference.weights_from_scores(scores)
    gradients = torch.autograd.grad((weights * losses).sum(), list(parameters.values()))
    named = dict(zip(parameters, gradients, strict=True))
    return Truth(scores, weights, named, clean_loss.detach())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", DROPOUTS)
@pytest.mark.parametrize("merged", [True, False])
def test_dropout_is_that_of_the_forwards(engine: Any, name: str, merged: bool) -> None:
    """One forward of [train; clean], or two: the clean batch's first, for it gives v."""
    model = _image_model(DROPOUTS[name]())
    batch, clean = _images(6), _images(4)
    passes = "merged" if merged and engine == "layerwise" else "clean first"
    expected = _replayed(model, batch, clean, passes)
    # A direction that an option may change takes a pass of its own.
    layers = None if merged else ["*"]
    reweighter = Reweighter(model, cross_entropy, engine=engine, layers=layers)
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(5)
        assert_matches(reweighter.backward(batch, clean), model, expected)


def test_dropout_in_attention_weights() -> None:
    """Its mask is drawn inside a composite function."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True).double()
    model = model_of(lambda s, x: s.head(s.layer(x).mean(1)), layer=layer, head=nn.Linear(8, 3))

    def sequences(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 5, 8, dtype=torch.float64), _classes(n)

    batch, clean = sequences(6), sequences(4)
    expected = _replayed(model, batch, clean, "merged")
    torch.manual_seed(5)
    step = Reweighter(model, cross_entropy, engine="layerwise").backward(batch, clean)
    assert_matches(step, model, expected)


# Repeatability


def _network(kind: str) -> tuple[nn.Module, Callable[[int], Any]]:
    if kind == "mlp":
        model = nn.Sequential(
            nn.Linear(40, 256), nn.ReLU(), nn.Dropout(), nn.LayerNorm(256), nn.Linear(256, 3)
        )
        return model, lambda n: (torch.randn(n, 40), _classes(n))
    if kind == "convolutional":
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Dropout2d(),
            nn.Conv2d(16, 24, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24 * 25, CLASSES),
        )
        return model, lambda n: (torch.randn(n, 3, 12, 12), _classes(n))
    model = Tokens(6, batch_first=True, norm_first=True, padding=None, tied=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model, lambda n: (torch.randint(7, (n, 6)), _classes(n))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _steps(kind: str, engine: Any) -> list[Tensor]:
    """Weights and gradients of some steps of training from one seed."""
    torch.manual_seed(7)
    model, batches = _network(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    bits: list[Tensor] = []
    for _ in range(2):
        optimizer.zero_grad()
        step = reweighter.backward(batches(16), batches(8))
        bits += [step.weights, step.scores, step.losses, step.clean_loss]
        bits += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return [*bits, torch.get_rng_state()]


@pytest.mark.parametrize("kind", ["mlp", "convolutional", "transformer"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_seed_gives_the_same_steps_bit_for_bit(engine: Any, kind: str, threads: int) -> None:
    first, second = _steps(kind, engine), _steps(kind, engine)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("engine", ENGINES)
def test_first_step_and_later_steps_draw_alike(engine: Any) -> None:
    """What the first step checks besides leaves the generators alone."""
    model, batches = _network("mlp")
    batch, clean = batches(32), batches(16)
    used = Reweighter(model, cross_entropy, engine=engine)
    used.backward(batch, clean)
    found = []
    for reweighter in (used, Reweighter(model, cross_entropy, engine=engine)):
        model.zero_grad()
        torch.manual_seed(5)
        step = reweighter.backward(batch, clean)
        gradients = flat(gradients_of(model).values())
        found.append([step.weights, gradients, torch.get_rng_state()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


# Memory formats


class _Formats:
    """A forward hook that notes whether outputs are channels last."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[tuple[str, bool]] = []
        for module in model.modules():
            module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, out: Tensor) -> None:
        if out.dim() == 4:
            last = out.is_contiguous(memory_format=torch.channels_last)
            self.seen.append((type(module).__name__, last))


def _formatted_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8).eval(),
        nn.Dropout2d(0.0),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.ConvTranspose2d(4, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 49, CLASSES),
    ).double()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model_last", [True, False])
@pytest.mark.parametrize("inputs_last", [True, False])
@pytest.mark.parametrize("clean_last", [True, False])
def test_channels_last(engine: Any, model_last: bool, inputs_last: bool, clean_last: bool) -> None:
    """Exact, with gradients in the format of the parameters, as plain training leaves them."""

    def arranged(batch: tuple[Tensor, Tensor], last: bool) -> tuple[Tensor, Tensor]:
        x, y = batch
        return x.to(memory_format=torch.channels_last if last else torch.contiguous_format), y

    model = _formatted_model()
    if model_last:
        model = model.to(memory_format=torch.channels_last)
    batch, clean = arranged(_images(6), inputs_last), arranged(_images(4), clean_last)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter)
    for p in model.parameters():
        assert p.grad is not None
        if p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last):
            assert p.grad.is_contiguous(memory_format=torch.channels_last)
        else:
            assert p.grad.is_contiguous()


@pytest.mark.parametrize("engine", ENGINES)
def test_activations_stay_channels_last(engine: Any) -> None:
    model = _formatted_model().to(memory_format=torch.channels_last)
    batch, clean = (
        (x.to(memory_format=torch.channels_last), y) for x, y in (_images(6), _images(4))
    )
    formats = _Formats(model)
    model(batch[0])
    plain = set(formats.seen)
    assert all(last for _, last in plain)
    formats.seen.clear()
    Reweighter(model, cross_entropy, engine=engine).backward(batch, clean)
    assert set(formats.seen) == plain


# Hooks


@pytest.mark.parametrize("engine", ENGINES)
def test_forward_hooks_that_collect_statistics(engine: Any) -> None:
    """Exact; and a hook sees every forward of the step, of one batch or of both."""
    model = mlp()
    sizes: list[int] = []
    means: list[float] = []

    def collect(module: nn.Module, inputs: Any, out: Tensor) -> None:
        sizes.append(len(out))
        means.append(float(out.detach().mean()))

    model[0].register_forward_hook(collect)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for _ in range(2):
        step = assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)
        assert step.engine == engine
    sizes.clear()
    reweighter.backward(vectors(6), vectors(4))
    assert sizes
    assert set(sizes) <= {6, 4, 10}


@pytest.mark.parametrize("engine", ENGINES)
def test_forward_hooks_that_change_what_passes(engine: Any) -> None:
    model = mlp()
    model[0].register_forward_hook(lambda m, i, out: out * 2 + 1)
    model[2].register_forward_pre_hook(lambda m, i: (i[0].clamp(-0.9, 0.9),))
    assert_exact(
        model,
        cross_entropy,
        vectors(6),
        vectors(4),
        reweighter=Reweighter(model, cross_entropy, engine=engine),
    )


@pytest.mark.parametrize("kind", ["full", "pre", "tensor"])
def test_backward_hooks_that_look(kind: str) -> None:
    """They see the gradients of the engine's own backward passes, and no number changes."""
    seen: list[Tensor] = []
    model = mlp()
    if kind == "full":
        model[2].register_full_backward_hook(lambda m, gi, go: seen.append(go[0]))
    elif kind == "pre":
        model[2].register_full_backward_pre_hook(lambda m, go: seen.append(go[0]))
    else:
        model[0].register_forward_hook(
            lambda m, i, out: out.register_hook(seen.append) and None  # type: ignore[func-returns-value]
        )
    for engine in ("auto", "layerwise", "double_backward"):
        seen.clear()
        reweighter = Reweighter(model, cross_entropy, engine=engine)  # type: ignore[arg-type]
        for _ in range(2):
            assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)
        assert seen


@pytest.mark.parametrize("kind", ["full", "tensor"])
def test_backward_hooks_in_the_forward_engine(kind: str) -> None:
    """It has no backward for scores, which a hook might change."""
    model = mlp()
    if kind == "full":
        model[2].register_full_backward_hook(lambda m, gi, go: None)
    else:
        model[0].register_forward_hook(lambda m, i, out: out.register_hook(print) and None)
    batch, clean = vectors(6), vectors(4)
    with pytest.raises(NotExactError), unchanged(model):
        Reweighter(model, cross_entropy, engine="forward").backward(batch, clean)


@pytest.mark.parametrize("clips", [False, True])
def test_backward_hooks_that_change_the_gradient(clips: bool) -> None:
    """What is linear is exact layer by layer; what is not is refused there."""
    model = mlp()
    change = (lambda g: g.clamp(-0.05, 0.05)) if clips else (lambda g: g * 0.5)
    model[2].register_full_backward_pre_hook(lambda m, go: (change(go[0]),))
    batch, clean = vectors(6), vectors(4)
    if not clips:
        assert_exact(model, cross_entropy, batch, clean, engine="layerwise")
        return
    with pytest.raises(NotExactError, match="mixes examples"), unchanged(model):
        Reweighter(model, cross_entropy, engine="layerwise").backward(batch, clean)


# Wrappers
