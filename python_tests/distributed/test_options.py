"""What works in one process works in several: options, micro-batches, scalers, copies, memory."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from l2rw_ext.reference import relative_error
from support.models import ENGINES
from support.oracle import EXACT, flat
from support.processes import Pool
from support.ranks import (
    SIZES,
    Batches,
    Outcome,
    Rank,
    Setup,
    assert_step,
    assert_steps,
    draw,
    in_parts,
    of_one_process,
    train,
    union,
)

WRAPPERS = {"wrapped": {}, "group given": None}

OPTIONS: dict[str, dict[str, Any]] = {
    "every": {"every": 3},
    "decay": {"direction_decay": 0.7},
    "l2": {"l2": 0.3},
    "layers": {"layers": ["2"]},
    "preconditioner": {"preconditioner": True},
    "all": {"every": 2, "direction_decay": 0.5, "l2": 0.1, "preconditioner": True},
    "compiled": {"compile": "eager"},
    "compiled, every": {"compile": "eager", "every": 2, "direction_decay": 0.5},
    "low memory": {"low_memory": True},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_options(pool: Pool, options: str, optimizer: Any, wrapper: str) -> None:
    setup = Setup(
        options=OPTIONS[options], wrapper=WRAPPERS[wrapper], optimizer=optimizer, rate=0.01
    )
    batches = draw("mlp", SIZES["uneven"], steps=5)
    found = pool.run(train, setup, batches)
    # Adam divides by the square root of small numbers, which magnifies rounding.
    assert_steps(found, of_one_process(setup, batches), tolerance=10 * EXACT)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_clean_batch_may_be_left_out(pool: Pool, ranks: int) -> None:
    setup = Setup(options={"every": 2})
    batches = draw("mlp", SIZES["uneven"][:ranks], steps=4)
    expected = of_one_process(setup, batches)
    for own in batches[1::2]:
        own[:] = [(batch, None) for batch, _ in own]
    assert_steps(pool.run(train, setup, batches, ranks=ranks), expected)


def _indices(batches: Batches, step: int) -> list[Tensor]:
    """Numbers in the training set of each rank's examples, which recur every second step."""
    sizes = [len(batch[1]) for batch, _ in batches[step]]
    return list((torch.arange(sum(sizes)) + (step % 2) * 100).split(sizes))


