"""The layer-wise engine gives the numbers of the oracle for every layer and form."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from l2rw_ext import Reweighter, reference
from l2rw_ext.engines.layerwise import engine as layerwise
from l2rw_ext.reference import relative_error
from support.models import (
    CLASSES,
    Tokens,
    cross_entropy,
    mlp,
    model_of,
    token_loss,
    vectors,
)
from support.oracle import (
    assert_exact,
    assert_float32_errs_little,
    assert_matches,
    flat,
    gradients_of,
    truth,
)


def _sequence(batch: int, length: int = 4, width: int = 8) -> Tensor:
    return torch.randn(batch, length, width, dtype=torch.float64)


def _classes(batch: int) -> Tensor:
    return torch.randint(CLASSES, (batch,))


class _Attention(nn.Module):
    """Attention whose queries, keys and values differ in length and width."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(
            8, 2, add_bias_kv=True, add_zero_attn=True, kdim=6, vdim=5, batch_first=batch_first
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out, _ = self.attention(q, k, v, attn_mask=mask)
        return self.head(out.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("n", "m"), [(5, 3), (4, 4), (1, 2)])
def test_attention_with_a_mask_that_is_passed_once(batch_first: bool, n: int, m: int) -> None:
    mask = torch.randn(4, 7, dtype=torch.float64)

    def batch(size: int) -> Any:
        inputs = (_sequence(size), _sequence(size, 7, 6), _sequence(size, 7, 5), mask)
        return inputs, _classes(size)

    model = _Attention(batch_first=batch_first).double()
    assert_exact(model, cross_entropy, batch(n), batch(m), engine="layerwise")


def test_scaled_dot_product_attention() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        q, k, v = model.project(x).chunk(3, -1)
        return model.head(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, -1])

    model = model_of(forward, project=nn.Linear(8, 24), head=nn.Linear(8, CLASSES))
    batch, clean = (_sequence(5), _classes(5)), (_sequence(3), _classes(3))
    assert_exact(model, cross_entropy, batch, clean, engine="layerwise")


def test_encoder_and_decoder_with_a_causal_mask() -> None:
    def forward(model: Any, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        return model.head(model.transformer(source, target, tgt_mask=mask).mean(1))

    transformer = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)
    model = model_of(forward, transformer=transformer, head=nn.Linear(8, CLASSES))

    def batch(size: int) -> Any:
        return (_sequence(size), _sequence(size, 5)), _classes(size)

    assert_exact(model, cross_entropy, batch(4), batch(3), engine="layerwise")


def test_example_axis_of_the_inputs_is_not_dimension_0() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
    model = model_of(lambda s, x: s.head(s.layer(x).mean(0)), layer=layer, head=nn.Linear(8, 3))
    batch = _sequence(7, 5), _classes(5)
    clean = _sequence(7, 3), _classes(3)
    assert_exact(model, cross_entropy, batch, clean, engine="layerwise")


def test_outputs_whose_first_dimension_happens_to_be_n_plus_m() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
    model = model_of(lambda s, x: s.layer(x.transpose(0, 1)), layer=layer)
    batch, clean = (_sequence(6, 10), _classes(6)), (_sequence(4, 10), _classes(4))
    assert_exact(model, lambda out, y: cross_entropy(out[-1], y), batch, clean, engine="layerwise")


@pytest.mark.parametrize("length", [6, 4])
def test_tied_embedding_and_head(length: int) -> None:
    """Adding up products use by use would be wrong by a third."""

    def forward(model: Any, index: Tensor) -> Tensor:
        hidden = model.norm(torch.tanh(model.inner(model.embedding(index))))
        return F.linear(hidden, model.embedding.weight)

    model = model_of(
        forward,
        embedding=nn.Embedding(9, 6, padding_idx=0),
        inner=nn.Linear(6, 6),
        norm=nn.LayerNorm(6),
    )
    index, clean_index = torch.randint(9, (5, 6)), torch.randint(9, (3, length))
    batch, clean = (index, index.roll(-1, 1)), (clean_index, clean_index.roll(-1, 1))
    assert_exact(model, token_loss, batch, clean, engine="layerwise")


