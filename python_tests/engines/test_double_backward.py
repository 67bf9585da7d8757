"""Double backward is Algorithm 1 as printed, whatever couples the examples of a batch."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import NotExactError, Reweighter, reference
from l2rw_ext.reference import relative_error
from support.models import CLASSES, cross_entropy, mlp, model_of, vectors
from support.oracle import assert_exact, flat, gradients_of, truth, unchanged

# Two ways of the oracle agree to this on the networks with batch norm below.
COUPLED = 1e-11


def _batch_norm_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6), nn.BatchNorm1d(6)
    ).double()


def _contrastive(features: Tensor, targets: Tensor) -> Tensor:
    """Each example against all others of its batch."""
    return -F.log_softmax(features @ features.t(), 1).diagonal()


COUPLING: dict[str, tuple[Any, Any]] = {
    "batch norm": (_batch_norm_net, cross_entropy),
    "mean of a hidden layer": (
        lambda: model_of(
            lambda s, x: s.b((h := torch.tanh(s.a(x))) - h.mean(0)),
            a=nn.Linear(5, 8),
            b=nn.Linear(8, CLASSES),
        ),
        cross_entropy,
    ),
    "contrastive loss": (
        lambda: model_of(lambda s, x: F.normalize(s.a(x)), a=nn.Linear(5, 8)),
        _contrastive,
    ),
    "attention between examples": (
        lambda: model_of(
            lambda s, x: s.b(torch.softmax((h := s.a(x)) @ h.t(), 1) @ h),
            a=nn.Linear(5, 8),
            b=nn.Linear(8, CLASSES),
        ),
        cross_entropy,
    ),
    "one row in all": (
        lambda: model_of(
            lambda s, x: s.b((h := torch.tanh(s.a(x))) + h[:1]),
            a=nn.Linear(5, 8),
            b=nn.Linear(8, CLASSES),
        ),
        cross_entropy,
    ),
    "permuted rows": (
        lambda: model_of(
            lambda s, x: s.b(torch.tanh(s.a(x[(o := x[:, 0].argsort())])))[o.argsort()],
            a=nn.Linear(5, 8),
            b=nn.Linear(8, CLASSES),
        ),
        cross_entropy,
    ),
}


@pytest.mark.parametrize("name", COUPLING)
@pytest.mark.parametrize("engine", ["forward", "double_backward"])
def test_coupled_examples(name: str, engine: Any) -> None:
    make, loss = COUPLING[name]
    model = make()
    batch, clean = vectors(6), vectors(4)
    for reweighter in (Reweighter(model, loss), Reweighter(model, loss, engine=engine)):
        for _ in range(2):
            step = assert_exact(model, loss, batch, clean, reweighter=reweighter, tolerance=COUPLED)
            assert step.engine == ("forward" if reweighter.engine == "auto" else engine)
    with pytest.raises(NotExactError), unchanged(model):
        Reweighter(model, loss, engine="layerwise").backward(batch, clean)


@pytest.mark.parametrize("n", [6, 60])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_coupling_is_seen_in_narrow_dtypes(n: int, dtype: torch.dtype) -> None:
    model = COUPLING["mean of a hidden layer"][0]().to(dtype)
    with pytest.raises(NotExactError, match="mixes examples"):
        Reweighter(model, cross_entropy, engine="layerwise").backward(
            vectors(n, dtype=dtype), vectors(n // 2, dtype=dtype)
        )


@pytest.mark.parametrize("pair", [(0, 1), (3, 59), (0, 61), (70, 99)])
def test_coupling_of_a_single_pair_is_seen(pair: tuple[int, int]) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        h = torch.tanh(model.a(x))
        if len(h) > max(pair):
            other = torch.zeros(len(h), len(h), dtype=h.dtype)
            other[pair] = 1e-3
            h = h + other @ h
        return model.b(h)

    model = model_of(forward, a=nn.Linear(5, 8), b=nn.Linear(8, CLASSES))
    with pytest.raises(NotExactError, match="mixes examples"):
        Reweighter(model, cross_entropy, engine="layerwise").backward(vectors(100), vectors(7))


@pytest.mark.parametrize("engine", ["auto", "forward", "double_backward"])
def test_batch_norm_statistics_are_those_of_one_plain_forward(engine: Any) -> None:
    """Training and clean batch are two forwards; the running statistics advance once."""
    model = _batch_norm_net()
    plain = copy.deepcopy(model)
    batch, clean = vectors(6), vectors(4)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reweighter.backward(batch, clean)
        plain(batch[0])
        for found, expected in zip(model.buffers(), plain.buffers(), strict=True):
            assert torch.equal(found, expected)


def test_frozen_batch_norm_in_train_mode_still_couples() -> None:
    model = _batch_norm_net()
    model[1].requires_grad_(False)
    reweighter = Reweighter(model, cross_entropy, engine="layerwise")
    with pytest.raises(NotExactError, match="BatchNorm in train mode"):
        reweighter.backward(vectors(6), vectors(4))


def test_engine_when_asked_for_does_not_warn() -> None:
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = assert_exact(
            model,
            cross_entropy,
            vectors(6),
            vectors(4),
            reweighter=Reweighter(model, cross_entropy, engine="double_backward"),
        )
    assert step.engine == "double_backward"


def test_attention_has_a_second_derivative() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = model_of(lambda s, x: s.head(s.layer(x).mean(1)), layer=layer, head=nn.Linear(8, 3))

    def batch(k: int) -> Any:
        return torch.randn(k, 4, 8, dtype=torch.float64), torch.randint(3, (k,))

    reweighter = Reweighter(model, cross_entropy, engine="double_backward")
    assert_exact(model, cross_entropy, batch(5), batch(3), reweighter=reweighter)


def test_dropped_examples_do_not_contribute() -> None:
    model = _batch_norm_net()
    batch, clean = vectors(6), vectors(4)
    expected = truth(model, cross_entropy, batch, clean)
    assert (expected.weights == 0).any()
    Reweighter(model, cross_entropy, engine="double_backward").backward(batch, clean)
    found = flat(gradients_of(model).values())
    assert relative_error(found, flat(expected.gradients.values())) < COUPLED


def test_non_finite_training_loss_raises() -> None:
    model = _batch_norm_net()
    x, y = vectors(6)
    loss = lambda out, t: cross_entropy(out, t[0]) * t[1]  # noqa: E731
    scale = torch.ones(6)
    scale[3] = float("inf")
    with pytest.raises(ValueError, match=r"losses of examples \[3\]"), unchanged(model):
        Reweighter(model, loss, engine="double_backward").backward(
            (x, (y, scale)), (x[:4] + 1, (y[:4], scale[:3].new_ones(4)))
        )


def test_coupling_is_seen_in_a_part_of_another_dtype() -> None:
    """Seeds must not overflow in a float16 part of a float32 model, whose steps are probed."""

    def forward(model: Any, x: Tensor) -> Tensor:
        h = F.linear(x.half(), model.a.weight.half(), model.a.bias.half())
        moved = h.index_select(0, (x[:, 0] > model.limit).long().argsort(stable=True))
        return model.b(moved.float())

    model = model_of(forward, a=nn.Linear(5, 6), b=nn.Linear(6, CLASSES)).float()
    batch, clean = vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32)
    model.limit = 100
    step = Reweighter(model, cross_entropy, engine="layerwise").backward(batch, clean)
    plain = reference.single_gradient_scores(model, cross_entropy, batch, clean)
    assert relative_error(step.scores, plain) < 1e-3
    model.limit = float(batch[0][:, 0].median())
    with pytest.raises(NotExactError, match="mixes examples"):
        Reweighter(model, cross_entropy, engine="layerwise").backward(batch, clean)


@pytest.mark.parametrize("engine", ["auto", "double_backward"])
@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_an_operation_without_a_second_derivative_is_named(engine: Any) -> None:
    model = model_of(
        lambda s, x: s.norm(s.a(x)), a=nn.Linear(5, CLASSES), norm=nn.BatchNorm1d(CLASSES)
    )
    batch, clean = vectors(6), vectors(4)
    loss = lambda out, y: F.multi_margin_loss(out, y, reduction="none")  # noqa: E731
    with (
        unchanged(model),
        pytest.raises(NotExactError, match=r"derivative for .*multi_margin_loss.* not implemented"),
    ):
        Reweighter(model, loss, engine=engine).backward(batch, clean)


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("engine", ["auto", "double_backward"])
@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_backward_that_is_once_differentiable_is_refused(engine: Any, behind: bool) -> None:
    """Torch would leave its part of the second derivative out, without an error."""
    width = 4 if behind else CLASSES
    model = model_of(
        lambda s, x: s.head(_OnceDifferentiable.apply(x, s.w)),
        w=torch.randn(5, width),
        head=nn.Linear(width, CLASSES) if behind else nn.Identity(),
    )
    batch, clean = vectors(6), vectors(4)
    with unchanged(model), pytest.raises(NotExactError, match="marked once_differentiable"):
        Reweighter(model, cross_entropy, engine=engine).backward(batch, clean)
