"""In an autocast context forwards compute as autocast does, and all else is in float32."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from l2rw_ext import Reweighter
from l2rw_ext.reference import relative_error
from l2rw_ext.tracing import autocast
from support.models import (
    CLASSES,
    ENGINES,
    Affine,
    Drawn,
    Residual,
    Tokens,
    Transposed,
    Twice,
    cross_entropy,
    model_of,
    networks_on_images,
    networks_on_tokens,
    networks_on_vectors,
)
from support.oracle import flat, gradients_of, truth, unchanged

DTYPES = [torch.bfloat16, torch.float16]

Batches = Callable[[int], tuple[Tensor, Tensor]]


def _classes(n: int) -> Tensor:
    return torch.randint(CLASSES, (n,))


def _vectors(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 12), _classes(n)


def _sequences(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, 12), _classes(n)


def _images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 8, 8), _classes(n)


def _tokens(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(7, (n, 6)), _classes(n)


def _between(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 12), *layers, nn.Linear(12, CLASSES))


class _Pooled(nn.Module):
    """Of a layer that returns a pair, the first; the mean over the positions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = (
            self.inner(x, x, x) if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)
        )
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))


def _low_rank() -> nn.Module:
    """W + A B: the product of parameters is low precision, the sum float32."""
    return model_of(
        lambda s, x: F.linear(F.linear(x, s.w + s.a @ s.b).tanh(), s.v),
        w=torch.randn(8, 12) / 4,
        a=torch.randn(8, 2),
        b=torch.randn(2, 12) / 4,
        v=torch.randn(CLASSES, 8),
    ).float()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Batches]] = {
    "mlp": (lambda: _between(nn.ReLU()), _vectors),
    "layer norm": (lambda: _between(nn.LayerNorm(12), nn.GELU()), _vectors),
    "rms norm": (lambda: _between(nn.RMSNorm(12), nn.Tanh()), _vectors),
    "batch norm in eval mode": (lambda: _between(nn.BatchNorm1d(12).eval(), nn.ReLU()), _vectors),
    "residual": (lambda: _between(Residual(nn.Linear(12, 12)), nn.Tanh()), _vectors),
    "scalar parameters": (lambda: _between(Affine(), nn.Tanh()), _vectors),
    "vector parameters": (lambda: _between(Affine(12), nn.Tanh()), _vectors),
    "called twice": (lambda: _between(Twice(nn.Linear(12, 12))), _vectors),
    "transposed": (lambda: _between(Transposed(12, chunked=False)), _vectors),
    "chunked": (lambda: _between(Transposed(12, chunked=True)), _vectors),
    "low rank": (_low_rank, _vectors),
    "weight norm": (lambda: _between(parametrizations.weight_norm(nn.Linear(12, 12))), _vectors),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, groups=4, padding_mode="circular", padding=1),
            nn.InstanceNorm2d(8, affine=True),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 16, CLASSES),
        ),
        _images,
    ),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 4, 3, stride=2),
            nn.Flatten(),
            nn.Linear(4 * 49, CLASSES),
        ),
        _images,
    ),
    "slopes": (lambda: _between(nn.PReLU(12)), _vectors),
    "bilinear": (
        lambda: model_of(
            lambda s, x: s.head(s.pair(x, x.cos()).tanh()),
            pair=nn.Bilinear(12, 12, 8),
            head=nn.Linear(8, CLASSES),
        ).float(),
        _vectors,
    ),
    "products": (
        lambda: model_of(
            lambda s, x: torch.einsum("ni,io->no", (x @ s.a).tanh(), s.b) + s.c,
            a=torch.randn(12, 8) / 4,
            b=torch.randn(8, CLASSES),
            c=torch.randn(CLASSES),
        ).float(),
        _vectors,
    ),
    "lstm cell": (
        lambda: model_of(
            lambda s, x: s.head(s.cell(x[:, 1], s.cell(x[:, 0]))[0]),
            cell=nn.LSTMCell(12, 8),
            head=nn.Linear(8, CLASSES),
        ).float(),
        _sequences,
    ),
    "attention": (
        lambda: _Pooled(nn.MultiheadAttention(12, 2, batch_first=True)),
        _sequences,
    ),
    "lstm": (lambda: _Pooled(nn.LSTM(12, 12, batch_first=True)), _sequences),
    "gru": (lambda: _Pooled(nn.GRU(12, 12, batch_first=True)), _sequences),
    "transformer": (
        lambda: Tokens(6, batch_first=True, norm_first=True, padding=None, tied=True),
        _tokens,
    ),
}


