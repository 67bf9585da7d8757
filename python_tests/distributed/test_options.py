"""What works in one process works in several: options, micro-batches, scalers, copies, memory."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from l2rw_ext.reference import relative_error
from support.models import ENGINES, cross_entropy, vectors
from support.oracle import EXACT, flat, gradients_of
from support.processes import Pool
from support.ranks import (
    SIZES,
    WRAPPERS,
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

OPTIONS: dict[str, dict[str, Any]] = {
    "every": {"every": 3},
    "decay": {"direction_decay": 0.7},
    "l2": {"l2": 0.3},
    "layers": {"layers": ["2"]},
    "preconditioner": {"preconditioner": True},
    "normalize": {"normalize": "example"},
    "normalize, layers": {"normalize": "example", "layers": ["2"]},
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


def _recorded(
    group: dist.ProcessGroup | None, setup: Setup, batches: Batches, accumulated: bool
) -> list[Tensor]:
    """The tables of the record after steps with an index, which may be in micro-batches."""
    own = Rank(group, setup)
    for k, b in enumerate(batches):
        batch, clean = union(b) if group is None else b[dist.get_rank(group)]
        numbers = _indices(batches, k)
        index = torch.cat(numbers) if group is None else numbers[dist.get_rank(group)]
        if not accumulated:
            own.train(batch, clean, index=index)
            continue
        with own.reweighter.accumulate():
            own.reweighter.backward(batch, clean, index=index)
            own.reweighter.backward(batch, index=index + 20)
    record = own.reweighter.record
    return [record.visits, record.scores, record.mean_scores, record.kept_share]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("accumulated", [False, True])
def test_the_record_has_the_examples_of_all_ranks(
    pool: Pool, accumulated: bool, wrapper: str
) -> None:
    setup = Setup(wrapper=WRAPPERS[wrapper])
    batches = draw("mlp", SIZES["uneven"], steps=3)
    expected = _recorded(None, setup, batches, accumulated)
    for tables in pool.run(_recorded, setup, batches, accumulated):
        for ours, theirs in zip(tables, expected, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert relative_error(ours.nan_to_num(), theirs.nan_to_num()) <= EXACT


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


def _in_float32(batch: Any) -> Any:
    x, y = batch
    return x.float(), y


def _scaled(
    group: dist.ProcessGroup | None, setup: Setup, batches: Batches
) -> list[tuple[Tensor, Tensor]]:
    """Weights and parameters after each step with a scaler."""
    own, found = Rank(group, setup), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for b in batches:
        batch, clean = map(_in_float32, union(b) if group is None else b[dist.get_rank(group)])
        own.optimizer.zero_grad()
        step = own.reweighter.backward(batch, clean, grad_scaler=scaler)
        scaler.step(own.optimizer)
        scaler.update()
        found.append((step.weights, flat([p.detach() for p in own.parameters()])))
    return found


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_steps_of_a_scaler(pool: Pool, engine: str, wrapper: str) -> None:
    setup = Setup(options={"engine": engine}, wrapper=WRAPPERS[wrapper], dtype=torch.float32)
    batches = draw("mlp", SIZES["uneven"], steps=2)
    expected = _scaled(None, setup, batches)
    for rank, steps in enumerate(pool.run(_scaled, setup, batches)):
        for (weights, parameters), (of_all, theirs), b in zip(
            steps, expected, batches, strict=True
        ):
            sizes = [len(batch[1]) for batch, _ in b]
            assert float((weights - of_all.split(sizes)[rank]).norm()) <= 1e-5
            assert relative_error(parameters, theirs) <= 1e-6


class _Loud(nn.Module):
    """Cross entropy times a factor."""

    factor = 1.0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.factor * cross_entropy(outputs, targets)


def _overflow(
    group: dist.ProcessGroup, setup: Setup, batches: Batches
) -> list[tuple[bool, float, Tensor]]:
    """Whether gradients overflowed, the scale afterwards, and the parameters.

    In 16 bits, and in the first two of three steps on rank 1 alone.
    """
    own, rank, found = Rank(group, setup), dist.get_rank(group), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for k, b in enumerate(batches):
        own.loss.factor = 1e8 if rank == 1 and k < 2 else 1.0
        own.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            own.reweighter.backward(*map(_in_float32, b[rank]), grad_scaler=scaler)
        gradients = flat(gradients_of(own.inner).values())
        scaler.step(own.optimizer)
        scaler.update()
        parameters = flat([p.detach() for p in own.parameters()])
        found.append((not bool(gradients.isfinite().all()), scaler.get_scale(), parameters))
    return found


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_one_decision_of_the_scaler(pool: Pool, engine: str, wrapper: str) -> None:
    """All ranks skip the step if the gradients of one have overflowed."""
    setup = Setup(
        loss=_Loud,
        options={"engine": engine, "clean_loss_fn": cross_entropy},
        wrapper=WRAPPERS[wrapper],
        dtype=torch.float32,
    )
    found = pool.run(_overflow, setup, draw("mlp", [(2, 3), (8, 2), (3, 1)], steps=3))
    for steps in found:
        overflowed, scales, parameters = zip(*steps, strict=True)
        assert overflowed == (True, True, False)
        assert scales == (2.0**7, 2.0**6, 2.0**6)
        assert torch.equal(parameters[0], parameters[1])
        assert not torch.equal(parameters[1], parameters[2])
        assert all(map(torch.equal, parameters, (p for *_, p in found[0])))


def _overflow_in_micro_batches(
    group: dist.ProcessGroup, setup: Setup, batches: Batches
) -> list[bool | None]:
    """Which gradients are finite if those of rank 1 overflow and no score of the others counts."""
    own, rank = Rank(group, setup), dist.get_rank(group)
    own.loss.factor = 1e12 if rank == 1 else 1.0
    batch, clean = map(_in_float32, batches[0][rank])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", torch.float16), own.reweighter.accumulate():
        step = own.reweighter.backward(batch, clean, grad_scaler=scaler)
    assert bool(step.scores.isfinite().all()) is (rank != 1)
    assert not bool((step.scores > 0).any())
    return [None if p.grad is None else bool(p.grad.isfinite().all()) for p in own.parameters()]


def _against(outputs: Tensor, targets: Tensor) -> Tensor:
    return -cross_entropy(outputs, targets)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("on_degenerate", ["zero", "uniform", "skip"])
def test_one_rank_overflows_in_accumulate(pool: Pool, on_degenerate: str, wrapper: str) -> None:
    setup = Setup(
        loss=_Loud,
        options={"clean_loss_fn": _against, "on_degenerate": on_degenerate},
        wrapper=WRAPPERS[wrapper],
        dtype=torch.float32,
    )
    x, y = vectors(1)
    same = (x.expand(4, 5), y.expand(4))
    batches = [[(same, same)] * 2]
    for finite in pool.run(_overflow_in_micro_batches, setup, batches, ranks=2):
        assert not any(finite)
        assert None not in finite


def _autocast(group: dist.ProcessGroup | None, setup: Setup, batches: Batches) -> Outcome:
    own = Rank(group, setup)
    batch, clean = union(batches[0]) if group is None else batches[0][dist.get_rank(group)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return own.train(_in_float32(batch), _in_float32(clean))


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast(pool: Pool, engine: str) -> None:
    setup = Setup(options={"engine": engine}, dtype=torch.float32)
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
            assert relative_error(a.weights, b.weights) <= EXACT
            gradients = (flat(x.gradients.values()) for x in (a, b))
            assert relative_error(*gradients) <= EXACT
            assert a.engine == b.engine


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
