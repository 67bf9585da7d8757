"""What DistributedDataParallel does in plain training, it does around a reweighted step."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from l2rw_ext import NotExactError, Reweighter
from l2rw_ext.reference import relative_error
from support.models import ENGINES, cross_entropy, vectors
from support.oracle import EXACT, Truth, flat, gradients_of, truth
from support.processes import SIZE, Pool
from support.ranks import (
    MODELS,
    SIZES,
    Batches,
    Outcome,
    Rank,
    ScaledCrossEntropy,
    Setup,
    assert_step,
    assert_steps,
    draw,
    train,
    truths,
    union,
)

COMPILE = [False, "eager"]


@pytest.mark.parametrize("compile", COMPILE)
@pytest.mark.parametrize(
    "wrapper",
    [
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"bucket_cap_mb": 1e-4},
        {"broadcast_buffers": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("engine", ENGINES)
def test_options(pool: Pool, engine: str, wrapper: dict[str, Any], compile: Any) -> None:
    setup = Setup(options={"engine": engine, "compile": compile}, wrapper=wrapper)
    batches = draw("mlp", SIZES["uneven"], steps=4)
    assert_steps(pool.run(train, setup, batches), truths(setup, batches))


def _added(expected: list[list[Truth]]) -> list[list[Truth]]:
    """Each step's gradient is added to those before."""
    total: dict[str, Tensor | None] = {}
    for step in expected:
        for name, g in step[0].gradients.items():
            before = total.get(name)
            total[name] = g if g is None or before is None else before + g
        for t in step:
            t.gradients = dict(total)
    return expected


