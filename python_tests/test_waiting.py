"""A step with a plan never waits for the device: on the CPU, as if its values were not at hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import Affine, Tokens, Twice, cross_entropy, mlp, model_of, vectors
from oracle import relative_error
from torch import Tensor, nn
from waits import NeverWaits, WaitedError

from l2rw_ext import NotExactError, Reweighter, Step, devices, ops
from l2rw_ext.data.batch import merge
from l2rw_ext.engines.layerwise import scoring
from l2rw_ext.ops import compositions

BOUND = 1e-11
"""Of float64 steps whose sums have another order."""


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is at hand, and operators are compositions, as on CUDA."""
    monkeypatch.setattr(devices, "readable", lambda x: False)
    monkeypatch.setattr(scoring, "in_groups", lambda g: True)
    for name in compositions.__all__:
        monkeypatch.setattr(ops, name, getattr(compositions, name))


Batch = tuple[Any, Any]


@dataclass
class Case:
    """A model, and how to draw a batch of it."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Any, Any], Tensor] = cross_entropy
    engine: str = "layerwise"
    options: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int] = (7, 4)


def _images(count: int) -> Batch:
    return torch.randn(count, 2, 6, 6, dtype=torch.float64), torch.randint(3, (count,))


def _sequences(count: int) -> Batch:
    return torch.randn(count, 5, 8, dtype=torch.float64), torch.randint(3, (count,))


def _conv_net(norm: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        norm(),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False),
        norm(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    head = nn.Linear(8, 3).double()
    return model_of(lambda m, x: m.head(m.layer(x).mean(1)), layer=layer, head=head)


def _recurrent() -> nn.Module:
    cell = nn.LSTM(8, 6, batch_first=True).double()
    head = nn.Linear(6, 3).double()
    return model_of(lambda m, x: m.head(m.cell(x)[0][:, -1]), cell=cell, head=head)


def _heads() -> nn.Module:
    return model_of(
        lambda m, x: torch.einsum("nhd,hkd->nhk", x.view(-1, 1, 5).expand(-1, 2, -1), m.weight).sum(
            1
        ),
        weight=torch.randn(2, 3, 5),
    )


def _embedded() -> nn.Module:
    table, head = nn.Embedding(9, 6, padding_idx=0).double(), nn.Linear(6, 3).double()
    return model_of(lambda m, x: m.head(m.table(x).sum(1)), table=table, head=head)


def _tokens(n: int) -> Batch:
    return torch.randint(7, (n, 4)), torch.randint(3, (n,))


def _tied() -> nn.Module:
    return Tokens(4, batch_first=False, norm_first=True, padding=0, tied=True).double()


CASES = {
    "mlp": Case(mlp, vectors),
    "mlp, equal sizes": Case(mlp, vectors, sizes=(5, 5)),
    "mlp, low memory": Case(mlp, vectors, options={"low_memory": True}),
    "group norm": Case(lambda: _conv_net(lambda: nn.GroupNorm(2, 4)), _images),
    "transformer": Case(_transformer, _sequences),
    "embedding": Case(_embedded, lambda n: (torch.randint(9, (n, 5)), torch.randint(3, (n,)))),
    "recurrent": Case(_recurrent, _sequences),
    "tied tokens": Case(_tied, _tokens),
    "broadcast": Case(lambda: nn.Sequential(Affine(5), mlp()).double(), vectors),
    "called twice": Case(
        lambda: nn.Sequential(Twice(nn.Linear(5, 5)), nn.Linear(5, 3)).double(), vectors
    ),
    "heads": Case(_heads, vectors),
    "batch norm": Case(lambda: _conv_net(lambda: nn.BatchNorm2d(4)), _images, engine="forward"),
    "forward mlp": Case(mlp, vectors, engine="forward"),
    "double backward": Case(mlp, vectors, engine="double_backward"),
}


def _run(
    case: Case, model: nn.Module, batches: list[tuple[Batch, Batch]], **options: Any
) -> tuple[Reweighter, list[Step]]:
    reweighter = Reweighter(model, case.loss, engine=case.engine, **case.options, **options)
    steps = []
    for batch, clean in batches:
        model.zero_grad()
        steps.append(reweighter.backward(batch, clean))
    return reweighter, steps


def _drawn(case: Case) -> tuple[nn.Module, list[tuple[Batch, Batch]]]:
    """A model and three steps; one example of the last has no finite loss, if it can be masked."""
    model = case.model()
    batches = [(case.batch(case.sizes[0]), case.batch(case.sizes[1])) for _ in range(3)]
    inputs = batches[2][0][0]
    if case.engine == "layerwise" and inputs.is_floating_point():
        inputs[1] = math.nan
    return model, batches


def _assert_same(step: Step, expected: Step, model: nn.Module, other: nn.Module) -> None:
    finite = expected.scores.isfinite()
    scores, weights = step.scores.cpu(), step.weights.cpu()
    assert torch.equal(scores.isfinite(), finite)
    assert relative_error(scores[finite], expected.scores[finite]) <= BOUND
    assert relative_error(weights, expected.weights) <= BOUND
    assert step.nonfinite == expected.nonfinite
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            assert p.grad.isfinite().all()
            assert relative_error(p.grad.cpu(), q.grad) <= BOUND


@pytest.mark.parametrize("name", CASES)
def test_a_step_with_a_plan_never_waits(name: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    model, batches = _drawn(case)
    near = copy.deepcopy(model)
    expected = _run(case, near, batches)[1][-1]

    request.getfixturevalue("far")
    reweighter, _ = _run(case, model, batches[:2])
    model.zero_grad()
    with NeverWaits() as mode:
        step = reweighter.backward(*batches[2])
    assert mode.calls > 20
    _assert_same(step, expected, model, near)


@pytest.mark.parametrize("name", ["mlp", "batch norm"])
def test_a_step_where_values_are_at_hand_reads_them(name: str) -> None:
    case = CASES[name]
    model, batches = _drawn(case)
    reweighter, _ = _run(case, model, batches[:2])
    with NeverWaits(), pytest.raises(WaitedError):
        reweighter.backward(*batches[2])


@pytest.mark.usefixtures("far")
def test_a_step_is_probed_as_long_as_a_gradient_is_zero() -> None:
    """A last layer of zeros hides all layers below it from the first step."""
    case = CASES["mlp"]
    model, batches = _drawn(case)
    model.get_submodule("2").weight.data.zero_()
    reweighter, _ = _run(case, model, batches[:1])
    model.get_submodule("2").weight.data.normal_()
    near = copy.deepcopy(model)
    with pytest.raises(WaitedError), NeverWaits():
        reweighter.backward(*batches[1])
    model.zero_grad()
    step = reweighter.backward(*batches[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "readable", lambda x: True)
        expected = _run(case, near, batches[1:2])[1][0]
    _assert_same(step, expected, model, near)
    with NeverWaits():
        reweighter.backward(*batches[2])


@pytest.mark.usefixtures("far")
def test_a_scalar_that_was_zero_hides_nothing() -> None:
    """What it multiplies couples the examples, and shows when it is no longer zero."""
    model = model_of(
        lambda m, x: m.linear(x) + m.alpha * m.linear(x).mean(0),
        linear=nn.Linear(5, 3),
    )
    model.register_buffer("alpha", torch.zeros((), dtype=torch.float64))
    reweighter = Reweighter(model, cross_entropy, engine="layerwise")
    reweighter.backward(vectors(6), vectors(3))
    model.alpha.fill_(0.5)
    with pytest.raises(NotExactError):
        reweighter.backward(vectors(6), vectors(3))


def test_inputs_that_are_not_batched_must_be_the_same_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y, mask = torch.ones(4, 3), torch.zeros(2, 3), torch.ones(3, 3)
    assert merge((x, mask), (y, mask.clone()), 4, 2) is not None
    monkeypatch.setattr(devices, "readable", lambda x: False)
    with NeverWaits():
        merged = merge((x, mask), (y, mask), 4, 2)
        assert merged is not None
        assert merged[1] is mask
        assert merge((x, mask), (y, mask.clone()), 4, 2) is None
        # Once it is settled that both are batched, they need not be compared.
        other = torch.zeros(4, 3)
        assert merge((x, x.clone()), (other, other.clone()), 4, 4, known_batched=True) is not None
        assert merge((x, mask), (other, mask), 4, 4, known_batched=True) is not None
        assert merge((x, x), (other, x), 4, 4, known_batched=True) is None
    with NeverWaits(), pytest.raises(WaitedError):
        merge((x, x.clone()), (other, other.clone()), 4, 4)


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("engine", ["forward", "double_backward"])
def test_mixed_examples_that_are_not_finite(engine: str) -> None:
    """What cannot be left out of a backward spoils the step, which says so when it is read."""
    model = mlp()
    batch, clean = vectors(6), vectors(3)
    batch[0][2] = math.nan
    step = Reweighter(model, cross_entropy, engine=engine).backward(batch, clean)
    assert not step.weights.any()
    for p in model.parameters():
        assert p.grad is not None
        assert not p.grad.any()
    with pytest.raises(ValueError, match="cannot leave them out"):
        _ = step.loss
    model.zero_grad()
    with pytest.raises(ValueError, match=r"losses of examples \[2\] are not finite"):
        Reweighter(model, cross_entropy, engine=engine, check_finite=True).backward(batch, clean)
    assert all(p.grad is None for p in model.parameters())


def _on_cuda(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.cuda(), tree)


@pytest.mark.cuda
@pytest.mark.parametrize("stream", ["default", "other"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_on_cuda_never_waits(name: str, stream: str) -> None:
    case = CASES[name]
    model, batches = _drawn(case)
    expected = _run(case, near := copy.deepcopy(model), batches)[1][-1]
    model.cuda()
    here = [_on_cuda(pair) for pair in batches]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if stream == "other" else None):
        reweighter, _ = _run(case, model, here[:2])
        model.zero_grad()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step = reweighter.backward(*here[2])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    _assert_same(step, expected, model, near)