CASES = [
    (name, dtype)
    for name in NETWORKS
    for dtype in DTYPES
    if (name, dtype) != ("lstm", torch.float16)  # torch has no float16 LSTM for CPUs
]


@functools.cache
def _refusal_of_plain_torch(name: str, dtype: torch.dtype) -> str:
    """Why plain torch cannot train the network under this autocast, or nothing if it can.

    A bfloat16 LSTM, for one, needs a processor with AVX-512.
    """
    make, batches = NETWORKS[name]
    inputs, targets = batches(5)
    try:
        with torch.autocast("cpu", dtype=dtype):
            loss = cross_entropy(make()(inputs), targets).sum()
        loss.backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _network(name: str, dtype: torch.dtype) -> tuple[nn.Module, Batches]:
    """The model and its batches, where plain torch can train it."""
    refusal = _refusal_of_plain_torch(name, dtype)
    if refusal:
        pytest.skip(f"plain torch has no {name} in {dtype} on this processor: {refusal}")
    torch.manual_seed(0)
    make, batches = NETWORKS[name]
    return make(), batches


def _step(
    model: nn.Module, engine: Any, batch: Any, clean: Any, dtype: torch.dtype, steps: int = 2
) -> tuple[Any, Tensor]:
    """The last of some steps under autocast, and its gradient."""
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for _ in range(steps):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            step = reweighter.backward(batch, clean)
    assert step.engine == engine
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
    return step, flat(gradients_of(model).values())


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("clean_size", [6, 16])
def test_errs_at_most_twice_as_much_as_double_backward(
    name: str, dtype: torch.dtype, clean_size: int
) -> None:
    model, batches = _network(name, dtype)
    batch, clean = batches(16), batches(clean_size)
    expected = truth(model, cross_entropy, batch, clean)
    plain, plain_gradient = _step(model, "double_backward", batch, clean, dtype)
    exact_gradient = flat(expected.gradients.values())
    ulp = torch.finfo(dtype).eps / 2
    for engine in ("layerwise", "forward"):
        step, gradient = _step(model, engine, batch, clean, dtype)
        assert step.scores.dtype == step.weights.dtype == torch.float32
        for found, other, exact in (
            (step.scores, plain.scores, expected.scores),
            (step.weights, plain.weights, expected.weights),
            (gradient, plain_gradient, exact_gradient),
        ):
            assert relative_error(found, exact) <= 2 * relative_error(other, exact) + ulp


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_module_returns_what_it_returns_under_plain_autocast(
    name: str, dtype: torch.dtype
) -> None:
    model, batches = _network(name, dtype)
    batch, clean = batches(5), batches(5)
    outputs: list[Tensor] = []
    modules = [m for m in model.modules() if not isinstance(m, nn.Identity)]
    for module in modules:
        module.register_forward_hook(
            lambda m, i, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.autocast("cpu", dtype=dtype):
        model(torch.cat([batch[0], clean[0]]))
        plain = [x.detach() for x in outputs]
        outputs.clear()
        reweighter = Reweighter(model, cross_entropy, engine="layerwise")
        reweighter.backward(batch, clean)
    found = [x.detach() for x in outputs[: len(plain)]]
    assert [x.dtype for x in found] == [x.dtype for x in plain]
    for x, y in zip(found, plain, strict=True):
        assert relative_error(x, y) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_only_norms_are_trained(engine: Any, dtype: torch.dtype, inside: bool) -> None:
    """No gradient that a use sees has the low dtype, though others that it comes from do."""
    frozen = [nn.Linear(12, 12).requires_grad_(False) for _ in range(4)]
    layers = nn.Sequential(
        frozen[0], nn.LayerNorm(12), frozen[1], nn.GELU(), frozen[2], nn.LayerNorm(12), frozen[3]
    )

    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=inside or torch.is_autocast_enabled("cpu")):
            return model.layers(x)

    model = model_of(forward, layers=layers).float()
    for layer in frozen:
        layer.requires_grad_(False)
    batch, clean = _vectors(64), _vectors(32)
    expected = truth(layers, cross_entropy, batch, clean).scores
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    with torch.autocast("cpu", dtype=dtype, enabled=not inside):
        scores = reweighter.backward(batch, clean).scores
    assert relative_error(scores, expected) <= 8 * torch.finfo(dtype).eps