def _without_sync(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> list[Outcome]:
    """A step whose gradients stay on the rank, then one that sends both."""
    rank = Rank(group, setup)
    first, second = (own[dist.get_rank(group)] for own in batches)
    with rank.model.no_sync():
        step = rank.outcome(rank.reweighter.backward(*first))
    sent = [g.clone() for g in step.gradients.values() if g is not None]
    total = torch.stack([flat(sent)])
    dist.all_reduce(total, group=group)
    mean = total[0] / dist.get_world_size(group)
    offset = 0
    for name, g in step.gradients.items():
        assert g is not None
        step.gradients[name] = mean[offset : offset + g.numel()].view_as(g)
        offset += g.numel()
    return [step, rank.outcome(rank.reweighter.backward(*second))]


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_sync(pool: Pool, engine: str, view: bool) -> None:
    """The mean over ranks of what stays there is the gradient of the union."""
    wrapper = {"gradient_as_bucket_view": view}
    setup = Setup(options={"engine": engine}, wrapper=wrapper, rate=0.0)
    batches = draw("mlp", SIZES["uneven"], steps=2)
    assert_steps(pool.run(_without_sync, setup, batches), _added(truths(setup, batches)))


def _counting(state, bucket):
    """Has no annotations, because the wrapper refuses those that are strings."""
    state.append(bucket.buffer().numel())
    return default_hooks.allreduce_hook(state[0], bucket)


def _with_hook(
    group: dist.ProcessGroup, setup: Setup, batches: Batches
) -> tuple[list[Outcome], int, int]:
    """The steps, and the numbers that the hook saw and that the parameters have."""
    rank = Rank(group, setup)
    state: list[Any] = [group]
    rank.model.register_comm_hook(state, _counting)
    outcomes = [rank.train(*own[dist.get_rank(group)]) for own in batches]
    return outcomes, sum(state[1:]), sum(p.numel() for p in rank.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_communication_hooks(pool: Pool, engine: str) -> None:
    setup = Setup(options={"engine": engine})
    batches = draw("mlp", SIZES["uneven"], steps=3)
    found = pool.run(_with_hook, setup, batches)
    assert_steps([outcomes for outcomes, *_ in found], truths(setup, batches))
    assert all(seen == 3 * numbers for _, seen, numbers in found)


def _with_parameter_hooks(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> list[str]:
    """Which hooks of parameters have run, in the order of parameters."""
    rank, ran = Rank(group, setup), []
    for name, p in rank.inner.named_parameters():
        p.register_hook(lambda g, name=name: ran.append(name))
        p.register_post_accumulate_grad_hook(lambda p, name=name: ran.append(f"after {name}"))
    rank.train(*batches[0][dist.get_rank(group)])
    return sorted(ran)


@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_of_parameters_run_once(pool: Pool, engine: str) -> None:
    setup = Setup(options={"engine": engine})
    names = [name for name, _ in Rank(None, setup).inner.named_parameters()]
    expected = sorted([*names, *(f"after {name}" for name in names)])
    for ran in pool.run(_with_parameter_hooks, setup, draw("mlp", SIZES["uneven"])):
        assert ran == expected


def _held(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _buffers(
    group: dist.ProcessGroup, setup: Setup, batches: Batches
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The buffers after each step, beside those of the same forward in plain training."""
    rank, found = Rank(group, setup), []
    plain = DistributedDataParallel(
        copy.deepcopy(rank.inner), process_group=group, **(setup.wrapper or {})
    )
    for own in batches:
        batch, clean = own[dist.get_rank(group)]
        rank.train(batch, clean)
        plain.load_state_dict(
            {**plain.state_dict(), **{f"module.{k}": p for k, p in rank.inner.named_parameters()}}
        )
        plain(batch[0]).sum().backward()
        found.append((_held(rank.inner), _held(plain.module)))
    return found


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("engine", ["auto", "double_backward"])
@pytest.mark.parametrize("options", [{}, {"on_degenerate": "skip"}, {"every": 2}], ids=str)
def test_running_statistics_are_those_of_plain_training(
    pool: Pool, engine: str, broadcast: bool, options: dict[str, Any]
) -> None:
    """The last step is degenerate where that is skipped: its forward counts all the same."""
    setup = Setup(
        "batch norm",
        options={"engine": engine, **options},
        wrapper={"broadcast_buffers": broadcast},
        rate=0.0,  # so that parameters are the same before and after a step
    )
    batches = draw("batch norm", SIZES["even"], steps=3)
    if "on_degenerate" in options:
        batches[-1] = [((x, y), (x.clone(), y)) for (x, y), _ in batches[-1]]
    for pairs in pool.run(_buffers, setup, batches):
        for ours, theirs in pairs:
            assert ours.keys() == theirs.keys()
            for name, b in ours.items():
                assert torch.allclose(b, theirs[name], rtol=EXACT, atol=EXACT), name


def _sharded_optimiser(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> list[Outcome]:
    rank = Rank(group, setup)
    rank.optimizer = ZeroRedundancyOptimizer(
        rank.parameters(), setup.optimizer, process_group=group, lr=setup.rate
    )
    return [rank.train(*own[dist.get_rank(group)]) for own in batches]


@pytest.mark.parametrize("ranks", [2, 3])
def test_zero_redundancy_optimizer(pool: Pool, ranks: int) -> None:
    setup = Setup(optimizer=torch.optim.Adam, rate=0.01)
    batches = draw("mlp", SIZES["uneven"][:ranks], steps=4)
    found = pool.run(_sharded_optimiser, setup, batches, ranks=ranks)
    assert_steps(found, truths(setup, batches))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wrapper", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
def test_parameters_of_the_loss_outside_of_the_wrapper(
    pool: Pool, engine: str, wrapper: dict[str, Any]
) -> None:
    setup = Setup(loss=ScaledCrossEntropy, options={"engine": engine}, wrapper=wrapper)
    batches = draw("mlp", SIZES["uneven"], steps=2)
    assert_steps(pool.run(train, setup, batches), truths(setup, batches))


class _Shared(nn.Module):
    """A loss with a parameter of the model, which the wrapper averages, and one that is its own."""

    def __init__(self, of_model: nn.Parameter) -> None:
        super().__init__()
        self.of_model = of_model
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs * self.scale + self.of_model.square(), targets)


def _shared(group: dist.ProcessGroup | None, batches: Batches) -> dict[str, Tensor | None]:
    inner = Rank(None, Setup()).inner
    loss = _Shared(inner[2].bias)
    model, pair = inner, union(batches[0])
    if group is not None:
        model = DistributedDataParallel(inner, process_group=group)
        pair = batches[0][dist.get_rank(group)]
    Reweighter(model, loss).backward(*pair)
    return gradients_of(inner, loss)


def test_a_parameter_of_the_model_in_the_loss(pool: Pool) -> None:
    batches = draw("mlp", SIZES["uneven"])
    expected = _shared(None, batches)
    for gradients in pool.run(_shared, batches):
        assert gradients.keys() == expected.keys()
        found = flat(gradients.values())
        assert relative_error(found, flat(expected.values())) <= EXACT


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_parameters_that_are_not_used(pool: Pool, engine: str) -> None:
    """By no rank, or by the first and the last one alone; sizes of batches decide."""
    setup = Setup("branches", options={"engine": engine}, wrapper={"find_unused_parameters": True})
    batches = draw("branches", [(5, 1), (2, 2), (3, 4)], steps=2)
    batches += draw("branches", [(4, 2), (2, 2), (2, 4)], steps=1)
    assert_steps(pool.run(train, setup, batches), truths(setup, batches))


def _alone(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> list[Outcome]:
    """Steps with a reweighter that knows of no other rank."""
    rank = Rank(group, setup)
    rank.reweighter = Reweighter(rank.model, rank.loss, process_group=None, **setup.options)
    return [rank.train(*own[dist.get_rank(group)]) for own in batches]


@pytest.mark.parametrize("compile", COMPILE)
@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_group_each_rank_weighs_for_itself(pool: Pool, engine: str, compile: Any) -> None:
    """The wrapper averages, so that the gradient is the mean of the ranks' own."""
    setup = Setup(options={"engine": engine, "compile": compile}, rate=0.0)
    batches = draw("mlp", [(6, 4), (3, 2)], steps=4)
    found = pool.run(_alone, setup, batches, ranks=2)
    inner = Rank(None, setup).inner
    for k, own in enumerate(batches):
        expected = [truth(inner, cross_entropy, *b) for b in own]
        mean = sum(flat(t.gradients.values()) for t in expected) / 2
        for outcomes, t in zip(found, expected, strict=True):
            local = Truth(t.scores, t.weights, outcomes[k].gradients, t.clean_loss)
            assert_step([outcomes[k]], [local])
            found_gradient = flat(outcomes[k].gradients.values())
            assert float((found_gradient - mean).norm()) <= EXACT * float(mean.norm())


class _Synchronised(nn.Sequential):
    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(nn.Linear(5, 8), nn.SyncBatchNorm(8, process_group=group), nn.Linear(8, 3))
        self.double()


def _refusals(group: dist.ProcessGroup, batches: Batches) -> list[str]:
    """What a step says under SyncBatchNorm and within Join, and whether gradients are untouched."""
    own = batches[0][dist.get_rank(group)]
    found = []
    model = _Synchronised(group)  # which the wrapper does not take on the CPU
    for engine in ("auto", *ENGINES):
        reweighter = Reweighter(model, cross_entropy, engine=engine, process_group=group)
        with pytest.raises(NotExactError) as caught:
            reweighter.backward(*own)
        found.append(str(caught.value))
    reweighter = Reweighter(model.eval(), cross_entropy, process_group=group)
    assert reweighter.weights(*own).shape == own[0][1].shape
    rank = Rank(group, Setup())
    with Join([rank.model]):
        with pytest.raises(RuntimeError) as failed:
            rank.reweighter.backward(*own)
        found.append(str(failed.value))
        rank.model(own[0][0]).sum().backward()  # so that the context finds its collectives
    assert all(g is None for g in gradients_of(model).values())
    Rank(group, Setup()).train(*own)  # for Join leaves its mark on the wrapper
    return found


CHANGES: dict[str, tuple[bool, Callable[[nn.Module], object]]] = {
    "unfrozen": (True, lambda model: model.requires_grad_(True)),
    "frozen": (False, lambda model: model[0].requires_grad_(False)),
    "another dtype": (False, lambda model: model.float()),
    "replaced": (False, lambda model: setattr(model, "0", nn.Linear(5, 8, dtype=torch.float64))),
}
"""Whether the first layer is frozen when the wrapper is made, and what is done then."""


def _changed(group: dist.ProcessGroup, change: str) -> tuple[str, bool]:
    """What a step says after a change of the parameters, and whether a new wrapper helps."""
    frozen, do = CHANGES[change]
    inner = MODELS["mlp"][0]()
    inner[0].requires_grad_(not frozen)
    model = DistributedDataParallel(inner, process_group=group)
    do(inner)
    batch, clean = (vectors(4, dtype=inner[2].weight.dtype) for _ in range(2))
    with pytest.raises(TypeError) as caught:
        Reweighter(model, cross_entropy).backward(batch, clean)
    model = DistributedDataParallel(inner, process_group=group)
    Reweighter(model, cross_entropy).backward(batch, clean)
    return str(caught.value), all(
        (p.grad is not None) == p.requires_grad for p in inner.parameters()
    )


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_the_wrapper_does_not_average_are_an_error(pool: Pool, change: str) -> None:
    """The wrapper itself would leave their gradients as they are on each rank."""
    for said, repaired in pool.run(_changed, change, ranks=2):
        assert "wrap the model again" in said
        assert repaired


def _another_group(group: dist.ProcessGroup, batches: Batches) -> list[str]:
    """What steps over all ranks say of wrappers that average over one rank, and over all."""
    rank = dist.get_rank(group)
    alone = [dist.new_group([k]) for k in range(dist.get_world_size(group))][rank]
    found = []
    for averaged in (alone, group):
        model = DistributedDataParallel(MODELS["mlp"][0](), process_group=averaged)
        reweighter = Reweighter(model, cross_entropy, process_group=group)
        try:
            reweighter.backward(*batches[0][rank])
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def test_a_wrapper_does_not_average_over_all_ranks_of_a_step(pool: Pool) -> None:
    for said, nothing in pool.run(_another_group, draw("mlp", SIZES["uneven"])):
        assert "does not average gradients over all" in said
        assert not nothing


def test_what_cannot_be_is_one_sentence(pool: Pool) -> None:
    for sentences in pool.run(_refusals, draw("mlp", SIZES["uneven"])):
        assert all("SyncBatchNorm" in s for s in sentences[:-1])
        assert "Join" in sentences[-1]
        assert not any(". " in s or "\n" in s for s in sentences)


def _said_of_a_model_without_a_wrapper(group: dist.ProcessGroup, **options: Any) -> list[str]:
    reweighter = Reweighter(MODELS["mlp"][0](), cross_entropy, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            reweighter.backward(vectors(4), vectors(4))
    return [str(warning.message) for warning in caught]


def test_a_model_without_a_wrapper_is_told_of_it_once(pool: Pool) -> None:
    for said in pool.run(_said_of_a_model_without_a_wrapper):
        assert len(said) == 1
        assert "the model is no DistributedDataParallel" in said[0]
    own = functools.partial(_said_of_a_model_without_a_wrapper, process_group=None)
    assert pool.run(own) == [[]] * SIZE
