"""A step with a plan never synchronises with the device.

On the CPU this is tested as if the values of tensors were not readable.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from l2rw_ext import NotExactError, Reweighter, Step, devices, ops
from l2rw_ext.data.batch import merge
from l2rw_ext.engines.layerwise import scoring
from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.reference import relative_error
from support.device_cases import CASES, Batch, Case
from support.models import cross_entropy, mlp, model_of, vectors
from support.synchronisation import NoSynchronisation, SynchronisedError

BOUND = 1e-11
"""Of float64 steps whose sums have another order."""


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is readable, and operators are compositions, as on CUDA."""
    monkeypatch.setattr(devices, "synchronous", lambda x: False)
    monkeypatch.setattr(scoring, "in_groups", lambda g: True)
    for name, operator in OPERATORS.items():
        monkeypatch.setattr(ops, name, operator.composition)


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
def test_a_step_with_a_plan_does_not_synchronise(name: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    model, batches = _drawn(case)
    near = copy.deepcopy(model)
    expected = _run(case, near, batches)[1][-1]

    request.getfixturevalue("far")
    reweighter, _ = _run(case, model, batches[:2])
    model.zero_grad()
    with NoSynchronisation() as mode:
        step = reweighter.backward(*batches[2])
    assert mode.calls > 20
    _assert_same(step, expected, model, near)


@pytest.mark.parametrize("name", ["mlp", "batch norm"])
def test_a_step_where_values_are_readable_reads_them(name: str) -> None:
    case = CASES[name]
    model, batches = _drawn(case)
    reweighter, _ = _run(case, model, batches[:2])
    with NoSynchronisation(), pytest.raises(SynchronisedError, match="would wait for the device"):
        reweighter.backward(*batches[2])


@pytest.mark.usefixtures("far")
def test_a_scalar_that_was_zero_hides_nothing() -> None:
    """What it multiplies couples the examples, which is known before it is no longer zero."""
    model = model_of(
        lambda m, x: m.linear(x) + m.alpha * m.linear(x).mean(0),
        linear=nn.Linear(5, 3),
    )
    model.register_buffer("alpha", torch.zeros((), dtype=torch.float64))
    reweighter = Reweighter(model, cross_entropy, engine="layerwise")
    with pytest.raises(NotExactError, match=r"mean .* mixes examples"):
        reweighter.backward(vectors(6), vectors(3))


def test_inputs_that_are_not_batched_must_be_the_same_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y, mask = torch.ones(4, 3), torch.zeros(2, 3), torch.ones(3, 3)
    assert merge((x, mask), (y, mask.clone()), 4, 2) is not None
    monkeypatch.setattr(devices, "synchronous", lambda x: False)
    with NoSynchronisation():
        merged = merge((x, mask), (y, mask), 4, 2)
        assert merged is not None
        assert merged[1] is mask
        assert merge((x, mask), (y, mask.clone()), 4, 2) is None
        # Once it is settled that both are batched, they need not be compared.
        other = torch.zeros(4, 3)
        assert merge((x, x.clone()), (other, other.clone()), 4, 4, known_batched=True) is not None
        assert merge((x, mask), (other, mask), 4, 4, known_batched=True) is not None
        assert merge((x, x), (other, x), 4, 4, known_batched=True) is None
    with NoSynchronisation(), pytest.raises(SynchronisedError):
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
def test_a_step_on_cuda_does_not_synchronise(name: str, stream: str) -> None:
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


@pytest.mark.cuda
@pytest.mark.parametrize("how", [True, "cudagraphs"], ids=["inductor", "cudagraphs"])
@pytest.mark.parametrize("name", ["mlp", "group norm", "transformer", "embedding", "batch norm"])
def test_a_step_on_cuda_becomes_one_graph(name: str, how: bool | str) -> None:
    case = CASES[name]
    model, batches = _drawn(case)
    batches = [*batches[:2], *batches]  # kinds are compiled at their second step, and replayed then
    expected = _run(case, near := copy.deepcopy(model), batches)[1][-1]
    model.cuda()
    _, steps = _run(case, model, [_on_cuda(pair) for pair in batches], compile=how)
    _assert_same(steps[-1], expected, model, near)