def _float(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, tree
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(drawn=st.one_of(networks_on_vectors(), networks_on_images(), networks_on_tokens()))
def test_drawn_networks(dtype: torch.dtype, drawn: Drawn) -> None:
    """No refusal, and no error beyond what rounding makes of scores that may be a single number."""
    model = drawn.model.float()
    batch, clean = _float(drawn.batch), _float(drawn.clean)
    expected = truth(model, drawn.loss_fn, batch, clean).scores
    found = {}
    for engine in ENGINES:
        reweighter = Reweighter(model, drawn.loss_fn, engine=engine)  # type: ignore[arg-type]
        with torch.autocast("cpu", dtype=dtype):
            found[engine] = reweighter.backward(batch, clean).scores
        assert found[engine].isfinite().all()
    plain = float((found["double_backward"] - expected).norm())
    ulp = torch.finfo(dtype).eps / 2
    for scores in found.values():
        assert float((scores - expected).norm()) <= 2 * plain + 4 * ulp * float(expected.norm())


class _Islands(nn.Module):
    """Enters autocast itself, with an island without it and one of another dtype."""

    def __init__(self, inner: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 16)
        self.third, self.head = nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.inner = inner
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a = self.first(x).relu()
            with torch.autocast("cpu", enabled=False):
                b = self.second(a.float()).relu()
            with torch.autocast("cpu", dtype=self.inner):
                c = self.third(b).relu()
            d = self.head(c)
        self.seen = [y.dtype for y in (a, b, c, d)]
        return d.float()


def _without_autocast(model: _Islands) -> nn.Module:
    """The same layers in the dtype of their input."""
    layers = [copy.deepcopy(x) for x in (model.first, model.second, model.third, model.head)]
    return nn.Sequential(
        layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.ReLU(), layers[3]
    )


@pytest.mark.parametrize("inner", DTYPES)
@pytest.mark.parametrize("ambient", [None, torch.bfloat16, torch.float16])
def test_model_that_enters_autocast_itself(inner: torch.dtype, ambient: torch.dtype | None) -> None:
    model = _Islands(inner)
    batch, clean = _vectors(16), _vectors(6)
    expected = truth(_without_autocast(model), cross_entropy, batch, clean)
    errors = {}
    for engine in ("layerwise", "double_backward"):
        reweighter = Reweighter(model, cross_entropy, engine=engine)  # type: ignore[arg-type]
        with torch.autocast("cpu", dtype=ambient or torch.bfloat16, enabled=ambient is not None):
            step = reweighter.backward(batch, clean)
        assert model.seen == [torch.bfloat16, torch.float32, inner, torch.bfloat16]
        errors[engine] = relative_error(step.scores, expected.scores)
    assert errors["layerwise"] <= 2 * errors["double_backward"] + 2.0**-9


@pytest.mark.parametrize("engine", ENGINES)
def test_optimizer_step_inside_the_context(engine: Any) -> None:
    """Casts of weights are not kept from one step to the next, although torch would keep them."""
    torch.manual_seed(1)
    inside = _between(nn.ReLU())
    outside = copy.deepcopy(inside)
    batch, clean = _vectors(16), _vectors(6)
    scores: list[list[Tensor]] = [[], []]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reweighter = Reweighter(inside, cross_entropy, engine=engine)
        optimizer = torch.optim.SGD(inside.parameters(), lr=5.0)
        for _ in range(3):
            scores[0].append(reweighter.backward(batch, clean).scores)
            optimizer.step()
            optimizer.zero_grad()
    reweighter = Reweighter(outside, cross_entropy, engine=engine)
    optimizer = torch.optim.SGD(outside.parameters(), lr=5.0)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores[1].append(reweighter.backward(batch, clean).scores)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*scores, strict=True))
    assert not torch.equal(scores[0][0], scores[0][1])


