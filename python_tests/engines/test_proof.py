"""Engines are held to plain autograd, and what disagrees with it gives no number."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2rw_ext import NotExactError, Reweighter
from l2rw_ext.engines import double_backward
from l2rw_ext.engines.forward.mode import Tangents
from l2rw_ext.engines.layerwise.scoring import Scoring
from l2rw_ext.engines.proof import Record
from support.models import CLASSES, ENGINES, cross_entropy, mlp, model_of, vectors
from support.oracle import assert_matches, truth, unchanged

DISAGREEING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as_strided_scatter": lambda a, p: torch.as_strided_scatter(a, p[:2, :2], (2, 2), (1, 1), 0),
    "cholesky of a matrix that is not symmetric": lambda a, p: torch.linalg.cholesky_ex(a)[0],
    "eigenvectors of a matrix that is not symmetric": lambda a, p: torch.linalg.eigh(a)[1].pow(2),
}
"""Operations whose derivative in torch's forward mode is not that of their backward."""


@pytest.mark.parametrize("name", DISAGREEING)
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_where_torch_disagrees_with_itself(name: str, engine: Any) -> None:
    size = 5
    mixing = torch.randn(size, 2 * size * size, dtype=torch.float64)

    def losses(out: Tensor, y: Tensor) -> Tensor:
        return mixing[:, : out.numel()] @ torch.sin(out.flatten())

    model = model_of(
        lambda s, x: DISAGREEING[name](x * s.theta, s.p),
        theta=torch.linspace(0.9, 1.1, size),
        p=torch.randn(size, size),
    )
    x = torch.randn(size, size, dtype=torch.float64)
    x = x @ x.T + 5 * torch.eye(size) + 0.3 * torch.randn(size, size)
    batch, clean = (x, torch.zeros(size)), (0.97 * x.flip(0).flip(1), torch.zeros(size))
    expected = truth(model, losses, batch, clean)
    try:
        step = Reweighter(model, losses, engine=engine).backward(batch, clean)
    except NotExactError:
        assert engine != "auto" or name == "as_strided_scatter"
        return
    assert torch.allclose(step.scores, expected.scores, rtol=1e-10, atol=1e-12)