def _with_index(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> list[Outcome]:
    own, rank = Rank(group, setup), dist.get_rank(group)
    return [own.train(*b[rank], index=_indices(batches, k)[rank]) for k, b in enumerate(batches)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_scores_are_reused(pool: Pool, wrapper: str) -> None:
    setup = Setup(options={"every": 4, "reuse": "scores"}, wrapper=WRAPPERS[wrapper])
    batches = draw("mlp", SIZES["uneven"], steps=6)
    own = Rank(None, setup)
    expected = [
        in_parts(own.train(*union(b), index=torch.cat(_indices(batches, k))), b)
        for k, b in enumerate(batches)
    ]
    found = pool.run(_with_index, setup, batches)
    assert_steps(found, expected)
    assert {"remembered", "layerwise"} == {outcome.engine for outcome in found[0]}


def _in_micro_batches(
    group: dist.ProcessGroup | None, setup: Setup, parts: Batches, steps: int
) -> list[tuple[list[Tensor], dict[str, Tensor | None]]]:
    """Weights of the micro-batches and the gradient, of several steps."""
    own, found = Rank(group, setup), []
    rank = 0 if group is None else dist.get_rank(group)
    for _ in range(steps):
        own.optimizer.zero_grad()
        with own.reweighter.accumulate() as accumulation:
            for k, batches in enumerate(parts):
                batch, clean = union(batches) if group is None else batches[rank]
                step = own.reweighter.backward(batch, clean if k == 0 else None)
        found.append((accumulation.weights, own.outcome(step).gradients))
        own.optimizer.step()
    return found


@pytest.mark.parametrize("wrapper", [{}, {"static_graph": True}, None])
@pytest.mark.parametrize("options", [{}, {"every": 2}, {"compile": "eager"}], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_accumulate(pool: Pool, engine: str, options: dict[str, Any], wrapper: Any) -> None:
    setup = Setup(options={"engine": engine, **options}, wrapper=wrapper)
    parts = draw("mlp", SIZES["uneven"], steps=3)
    expected = _in_micro_batches(None, setup, parts, 3)
    found = pool.run(_in_micro_batches, setup, parts, 3)
    for rank, steps in enumerate(found):
        for (weights, gradients), (of_all, theirs) in zip(steps, expected, strict=True):
            for k, w in enumerate(weights):
                sizes = [len(batch[1]) for batch, _ in parts[k]]
                assert float((w - of_all[k].split(sizes)[rank]).norm()) <= EXACT
            assert relative_error(flat(gradients.values()), flat(theirs.values())) <= EXACT


def _numbers_of_parts(group: dist.ProcessGroup, setup: Setup, parts: Batches) -> list[Any]:
    """Rank r takes r + 1 micro-batches."""
    own, rank = Rank(group, setup), dist.get_rank(group)
    with own.reweighter.accumulate() as accumulation:
        for k in range(rank + 1):
            batch, clean = parts[k][rank]
            step = own.reweighter.backward(batch, clean if k == 0 else None)
    return [accumulation.weights, own.outcome(step).gradients]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ranks_accumulate_any_number_of_micro_batches(pool: Pool, wrapper: str) -> None:
    setup = Setup(wrapper=WRAPPERS[wrapper])
    parts = draw("mlp", SIZES["uneven"], steps=3)
    found = pool.run(_numbers_of_parts, setup, parts)
    taken = [
        [(parts[k][r][0], parts[0][r][1] if k == 0 else None) for k in range(r + 1)]
        for r in range(3)
    ]
    expected = Rank(None, setup).train(*union([pair for own in taken for pair in own]))
    weights = torch.cat([torch.cat(own) for own, _ in found])
    assert float((weights - expected.weights).norm()) <= EXACT
    for _, gradients in found:
        assert relative_error(flat(gradients.values()), flat(expected.gradients.values())) <= EXACT


def _scaled(
    group: dist.ProcessGroup | None, setup: Setup, batches: Batches, scale: float
) -> list[Any]:
    """Outcomes in float32 with a scaler, the scale and the parameters after each step."""
    own, found = Rank(group, setup), []
    own.inner.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for b in batches:
        batch, clean = union(b) if group is None else b[dist.get_rank(group)]
        own.optimizer.zero_grad()
        (x, y), (xc, yc) = batch, clean
        step = own.reweighter.backward((x.float(), y), (xc.float(), yc), grad_scaler=scaler)
        gradients = flat(own.outcome(step).gradients.values())
        scaler.step(own.optimizer)
        scaler.update()
        parameters = flat([p.detach() for p in own.inner.parameters()])
        found.append((step.weights, gradients, scaler.get_scale(), parameters))
    return found


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [2.0**12, 2.0**126])
def test_one_decision_of_the_scaler(pool: Pool, scale: float, engine: str, wrapper: str) -> None:
    """The larger scale overflows on the one rank whose inputs are large."""
    setup = Setup(options={"engine": engine}, wrapper=WRAPPERS[wrapper])
    batches = draw("mlp", SIZES["uneven"], steps=2)
    if scale > 2**100:
        for own in batches:
            own[1][0][0].mul_(100)
    found = pool.run(_scaled, setup, batches, scale)
    expected = _scaled(None, setup, batches, scale)
    for k, (weights, gradients, after, parameters) in enumerate(expected):
        sizes = [len(batch[1]) for batch, _ in batches[k]]
        overflow = not bool(gradients.isfinite().all())
        assert overflow == (scale > 2**100)
        for rank, steps in enumerate(found):
            ours, g, scale_after, p = steps[k]
            assert scale_after == after
            assert relative_error(p, parameters) <= 1e-5
            assert torch.equal(p, found[0][k][3])
            if not overflow:
                assert float((ours - weights.split(sizes)[rank]).norm()) <= 1e-5
                assert relative_error(g, gradients) <= 1e-5
            else:
                assert not bool(g.isfinite().all())


def _autocast(group: dist.ProcessGroup | None, setup: Setup, batches: Batches) -> Outcome:
    own = Rank(group, setup)
    own.inner.float()
    batch, clean = union(batches[0]) if group is None else batches[0][dist.get_rank(group)]
    (x, y), (xc, yc) = batch, clean
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return own.train((x.float(), y), (xc.float(), yc))


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast(pool: Pool, engine: str) -> None:
    setup = Setup(options={"engine": engine})
    batches = draw("mlp", SIZES["uneven"])
    expected = in_parts(_autocast(None, setup, batches), batches[0])
    for t in expected:
        assert t.weights.dtype == torch.float32
    assert_step(pool.run(_autocast, setup, batches), expected, tolerance=5e-2)


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"low_memory": False}], ids=str)
def test_checkpointing(pool: Pool, options: dict[str, Any]) -> None:
    setup = Setup("checkpointed", options=options)
    batches = draw("checkpointed", SIZES["uneven"], steps=3)
    assert_steps(pool.run(train, setup, batches), of_one_process(setup, batches))


def _resumed(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> list[Outcome]:
    """After half of the steps a checkpoint takes the place of the memory."""
    rank = dist.get_rank(group)
    first = Rank(group, setup)
    half = len(batches) // 2
    found = [
        first.train(*b[rank], index=_indices(batches, k)[rank])
        for k, b in enumerate(batches[:half])
    ]
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (first.inner, first.optimizer, first.reweighter)], file)
    file.seek(0)
    second = Rank(group, setup)
    states = torch.load(file, weights_only=True)
    for x, state in zip((second.inner, second.optimizer, second.reweighter), states, strict=True):
        x.load_state_dict(state)
    return found + [
        second.train(*b[rank], index=_indices(batches, k)[rank])
        for k, b in enumerate(batches[half:], start=half)
    ]


@pytest.mark.parametrize(
    "options",
    [{"every": 4, "direction_decay": 0.5}, {"every": 4, "reuse": "scores"}],
    ids=str,
)
def test_state_dict(pool: Pool, options: dict[str, Any]) -> None:
    setup = Setup(options=options)
    batches = draw("mlp", SIZES["uneven"], steps=6)
    expected = pool.run(_with_index, setup, batches)
    for ours, theirs in zip(pool.run(_resumed, setup, batches), expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.weights, b.weights)
            assert torch.equal(flat(a.gradients.values()), flat(b.gradients.values()))


def _copied(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> list[Outcome]:
    """The last step is that of a copy of the reweighter, on the copy's model."""
    rank = dist.get_rank(group)
    own = Rank(group, setup)
    found = [own.train(*b[rank]) for b in batches[:-1]]
    twin = copy.deepcopy(own.reweighter)
    twin.model.zero_grad()
    step = twin.backward(*batches[-1][rank])
    assert all(p.grad is not None for p in twin.model.parameters())
    own.inner = getattr(twin.model, "module", twin.model)
    return [*found, own.outcome(step)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_copy_of_a_reweighter(pool: Pool, wrapper: str) -> None:
    setup = Setup(options={"every": 3}, wrapper=WRAPPERS[wrapper])
    batches = draw("mlp", SIZES["uneven"], steps=3)
    assert_steps(pool.run(_copied, setup, batches), of_one_process(setup, batches))