def _autocast_state() -> tuple[Any, ...]:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("fails", [False, True])
def test_the_context_is_as_it_was(engine: Any, cache: bool, fails: bool) -> None:
    model = _between(nn.LayerNorm(12))
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    batch, clean = _vectors(6), _vectors(4)
    if fails:
        clean = (clean[0] * float("nan"), clean[1])
    with torch.autocast("cpu", dtype=torch.float16, cache_enabled=cache):
        before = _autocast_state()
        for method in ("backward", "weights"):
            if fails:
                with pytest.raises(ValueError, match="clean batch"), unchanged(model):
                    getattr(reweighter, method)(batch, clean)
            else:
                getattr(reweighter, method)(batch, clean)
            assert _autocast_state() == before
        reweighter.explain(batch, _vectors(4))
        assert _autocast_state() == before


def test_a_plan_is_made_for_each_state() -> None:
    """And float32 steps between those under autocast are those of float32 alone."""
    model = _between(nn.ReLU())
    batch, clean = _vectors(16), _vectors(6)
    reweighter = Reweighter(model, cross_entropy, engine="layerwise")
    plain = reweighter.weights(batch, clean)
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            found.append(reweighter.weights(batch, clean))
        assert torch.equal(reweighter.weights(batch, clean), plain)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e4])
def test_weights_are_finite_whatever_float16_does(engine: Any, scale: float) -> None:
    """Gradients that underflow give no weight, those that overflow are left out or an error."""
    model = _between(nn.ReLU())
    batch, clean = _vectors(16), _vectors(6)
    loss = lambda out, y: cross_entropy(out, y) * scale  # noqa: E731
    reweighter = Reweighter(model, loss, engine=engine)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.float16):
            try:
                step = reweighter.backward(batch, clean)
            except (ValueError, RuntimeError):
                continue
        assert step.weights.isfinite().all()
        assert float(step.weights.sum()) == pytest.approx(1.0) or step.degenerate


def test_in_place_products_and_a_buffer() -> None:
    """What autocast leaves alone is left alone, in the dtype of the tensor that is written."""

    def forward(model: Any, x: Tensor) -> Tensor:
        h = model.first(x)
        h.mul_(model.scale)
        h += model.shift
        return model.head(torch.cat([h, model.token.expand(len(h), -1)], 1).tanh())

    model = model_of(
        forward,
        first=nn.Linear(12, 8),
        scale=torch.randn(8),
        shift=torch.randn(8),
        token=torch.randn(1, 4),
        head=nn.Linear(12, CLASSES),
    ).float()
    batch, clean = _vectors(16), _vectors(6)
    expected = truth(model, cross_entropy, batch, clean)
    step, _ = _step(model, "layerwise", batch, clean, torch.bfloat16)
    plain, _ = _step(model, "double_backward", batch, clean, torch.bfloat16)
    allowed = 2 * relative_error(plain.scores, expected.scores) + 2.0**-9
    assert relative_error(step.scores, expected.scores) <= allowed


def test_instance_norm_counts_a_batch_once() -> None:
    """Finding out what autocast does to it leaves running statistics alone."""
    autocast._CAST_RULES.clear()
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(4 * 36, CLASSES),
    )
    plain = copy.deepcopy(model)
    batch, clean = _images(6), _images(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Reweighter(model, cross_entropy).backward(batch, clean)
        plain(batch[0])
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3)