class _NoGradient(torch.autograd.Function):
    """x + 0 p, whose backward says that p has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        return x + 0 * p

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients, None


@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_a_parameter_whose_gradient_is_none() -> None:
    model = model_of(
        lambda s, x: _NoGradient.apply(x * s.theta, s.p),
        theta=torch.linspace(0.9, 1.1, CLASSES),
        p=torch.ones(CLASSES),
    )
    batch, clean = vectors(6, CLASSES), vectors(4, CLASSES)
    explanation = Reweighter(model, cross_entropy).explain(batch, clean)
    assert explanation.proof.startswith("agrees with plain autograd")


def _off(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs) * 1.001


def _gradient_off(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: [
        [(p, 1.001 * g) for p, g in group] for group in function(*args, **kwargs)
    ]


WRONG: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "scores of layerwise": ("layerwise", Scoring, "_correlate", None),  # type: ignore[dict-item]
    "gradient of layerwise": ("layerwise", Scoring, "gradients_of", _gradient_off),
    "scores of forward": ("forward", Tangents, "scores", _off),
    "scores of double_backward": ("double_backward", double_backward, "_second", _off),
}


@pytest.mark.parametrize("name", WRONG)
def test_numbers_that_are_off_are_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, owner, attribute, spoil = WRONG[name]
    original = getattr(owner, attribute)
    if spoil is None:

        def spoiled(self: Scoring, use: Any, form: str, z: Tensor, g: Tensor, v: Any) -> None:
            off = [tuple(None if d is None else 1.001 * d for d in one) for one in v]
            original(self, use, form, z, g, off)

        monkeypatch.setattr(owner, attribute, spoiled)
    else:
        monkeypatch.setattr(owner, attribute, spoil(original))
    model, batches = mlp(), (vectors(6), vectors(4))
    reweighter = Reweighter(model, cross_entropy, engine=engine)  # type: ignore[arg-type]
    for _ in range(2):  # and the next step does not follow what was refused
        with pytest.raises(NotExactError, match="disagrees with plain autograd"), unchanged(model):
            reweighter.backward(*batches)
    with pytest.raises(NotExactError, match="disagrees"), unchanged(model):
        reweighter.weights(*batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ENGINES)
def test_rounding_is_no_disagreement(engine: Any, dtype: torch.dtype) -> None:
    """A bias before a normalisation has a gradient that is nothing but rounding errors."""
    model = nn.Sequential(
        nn.Linear(5, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.GroupNorm(1, 32)
    )
    model.append(nn.Linear(32, CLASSES)).to(dtype)
    batch, clean = vectors(60, dtype=dtype), vectors(30, dtype=dtype)
    explanation = Reweighter(model, cross_entropy, engine=engine).explain(batch, clean)
    assert "agrees with plain autograd" in explanation.proof


def test_a_float32_part_of_a_float64_model() -> None:
    model = model_of(
        lambda s, x: s.b(torch.softmax(s.a(x).float(), 1).double()),
        a=nn.Linear(5, 8),
        b=nn.Linear(8, CLASSES),
    )
    for engine in ENGINES:
        explanation = Reweighter(model, cross_entropy, engine=engine).explain(
            vectors(6), vectors(4)
        )
        assert "agrees" in explanation.proof


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forward_that_does_other_things_each_time(engine: Any) -> None:
    """Plain autograd gives other numbers each time, too, and is no measure of an engine."""
    draw = random.Random(0)
    model = model_of(lambda s, x: s.a(x) * draw.random(), a=nn.Linear(5, CLASSES))
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    step = reweighter.backward(vectors(6), vectors(4))
    assert step.engine == engine
    assert "not comparable" in reweighter.explain(vectors(6), vectors(4)).proof


@pytest.mark.parametrize("engine", ENGINES)
def test_later_steps_run_no_forward_of_their_own_for_a_proof(engine: Any) -> None:
    model = mlp()
    forwards = [0]
    model.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    counts = []
    for _ in range(17):
        batch, clean = vectors(6), vectors(4)
        expected = truth(model, cross_entropy, batch, clean)
        model.zero_grad()
        before = forwards[0]
        step = reweighter.backward(batch, clean)
        counts.append(forwards[0] - before)
        assert_matches(step, model, expected)
    plain = 1 if engine == "layerwise" else 2
    assert set(counts[1:16]) == {plain}
    assert counts[16] == plain + 1


def test_a_proof_that_lacks_a_gradient_is_repeated() -> None:
    """The factor of a low-rank adapter that starts at zero proves nothing of the other."""
    model = model_of(
        lambda s, x: s.b(torch.tanh(s.a(x) + s.up(s.down(x)))),
        a=nn.Linear(5, 8),
        down=nn.Linear(5, 2, bias=False),
        up=nn.Linear(2, 8, bias=False),
        b=nn.Linear(8, CLASSES),
    )
    nn.init.zeros_(model.get_submodule("up").weight)  # type: ignore[arg-type]
    reweighter = Reweighter(model, cross_entropy)
    reweighter.backward(vectors(6), vectors(4))
    assert "was zero" in reweighter.explain(vectors(6), vectors(4)).proof
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p -= 0.1 * p.grad
    reweighter.backward(vectors(6), vectors(4))
    assert "was zero" not in reweighter.explain(vectors(6), vectors(4)).proof


def test_when_a_record_is_due() -> None:
    record = Record()
    found = [step for step in range(300) if record.due(("a",))]
    assert found == [*range(16), 16, 32, 64, 128, 256]
    record = Record(_complete=True)
    assert [step for step in range(5000) if record.due(("a",))] == [0, 16, 256, 4096]
    record = Record(_complete=True)
    sizes = [step for step in range(100) if record.due((step,))]
    assert sizes == [*range(16), 16], "sixteen sizes, and the sixteenth step"