def test_tied_modules() -> None:
    first = nn.Linear(5, 5)
    second = nn.Linear(5, 5)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(5, CLASSES)).double()
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


def test_module_called_twice_with_its_normalisation() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(model.norm(model.inner(x)))
        return model.head(x)

    model = model_of(
        forward, inner=nn.Linear(5, 5), norm=nn.LayerNorm(5), head=nn.Linear(5, CLASSES)
    )
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        parametrizations.spectral_norm,
        torch.nn.utils.spectral_norm,
    ],
)
def test_parametrized_weights(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(wrap(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


def test_weight_shared_between_a_derived_and_a_direct_use() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.head(torch.tanh(model.inner(x) @ model.inner.weight + x * model.scale.exp()))

    model = model_of(
        forward, inner=nn.Linear(5, 5), scale=torch.randn(5), head=nn.Linear(5, CLASSES)
    )
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


@pytest.mark.parametrize("clean_frames", [3, 5])
@pytest.mark.parametrize("clean_side", [6, 8])
def test_frames_of_a_video_as_rows_of_a_convolution(clean_frames: int, clean_side: int) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        frames = F.relu(model.norm(model.convolution(x.flatten(0, 1))))
        return model.head(frames.mean((2, 3)).view(*x.shape[:2], -1).mean(1))

    model = model_of(
        forward,
        convolution=nn.Conv2d(2, 4, 3),
        norm=nn.GroupNorm(2, 4),
        head=nn.Linear(4, CLASSES),
    )
    x = torch.randn(4, 3, 2, 6, 6, dtype=torch.float64)
    clean_x = torch.randn(3, clean_frames, 2, clean_side, clean_side, dtype=torch.float64)
    batch, clean = (x, _classes(4)), (clean_x, _classes(3))
    assert_exact(model, cross_entropy, batch, clean, engine="layerwise")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("frozen", ["", "norm.weight", "norm.bias", "first.weight"])
def test_group_norm_reports_what_its_backward_sums(frozen: str, channels_last: bool) -> None:
    """Also where nothing before it is trained, so that it has no input gradient."""

    def forward(model: Any, x: Tensor) -> Tensor:
        hidden = model.first(x).to(memory_format=model.memory_format)
        return model.head(model.vectors(torch.tanh(model.norm(hidden)).flatten(1)))

    model = model_of(
        forward,
        first=nn.Conv2d(2, 4, 3, bias=False),
        norm=nn.GroupNorm(2, 4),
        vectors=nn.GroupNorm(4, 16),
        head=nn.Linear(16, CLASSES),
    )
    if frozen:
        model.get_parameter(frozen).requires_grad_(False)
    x, clean_x = (torch.randn(k, 2, 4, 4, dtype=torch.float64) for k in (5, 3))
    batch, clean = (x, _classes(5)), (clean_x, _classes(3))
    # For channels_last tensors torch 2.13, and so the oracle, crashes if the first is frozen.
    model.memory_format = torch.contiguous_format
    expected = truth(model, cross_entropy, batch, clean)
    if channels_last:
        model.memory_format = torch.channels_last
    step = Reweighter(model, cross_entropy, engine="layerwise").backward(batch, clean)
    assert_matches(step, model, expected)


@pytest.mark.parametrize("n", [1, 4])
def test_windows_of_an_image_with_a_relative_position_bias(n: int) -> None:
    """Several windows of an example are rows of one dimension, as in Swin."""

    def forward(model: Any, x: Tensor) -> Tensor:
        windows = x.view(-1, 2, 2, 2, 2, 4).transpose(2, 3).reshape(-1, 4, 4)
        bias = model.table[model.index].mean(-1)
        scores = model.query(windows) @ windows.transpose(1, 2) + bias
        seen = torch.softmax(scores, -1) @ model.norm(windows)
        back = seen.view(-1, 2, 2, 2, 2, 4).transpose(2, 3).reshape(-1, 16, 4)
        return model.head(back.mean(1))

    model = model_of(
        forward,
        query=nn.Linear(4, 4),
        table=torch.randn(9, 4),
        norm=nn.LayerNorm(4),
        head=nn.Linear(4, CLASSES),
    )
    model.register_buffer("index", torch.randint(9, (4, 4)))
    batch, clean = (_sequence(n, 16, 4), _classes(n)), (_sequence(3, 16, 4), _classes(3))
    assert_exact(model, cross_entropy, batch, clean, engine="layerwise")


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", ["same", 1])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding(mode: str, padding: Any) -> None:
    """Clean batches of more than one example, too: published tools are wrong at both."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2 if padding == "same" else 3, padding=padding, padding_mode=mode),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2, groups=4, padding=padding if padding == 1 else 0),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    ).double()
    x, clean_x = (torch.randn(k, 2, 6, 6, dtype=torch.float64) for k in (4, 3))
    model(x)
    assert_exact(model, cross_entropy, (x, _classes(4)), (clean_x, _classes(3)), engine="layerwise")


def test_linear_on_three_dimensions() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    batch = _sequence(5), torch.randint(CLASSES, (5, 4))
    clean = _sequence(3, 6), torch.randint(CLASSES, (3, 6))
    assert_exact(model, token_loss, batch, clean, engine="layerwise")


def test_expanded_and_strided_gradients() -> None:
    """``sum`` hands back an expanded gradient, ``transpose`` and slices a strided one."""
    model = model_of(
        lambda s, x: s.second(s.first(x).transpose(1, 2)[..., ::2]).sum((1, 2)),
        first=nn.Linear(8, 3),
        second=nn.Linear(2, 2),
    )
    batch, clean = (_sequence(5), torch.randn(5)), (_sequence(3), torch.randn(3))
    loss = lambda out, y: out * y  # noqa: E731
    assert_exact(model, loss, batch, clean, engine="layerwise")


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (5, 1), (2, 9), (9, 2)])
def test_sizes(n: int, m: int) -> None:
    assert_exact(mlp(), cross_entropy, vectors(n), vectors(m), engine="layerwise")


def test_frozen_and_unreached_parameters() -> None:
    model = model_of(
        lambda s, x: s.head(torch.tanh(s.middle(torch.tanh(s.first(x))))),
        first=nn.Linear(5, 6),
        middle=nn.Linear(6, 6),
        head=nn.Linear(6, CLASSES),
        unused=nn.Linear(2, 2),
    )
    model.first.weight.requires_grad_(False)
    model.middle.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")
    assert model.unused.weight.grad is None


def test_parameter_that_only_the_clean_loss_reaches_gets_no_gradient() -> None:
    model = model_of(
        lambda s, x: {"a": s.a(torch.tanh(s.trunk(x))), "b": s.b(torch.tanh(s.trunk(x)))},
        trunk=nn.Linear(5, 6),
        a=nn.Linear(6, CLASSES),
        b=nn.Linear(6, CLASSES),
    )
    assert_exact(
        model,
        lambda out, y: cross_entropy(out["a"], y),
        vectors(6),
        vectors(4),
        clean_loss_fn=lambda out, y: cross_entropy(out["b"], y),
        engine="layerwise",
    )
    assert model.b.weight.grad is None


def test_clean_loss_that_no_parameter_reaches_scores_zero() -> None:
    model = mlp()
    step = Reweighter(
        model, cross_entropy, clean_loss_fn=lambda out, y: torch.ones(len(y)).double()
    ).backward(vectors(6), vectors(4))
    assert step.engine == "layerwise"
    assert step.degenerate
    assert not step.scores.any()


def test_inputs_and_outputs_in_dicts_and_tuples() -> None:
    model = model_of(
        lambda s, a, b, scale: {"x": (s.a(a), s.b(b) * scale)},
        a=nn.Linear(5, CLASSES),
        b=nn.Linear(5, CLASSES),
    )

    def batch(size: int) -> Any:
        x = torch.randn(2, size, 5, dtype=torch.float64)
        return {"a": x[0], "b": x[1], "scale": 0.5}, {"y": _classes(size)}

    def loss(out: Any, targets: Any) -> Tensor:
        return cross_entropy(out["x"][0] + out["x"][1], targets["y"])

    inputs, targets = batch(4)
    swapped = {key: inputs[key] for key in ("scale", "b", "a")}
    assert_exact(model, loss, batch(6), (swapped, targets), engine="layerwise")


def test_outputs_that_cannot_be_cut() -> None:
    model = model_of(
        lambda s, x: torch.distributions.Categorical(logits=s.head(x)), head=nn.Linear(5, CLASSES)
    )
    loss = lambda out, y: -out.log_prob(y)  # noqa: E731
    assert_exact(model, loss, vectors(6), vectors(4), engine="layerwise")


@dataclasses.dataclass(frozen=True)
class _Outputs:
    logits: Tensor
    parts: Any
    scale: float = 1.0


class _Extended(_Outputs):
    """Holds more than its fields."""

    def __init__(self, logits: Tensor, parts: Any) -> None:
        super().__init__(logits, parts)
        object.__setattr__(self, "mean", logits.mean())


class _Mirrored(collections.OrderedDict[str, Any]):
    """A dict whose items are attributes too."""

    def __init__(self, *args: Any, **items: Any) -> None:
        super().__init__(*args, **items)
        self.__dict__.update(self)


@pytest.mark.parametrize(
    ("kind", "engine"),
    [(_Outputs, "layerwise"), (_Mirrored, "layerwise"), (_Extended, "forward")],
)
def test_outputs_in_objects(kind: Any, engine: str) -> None:
    """Those that hold nothing but their parts are cut, so that the two batches are merged."""

    def forward(model: Any, x: Tensor) -> Any:
        hidden = torch.tanh(model.inner(x))
        return kind(logits=model.head(hidden), parts=[hidden, _Mirrored(x=x)])

    def loss(out: Any, y: Tensor) -> Tensor:
        penalty = out.parts[0].square().sum(1) + out.parts[1].x.sum(1)
        return cross_entropy(out.logits, y) + penalty + getattr(out, "mean", 0)

    model = model_of(forward, inner=nn.Linear(5, 5), head=nn.Linear(5, CLASSES))
    reweighter = Reweighter(model, loss)
    assert_exact(model, loss, vectors(6), vectors(4), engine=engine, reweighter=reweighter)
    merged = "merged" in reweighter.explain(vectors(6), vectors(4)).passes
    assert merged == (engine == "layerwise")


def test_weight_made_by_a_straight_through_function() -> None:
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            return w.round()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    model = model_of(
        lambda s, x: F.linear(Round.apply(s.a(x)), Round.apply(3 * s.b.weight), s.b.bias),
        a=nn.Linear(5, 5),
        b=nn.Linear(5, CLASSES),
    )
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


def test_hook_that_differentiates_a_layer_again() -> None:
    """A deep equilibrium: the hook solves for the gradient by many backwards of the same layer."""

    def forward(model: Any, x: Tensor) -> Tensor:
        u = model.inject(x)
        with torch.no_grad():
            z = torch.zeros_like(u)
            for _ in range(40):
                z = torch.tanh(model.inner(z) + u)
        z = torch.tanh(model.inner(z) + u)
        fixed = z.detach().requires_grad_()
        again = torch.tanh(model.inner(fixed) + u.detach())

        def solve(g: Tensor) -> Tensor:
            v = g
            for _ in range(40):
                v = torch.autograd.grad(again, fixed, v, retain_graph=True)[0] + g
            return v

        z.register_hook(solve)
        return model.head(z)

    model = model_of(
        forward, inner=nn.Linear(4, 4), inject=nn.Linear(5, 4), head=nn.Linear(4, CLASSES)
    )
    with torch.no_grad():
        model.inner.weight.mul_(0.3)
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


def test_gradient_inside_the_forward_is_a_constant() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        z = torch.tanh(model.a(x))
        (g,) = torch.autograd.grad(model.b(z).sum(), z, retain_graph=True)
        return model.b(z - 0.1 * g)

    model = model_of(forward, a=nn.Linear(5, 5), b=nn.Linear(5, CLASSES))
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


@pytest.mark.parametrize("same_shape", [True, False])
def test_checkpointed_part(same_shape: bool) -> None:
    inner = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 8))
    model = model_of(
        lambda s, x: s.head(checkpoint(s.inner, s.first(x), use_reentrant=False).mean(1)),
        first=nn.Linear(8, 8),
        inner=inner,
        head=nn.Linear(8, CLASSES),
    )
    batch, clean = (_sequence(5), _classes(5)), (_sequence(3, 4 if same_shape else 6), _classes(3))
    reweighter = Reweighter(model, cross_entropy)
    for _ in range(2):
        assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter, engine="layerwise")


class _Masks(torch.overrides.TorchFunctionMode):
    """Draws and keeps the masks of dropout, or applies given ones in order."""

    def __init__(self, given: list[Tensor] | None = None) -> None:
        super().__init__()
        self.given = given
        self.drawn: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.dropout:
            return func(*args, **(kwargs or {}))
        x = args[0]
        if self.given is not None:
            return x * self.given.pop(0)
        self.drawn.append((torch.rand(x.shape) < 0.5).to(x.dtype) * 2)
        return x * self.drawn[-1]


@pytest.mark.parametrize("merged", [True, False])
def test_dropout_with_replayed_masks(merged: bool) -> None:
    model = nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Dropout(), nn.Linear(16, 8), nn.Dropout()
    ).double()
    n, m = 5, 3
    loss = lambda out, y: cross_entropy(out.mean(1), y)  # noqa: E731
    batch, clean = (_sequence(n), _classes(n)), (_sequence(m, 4 if merged else 6), _classes(m))
    reweighter = Reweighter(model, loss)
    for _ in range(2):
        model.zero_grad()
        with _Masks() as masks:
            step = reweighter.backward(batch, clean)
        first, second = masks.drawn[:2], masks.drawn[2:4]
        if merged:
            assert "merged" in reweighter.explain(batch, clean).passes
            of_train, of_clean = [d[:n] for d in first], [d[n:] for d in first]
        else:
            of_clean, of_train = first, second
        with _Masks([*of_clean, *of_train]):
            scores = reference.single_gradient_scores(model, loss, batch, clean)
        assert relative_error(step.scores, scores) < 1e-12
        with _Masks(list(of_train)):
            gradients = reference.weighted_gradient(model, loss, batch, step.weights)
        found = flat(gradients_of(model).values())
        assert relative_error(found, flat(gradients.values())) < 1e-12


def _network(kind: str) -> tuple[nn.Module, Callable[[int], Any]]:
    if kind == "mlp":
        model = nn.Sequential(
            nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 3)
        )
        return model, lambda k: (torch.randn(k, 20), _classes(k))
    if kind == "convolutional":
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 9, CLASSES),
        )
        return model, lambda k: (torch.randn(k, 3, 8, 8), _classes(k))
    model = Tokens(6, batch_first=True, norm_first=True, padding=None, tied=True)
    return model, lambda k: (torch.randint(7, (k, 6)), _classes(k))


@pytest.mark.parametrize("kind", ["mlp", "convolutional", "transformer"])
@pytest.mark.parametrize(("n", "m"), [(24, 6), (8, 16)])
def test_float32_errs_at_most_twice_as_much_as_double_backward(kind: str, n: int, m: int) -> None:
    model, batch_of = _network(kind)
    assert_float32_errs_little(model, batch_of(n), batch_of(m), "layerwise")


@pytest.mark.parametrize("kind", ["mlp", "convolutional", "transformer"])
@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_half_precision_models(kind: str, dtype: torch.dtype, ulp: float) -> None:
    """Scores are float32, and no further off than those of torch's own gradients in the dtype."""
    model, batch_of = _network(kind)
    model = model.to(dtype)

    def cast(batch: Any) -> Any:
        x, y = batch
        return (x.to(dtype) if x.is_floating_point() else x), y

    batch, clean = cast(batch_of(16)), cast(batch_of(8))
    expected = truth(model, cross_entropy, batch, clean)
    plain = reference.single_gradient_scores(model, cross_entropy, batch, clean)
    step = Reweighter(model, cross_entropy).backward(batch, clean)
    assert step.engine == "layerwise"
    assert step.scores.dtype == step.weights.dtype == torch.float32
    allowed = 2 * relative_error(plain, expected.scores) + ulp
    assert relative_error(step.scores, expected.scores) <= allowed
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.dtype == dtype


def test_loss_in_another_dtype_than_the_model() -> None:
    model = mlp(dtype=torch.float32)
    loss = lambda out, y: cross_entropy(out, y).double()  # noqa: E731
    batch, clean = vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32)
    step = assert_exact(model, loss, batch, clean, tolerance=1e-6)
    assert step.scores.dtype == torch.float64


_FORMS = ["factored", "dense", "per example"]


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("frozen", ["nothing", "weight", "bias"])
@pytest.mark.parametrize("clean_length", [4, 6])
def test_every_form_is_exact(
    monkeypatch: pytest.MonkeyPatch, form: str, frozen: str, clean_length: int
) -> None:

    def forced(use: Any, size: Any, *, without: tuple[str, ...] = ()) -> Any:
        costs = use.layer.costs(use, size)
        allowed = [f for f in (form, *costs) if f in costs and f not in without]
        return allowed[0], costs

    monkeypatch.setattr(layerwise, "choose_form", forced)
    model = nn.Sequential(
        nn.Conv1d(4, 6, 2), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv1d(6, 5, 1, stride=2)
    ).double()
    model = nn.Sequential(model, nn.Linear(2 if clean_length == 4 else 3, CLASSES).double())
    if frozen != "nothing":
        for layer in model.modules():
            p = getattr(layer, frozen, None)
            if isinstance(p, nn.Parameter):
                p.requires_grad_(False)
    x, clean_x = _sequence(5, 4, clean_length), _sequence(3, 4, clean_length)
    loss = lambda out, y: cross_entropy(out.mean(1), y)  # noqa: E731
    reweighter = Reweighter(model, loss)
    batch, clean = (x, _classes(5)), (clean_x, _classes(3))
    for _ in range(2):
        assert_exact(model, loss, batch, clean, reweighter=reweighter, engine="layerwise")


def test_examples_with_weight_zero_are_never_multiplied() -> None:
    """0 * NaN is NaN: an example whose loss is not finite is left out, as if it were not there."""
    model = mlp()
    x, y = vectors(6)
    clean = vectors(4)
    expected = truth(model, cross_entropy, (x[1:], y[1:]), clean)
    broken = x.clone()
    broken[0, 2] = float("nan")
    step = Reweighter(model, cross_entropy).backward((broken, y), clean)
    assert step.engine == "layerwise"
    assert step.nonfinite == 1
    assert step.weights[0] == 0
    assert relative_error(step.scores[1:], expected.scores) < 1e-12
    assert relative_error(step.weights[1:], expected.weights) < 1e-12
    found = flat(gradients_of(model).values())
    assert relative_error(found, flat(expected.gradients.values())) < 1e-12


@pytest.mark.parametrize("network", ["convolutional", "transformer"])
def test_non_finite_example_in_other_layers(network: str) -> None:
    model, batch_of = _network(network)
    model = model.double()
    x, y = batch_of(6)
    clean_x, clean_y = batch_of(4)
    if x.is_floating_point():
        x, clean_x = x.double(), clean_x.double()
    scale = torch.ones(6, dtype=torch.float64)
    scale[2] = float("inf")
    expected = truth(
        model,
        lambda out, t: cross_entropy(out, t),
        (x[scale.isfinite()], y[scale.isfinite()]),
        (clean_x, clean_y),
    )
    step = Reweighter(
        model,
        lambda out, t: cross_entropy(out, t[0]) * t[1],
        clean_loss_fn=lambda out, t: cross_entropy(out, t[0]),
    ).backward((x, (y, scale)), (clean_x, (clean_y, torch.ones(4))))
    assert (step.nonfinite, step.engine) == (1, "layerwise")
    kept = scale.isfinite()
    assert relative_error(step.scores[kept], expected.scores) < 1e-12
    found = flat(gradients_of(model).values())
    assert relative_error(found, flat(expected.gradients.values())) < 1e-12


def test_the_same_step_twice_is_the_same_bit_for_bit() -> None:
    steps, gradients = [], []
    for _ in range(2):
        torch.manual_seed(5)
        model, batch_of = _network("convolutional")
        reweighter = Reweighter(model, cross_entropy)
        for _ in range(3):
            step = reweighter.backward(batch_of(8), batch_of(4))
        steps.append(step.scores)
        gradients.append(flat(gradients_of(model).values()))
    assert torch.equal(*steps)
    assert torch.equal(*gradients)


def test_model_is_not_copied_or_wrapped() -> None:
    model = mlp()
    duplicate = copy.deepcopy(model)
    assert_matches(
        Reweighter(model, cross_entropy).backward(*(batches := (vectors(6), vectors(4)))),
        model,
        truth(duplicate, cross_entropy, *batches),
    )
    assert model.state_dict().keys() == duplicate.state_dict().keys()


def test_layer_on_no_rows() -> None:
    model = model_of(
        lambda s, x: s.head(x.mean(1)) + s.none(x[:, :0]).sum(1),
        head=nn.Linear(8, CLASSES),
        none=nn.Linear(8, CLASSES),
    )
    batch, clean = (_sequence(5), _classes(5)), (_sequence(3), _classes(3))
    assert_exact(model, cross_entropy, batch, clean, engine="layerwise")


class _Wrapped(nn.Sequential):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (super().forward(x),)


def test_a_loss_that_writes_to_the_outputs_is_remembered() -> None:
    """After the first step no batch is merged in vain: two forwards a step."""
    calls: list[int] = []
    model = model_of(lambda s, x: calls.append(len(x)) or s.head(x), head=nn.Linear(5, CLASSES))
    reweighter = Reweighter(model, lambda o, y: cross_entropy(o.mul_(2), y), engine="layerwise")
    for _ in range(3):
        calls.clear()
        reweighter.backward(vectors(6), vectors(4))
    assert sorted(calls) == [4, 6]


@pytest.mark.parametrize("kind", [nn.Sequential, _Wrapped])
@pytest.mark.parametrize("keeps_output", [False, True])
def test_a_loss_that_writes_to_the_outputs(kind: Any, keeps_output: bool) -> None:
    """It is exact, or the error is that of a plain backward: the last layer keeps its output."""
    last = nn.Tanh() if keeps_output else nn.Identity()
    model = kind(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES), last).double()

    def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return cross_entropy(outputs.mul_(2), targets)

    if keeps_output:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            Reweighter(model, loss_fn, engine="layerwise").backward(vectors(6), vectors(4))
    else:
        assert_exact(model, loss_fn, vectors(6), vectors(4), engine="layerwise")
