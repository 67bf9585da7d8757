"""Steps on parameters that ``fully_shard`` shards are the oracle's, and leave what FSDP2 leaves."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import weight_norm

from l2rw_ext import NotExactError, Reweighter, Step
from l2rw_ext.reference import relative_error
from support import ranks
from support.models import CLASSES, cross_entropy, vectors
from support.oracle import EXACT
from support.processes import SIZE, Pool
from support.ranks import (
    MODELS,
    SIZES,
    Batches,
    Chunked,
    Outcome,
    Setup,
    assert_steps,
    draw,
    of_one_process,
    truths,
)
from support.weighings import WEIGHINGS

SHARDED = ("mlp", "linear", "convolutions", "tokens", "shared", "checkpointed", "weight norm")


def _children(model: nn.Module) -> list[nn.Module]:
    """All that have parameters, but for an embedding: the model may read its weight itself."""
    return [
        m
        for m in model.children()
        if any(True for _ in m.parameters()) and not isinstance(m, nn.Embedding)
    ]


@dataclass(frozen=True)
class Sharding:
    """How ``fully_shard`` is applied."""

    parts: Callable[[nn.Module], Sequence[Any]] = _children
    """The modules that are sharded by themselves, before the rest."""
    options: Mapping[str, Any] = field(default_factory=dict)
    mesh: tuple[int, ...] = ()
    """Its shape; (number of ranks,) if it is empty."""
    rounding: float = EXACT
    """How far gradients may be off those of plain training."""

    def of(self, group: dist.ProcessGroup, model: nn.Module) -> nn.Module:
        """The model, sharded."""
        ranks = dist.get_process_group_ranks(group)
        if len(self.mesh) > 1:
            mesh = DeviceMesh("cpu", torch.tensor(ranks).view(self.mesh), mesh_dim_names=("r", "s"))
        else:
            mesh = DeviceMesh.from_group(group, "cpu")
        for part in self.parts(model):
            fully_shard(part, mesh=mesh, **self.options)
        fully_shard(model, mesh=mesh, **self.options)
        return model


class Rank:
    """Model, reweighter and optimiser of one rank."""

    def __init__(self, group: dist.ProcessGroup, setup: Setup, sharding: Sharding) -> None:
        torch.manual_seed(1)
        self.group = group
        self.rounding = sharding.rounding
        self.plain = MODELS[setup.model][0]()
        self.model = sharding.of(group, copy.deepcopy(self.plain))
        self.plain = sharding.of(group, self.plain)
        self.optimizer = setup.optimizer(self.model.parameters(), lr=setup.rate)
        options = dict(setup.options)
        if options.get("preconditioner"):
            options["preconditioner"] = self.optimizer
        self.reweighter = Reweighter(self.model, cross_entropy, **options)

    def train(self, batch: Any, clean: Any, **arguments: Any) -> Outcome:
        """One step, and the optimiser's."""
        self.optimizer.zero_grad()
        self.plain.zero_grad()
        outcome = self.backward(batch, clean, **arguments)
        self.optimizer.step()
        return outcome

    def backward(self, batch: Any, clean: Any, **arguments: Any) -> Outcome:
        """One step, after which gradients are those of plain training with its weights."""
        for p, q in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            q.detach().copy_(p.detach())
        step = self.reweighter.backward(batch, clean, **arguments)
        losses = cross_entropy(self.plain(batch[0]), batch[1])
        weights = step.weights.to(losses.dtype) * dist.get_world_size(self.group)
        scaler = arguments.get("grad_scaler")
        loss = losses @ weights
        (loss if scaler is None else scaler.scale(loss)).backward()
        return self.outcome(step)

    def outcome(self, step: Step) -> Outcome:
        """What a step that has just been made has left."""
        gradients: dict[str, Tensor | None] = {}
        named = zip(self.model.named_parameters(), self.plain.parameters(), strict=True)
        for (name, p), q in named:
            assert isinstance(p, DTensor)
            assert type(p.grad) is type(q.grad), name
            gradients[name] = None
            if isinstance(p.grad, DTensor) and isinstance(q.grad, DTensor):
                assert p.grad._spec == q.grad._spec, name
                ours, theirs = p.grad.to_local(), q.grad.to_local()
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
                rounding = self.rounding * float(q.grad.full_tensor().norm())
                assert float((ours - theirs).norm()) <= rounding, name
                gradients[name] = p.grad.full_tensor()
        return Outcome(
            step.scores,
            step.weights,
            gradients,
            step.clean_loss,
            step.degenerate,
            step.nonfinite,
            step.effective_sample_size,
            step.engine,
        )


def train(
    group: dist.ProcessGroup, setup: Setup, sharding: Sharding, steps: Batches
) -> list[Outcome]:
    """The steps of a rank."""
    rank = Rank(group, setup, sharding)
    return [rank.train(*batches[dist.get_rank(group)]) for batches in steps]


def _assert_exact(
    pool: Pool,
    setup: Setup,
    sharding: Sharding = Sharding(),
    ranks: int = 2,
    tolerance: float = EXACT,
) -> None:
    batches = draw(setup.model, SIZES["uneven"][:ranks], 3)
    found = pool.run(train, setup, sharding, batches, ranks=ranks)
    assert_steps(found, truths(setup, batches), tolerance)
    assert {outcome.engine for outcomes in found for outcome in outcomes} == {"layerwise"}


@pytest.mark.parametrize("name", WEIGHINGS)
def test_weighings_see_the_union(pool: Pool, name: str) -> None:
    own, plain = WEIGHINGS[name]
    batches = draw("mlp", SIZES["uneven"][:2])
    setup = Setup(options={"weighing": own})
    found = pool.run(train, setup, Sharding(), batches, ranks=2)
    ((first, second),) = truths(setup, batches)
    expected = plain(torch.cat([first.scores, second.scores]))
    weights = torch.cat([outcomes[0].weights for outcomes in found])
    assert relative_error(weights, expected) < EXACT


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("model", SHARDED)
def test_models(pool: Pool, model: str, low_memory: bool) -> None:
    _assert_exact(pool, Setup(model, options={"low_memory": low_memory}))


@pytest.mark.parametrize("ranks", [1, SIZE])
def test_numbers_of_ranks(pool: Pool, ranks: int) -> None:
    for model in ("tokens", "checkpointed"):
        _assert_exact(pool, Setup(model), ranks=ranks)


def _none(model: nn.Module) -> Sequence[nn.Module]:
    return ()


def _together(model: nn.Module) -> list[list[nn.Module]]:
    """One group of several modules."""
    return [_children(model)]


def _gathers(group: dist.ProcessGroup, batches: Batches) -> list[int]:
    """How often a plain step and later reweighted ones gather parameters, and reduce gradients."""
    own, rank = Rank(group, Setup("mlp"), Sharding()), group.rank()
    counts = []

    def count(step: Callable[[], Any]) -> None:
        with torch.profiler.profile() as profile:
            step()
        names = [event.name for event in profile.events()]
        counts.extend(
            sum(n.startswith(f"FSDP::{what}") for n in names)
            for what in ("all_gather (", "post_backward_reduce")
        )

    for batch, clean in (step[rank] for step in batches[:2]):
        own.train(batch, clean)
    batch, clean = batches[2][rank]
    count(lambda: cross_entropy(own.plain(batch[0]), batch[1]).sum().backward())
    count(lambda: own.reweighter.backward(batch, clean))
    return counts


def test_a_step_gathers_and_reduces_twice_what_a_plain_step_does(pool: Pool) -> None:
    """Once for the clean batch and once for the training batch: nothing is probed or proved."""
    found = pool.run(_gathers, draw("mlp", [(4, 2)] * 2, 3), ranks=2)
    for plain_gathers, plain_reduces, gathers, reduces in found:
        assert plain_gathers > 0
        assert plain_reduces > 0
        assert gathers == 2 * plain_gathers
        assert reduces == 2 * plain_reduces


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("parts", [_children, _none, _together])
def test_how_modules_are_sharded(pool: Pool, parts: Any, reshard: bool, low_memory: bool) -> None:
    sharding = Sharding(parts, {"reshard_after_forward": reshard})
    _assert_exact(pool, Setup(options={"low_memory": low_memory}), sharding)


def _hooked(group: dist.ProcessGroup, batches: Batches) -> list[Outcome]:
    """Of a model whose hook may do anything to gradients, so that each step is probed."""
    own = Rank(group, Setup(), Sharding())
    for model in (own.model, own.plain):
        model[1].register_forward_hook(lambda _, args, out: out.register_hook(lambda g: g) and None)
    return [own.train(*step[group.rank()]) for step in batches]


def test_each_step_may_be_probed(pool: Pool) -> None:
    batches = draw("mlp", SIZES["uneven"][:2], 2)
    assert_steps(pool.run(_hooked, batches, ranks=2), truths(Setup(), batches))


def _in_chunks(group: dist.ProcessGroup, batches: Batches) -> list[Outcome]:
    """Of a model that calls its layers more often on one rank, as a loop over time may."""
    own, rank = Rank(group, Setup("chunked"), Sharding()), group.rank()
    for model in (own.model, own.plain):
        for module in model.modules():
            if isinstance(module, Chunked):
                module.at_once = 1 + rank
    return [own.train(*step[rank]) for step in batches]


def test_ranks_may_call_a_layer_another_number_of_times(pool: Pool) -> None:
    batches = draw("chunked", SIZES["uneven"][:2], 2)
    assert_steps(pool.run(_in_chunks, batches, ranks=2), truths(Setup("chunked"), batches))


class _Ordered(nn.Module):
    """Two layers of one shape, in an order that each rank may choose."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.head = nn.Linear(5, CLASSES)
        self.order = [0, 1]

    def forward(self, x: Tensor) -> Tensor:
        for number in self.order:
            x = torch.tanh(self.layers[number](x))
        outputs = self.head(x)
        assert isinstance(outputs, Tensor)
        return outputs


def _in_other_orders(group: dist.ProcessGroup, proved: bool, batches: Batches) -> str:
    torch.manual_seed(1)
    model = _Ordered().double()
    Sharding(_none).of(group, model)
    reweighter, mine = Reweighter(model, cross_entropy), batches[0][group.rank()]
    orders = [[0, 1], [1, 0]] if group.rank() else [[0, 1], [0, 1]]
    if proved:  # of both orders, so that a plan is known for each
        for order in ([0, 1], [1, 0]):
            model.order = order
            reweighter.backward(*mine)
    model.order = orders[1]
    with pytest.raises(NotExactError) as raised:
        reweighter.backward(*mine)
    model.order = orders[0]
    reweighter.backward(*mine)
    return str(raised.value)


@pytest.mark.parametrize("proved", [False, True])
def test_other_orders_of_layers_on_ranks_are_an_error(pool: Pool, proved: bool) -> None:
    for said in pool.run(_in_other_orders, proved, draw("mlp", SIZES["uneven"][:2]), ranks=2):
        assert "use them in another order" in said


def _without_backward(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> list[Tensor]:
    """Losses of steps after whose forwards without a backward an optimiser moves the shards."""
    own, rank = Rank(group, setup, Sharding(options={"reshard_after_forward": False})), group.rank()
    found = []
    for step in batches:
        batch, clean = step[rank]
        index = torch.arange(4 * rank, 4 * rank + 4)
        own.optimizer.zero_grad()
        found.append(own.reweighter.backward(batch, clean, index=index).losses)
        if setup.options:
            own.reweighter.explain(batch, clean, index=index)  # of remembered scores
        else:
            with torch.no_grad():
                own.model(batch[0])
        own.optimizer.step()
    return found


@pytest.mark.parametrize("options", [{}, {"every": 9, "reuse": "scores"}])
def test_parameters_are_gathered_anew(pool: Pool, options: dict[str, Any]) -> None:
    batches = draw("mlp", [(4, 2)] * 2, 1) * 4
    found = pool.run(_without_backward, Setup(options=options), batches, ranks=2)
    one = ranks.Rank(None, Setup(options=options))
    for step, parts in zip(batches, zip(*found, strict=True), strict=True):
        batch, clean = ranks.union(step)
        one.optimizer.zero_grad()
        expected = one.reweighter.backward(batch, clean, index=torch.arange(8)).losses
        one.optimizer.step()
        assert relative_error(torch.cat(parts), expected) <= EXACT


OPTIONS: dict[str, dict[str, Any]] = {
    "every": {"every": 3},
    "direction_decay": {"direction_decay": 0.6, "every": 2},
    "l2": {"l2": 0.3},
    "layers": {"layers": ["2", "*.bias"]},
    "preconditioner": {"preconditioner": True},
    "uniform": {"on_degenerate": "uniform"},
    "replicated_clean": {"replicated_clean": True},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1, nesterov=True),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(pool: Pool, option: str, optimizer: str) -> None:
    setup = Setup(options=OPTIONS[option], optimizer=_Optimizer(optimizer))
    batches = draw(setup.model, SIZES["uneven"][:2], 5)
    if option == "replicated_clean":
        batches = [[(batch, step[0][1]) for batch, _ in step] for step in batches]
    sharding = Sharding(options={"reshard_after_forward": False})
    found = pool.run(train, setup, sharding, batches, ranks=2)
    assert_steps(found, of_one_process(setup, batches))


@dataclass(frozen=True)
class _Optimizer:
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.name](*args, **kwargs)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), (1, 3), (3, 1)])
def test_hybrid_sharding(pool: Pool, mesh: tuple[int, int], low_memory: bool) -> None:
    setup = Setup(options={"low_memory": low_memory})
    _assert_exact(pool, setup, Sharding(mesh=mesh), ranks=mesh[0] * mesh[1])


POLICIES: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({"param_dtype": torch.float32, "reduce_dtype": torch.float64}, 1e-5),
    "bfloat16": ({"param_dtype": torch.bfloat16, "output_dtype": torch.float32}, 3e-2),
    "reduced": ({"reduce_dtype": torch.float32}, 1e-6),
}


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_mixed_precision(pool: Pool, policy: str, low_memory: bool) -> None:
    options, rounding = POLICIES[policy]
    sharding = Sharding(options={"mp_policy": MixedPrecisionPolicy(**options)}, rounding=rounding)
    setup = Setup(options={"low_memory": low_memory})
    _assert_exact(pool, setup, sharding, tolerance=5 * rounding)


def test_offloading(pool: Pool) -> None:
    policy = CPUOffloadPolicy(pin_memory=False)
    _assert_exact(pool, Setup(), Sharding(options={"offload_policy": policy}))


def _several(group: dist.ProcessGroup, low_memory: bool, batches: Batches) -> None:
    """Gradients add up over steps, with and without FSDP's own way of accumulating."""
    own, rank = Rank(group, Setup(options={"low_memory": low_memory}), Sharding()), group.rank()
    calls: list[str] = []
    for name, p in own.model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(name))
    for step in batches[:2]:
        with torch.no_grad():  # after which the model holds other parameters than in training
            own.model(step[rank][0][0])
        own.backward(*step[rank])
    assert sorted(calls) == sorted([name for name, _ in own.model.named_parameters()] * 2)
    for model in (own.model, own.plain):
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(False)
    # Plain training keeps whole gradients until the last backward, and these steps keep none.
    for (batch, clean), x in ((step[rank], step[rank][0]) for step in batches[2:4]):
        step = own.reweighter.backward(batch, clean)
        losses = cross_entropy(own.plain(x[0]), x[1])
        (losses @ step.weights * group.size()).backward()
    for model in (own.model, own.plain):
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(True)
    own.backward(*batches[4][rank])
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (own.model, own.plain)]
    assert all(isinstance(norm, DTensor) for norm in norms)
    assert torch.allclose(*(norm.full_tensor() for norm in norms), rtol=EXACT)


@pytest.mark.parametrize("low_memory", [False, True])
def test_gradients_add_up(pool: Pool, low_memory: bool) -> None:
    pool.run(_several, low_memory, draw("mlp", SIZES["uneven"][:2], 5), ranks=2)


def _accumulated(
    group: dist.ProcessGroup, options: dict[str, Any], batches: Batches
) -> tuple[list[Tensor], dict[str, Tensor]]:
    own = Rank(group, Setup(options=options), Sharding())
    with own.reweighter.accumulate() as accumulation:
        for step in batches:
            own.reweighter.backward(*step[group.rank()])
    gradients = {}
    for name, p in own.model.named_parameters():
        assert isinstance(p.grad, DTensor)
        gradients[name] = p.grad.full_tensor()
    return accumulation.weights, gradients


@pytest.mark.parametrize("on_degenerate", ["zero", "uniform"])
def test_micro_batches(pool: Pool, on_degenerate: str) -> None:
    batches = draw("mlp", SIZES["uneven"][:2], 3)
    found = pool.run(_accumulated, {"on_degenerate": on_degenerate}, batches, ranks=2)
    joined = [
        [
            tuple(map(torch.cat, zip(*(step[r][0] for step in batches), strict=True)))
            for r in range(2)
        ]
    ]
    whole = [[(joined[0][r], batches[0][r][1]) for r in range(2)]]
    (expected,) = truths(Setup(), whole)
    for (weights, gradients), truth in zip(found, expected, strict=True):
        assert relative_error(torch.cat(weights), truth.weights) <= EXACT
        for name, g in gradients.items():
            assert relative_error(g, truth.gradients[name]) <= EXACT, name


_ERRORS = {
    "input": "RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    "middle": "ValueError: in the middle",
    "loss": "KeyError: 'in the loss'",
    "nan": "ValueError: clean batch: the mean loss is nan",
    "clean": "RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    "argument": "TypeError: training batch: expected a pair",
}
FAULTS = tuple(_ERRORS)


class _Faulty(nn.Module):
    """Raises in the middle of the forward of an input that begins with -1."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x[:, :1] == -1).any()):
            raise ValueError("in the middle")
        return x


def _faults(group: dist.ProcessGroup, batches: Batches) -> list[list[str]]:
    """What each rank raises if one of them meets a fault; steps before and after are right."""
    torch.manual_seed(1)
    derived = weight_norm(nn.Linear(8, 8))  # is gathered for its direction, too
    layers = (nn.Linear(5, 8), nn.Linear(8, 8), _Faulty(), derived, nn.Linear(8, CLASSES))
    model = Sharding().of(group, nn.Sequential(*layers).double())
    rank, said = group.rank(), []
    failing: list[str] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if failing == ["loss"]:
            raise KeyError("in the loss")
        return cross_entropy(outputs, targets)

    model[2].register_forward_pre_hook(
        lambda m, args: args[0] * 0 - 1 if failing == ["middle"] else None
    )
    reweighter = Reweighter(model, loss)
    for number, fault in enumerate([f for f in FAULTS for _ in range(2)]):
        batch, clean = batches[number][rank]
        before = reweighter.weights(batch, clean)
        gradients = [p.grad for p in model.parameters()]
        if rank == number % 2:
            failing[:] = [fault]
            if fault == "input":
                batch = (batch[0][:, :3], batch[1])
            elif fault == "nan":
                clean = (clean[0] * float("nan"), clean[1])
            elif fault == "clean":
                clean = (clean[0][:, :3], clean[1])
            elif fault == "argument":
                batch = batch[0]
        try:
            reweighter.backward(batch, clean)
            said.append("nothing")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        failing.clear()
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        assert torch.equal(reweighter.weights(*batches[number][rank]), before)
        reweighter.backward(*batches[number][rank])
    return said


def test_an_error_on_one_rank_is_one_on_all(pool: Pool) -> None:
    batches = draw("mlp", SIZES["uneven"][:2], 2 * len(FAULTS))
    by_rank = pool.run(_faults, batches, ranks=2)
    for number, said in enumerate(zip(*by_rank, strict=True)):
        fault, failed = FAULTS[number // 2], number % 2
        own, other = said[failed], said[1 - failed]
        assert _ERRORS[fault] in own, own
        if fault != "nan":  # which both find in the mean clean loss of all
            own = f"RankError: rank {failed} failed: {own}"
        assert other == own


class _Backwards(nn.Module):
    """Its forward calls the layers in another order than that in which it has them."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(7, CLASSES), nn.Linear(8, 7), nn.Linear(5, 8)
        self.faulty = _Faulty()

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.last(torch.tanh(self.middle(self.faulty(torch.tanh(self.first(x))))))
        assert isinstance(outputs, Tensor)
        return outputs


def _at_first(group: dist.ProcessGroup, batches: Batches) -> list[str]:
    """What is raised by steps that fail before any has worked, and by one that works."""
    torch.manual_seed(1)
    model = _Backwards().double()
    Sharding().of(group, model)
    failing: list[bool] = []
    model.faulty.register_forward_pre_hook(lambda m, args: args[0] * 0 - 1 if failing else None)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if where == "loss":
            raise KeyError("in the loss")
        return cross_entropy(outputs, targets)

    reweighter, said = Reweighter(model, loss), []
    for number, fault in enumerate(["middle", "loss", "middle", ""]):
        own = group.rank() == number % 2
        failing[:] = [True] if own and fault == "middle" else []
        where = fault if own else ""
        try:
            reweighter.backward(*batches[0][group.rank()])
        except Exception as error:
            said.append(type(error).__name__)
    return said


def test_an_error_in_the_first_forward_on_one_rank_is_one_on_all(pool: Pool) -> None:
    found = pool.run(_at_first, draw("mlp", SIZES["uneven"][:2]), ranks=2)
    assert found == [
        ["ValueError", "RankError", "ValueError"],
        ["RankError", "KeyError", "RankError"],
    ]


def _scaled(group: dist.ProcessGroup, batches: Batches) -> None:
    own, rank = Rank(group, Setup("linear"), Sharding()), group.rank()
    own.backward(*batches[0][rank], grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    # The gradient of one rank overflows, and all skip the step.
    model = Sharding().of(group, nn.Linear(5, CLASSES))
    before = [p.detach().to_local().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    (x, y), (x_clean, y_clean) = batches[1][rank]
    batch = (x.float() * (1e4 if rank else 1), y)
    step = Reweighter(model, cross_entropy).backward(
        batch, (x_clean.float(), y_clean), grad_scaler=scaler
    )
    assert bool(step.losses.isfinite().all())
    assert all(
        bool(p.grad.to_local().isinf().all())
        for p in model.parameters()
        if p.grad.to_local().numel()
    )
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**119
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach().to_local(), q)


def test_a_loss_scale(pool: Pool) -> None:
    pool.run(_scaled, draw("linear", SIZES["uneven"][:2], 2), ranks=2)


def _partly(group: dist.ProcessGroup, batches: Batches) -> list[Outcome]:
    """With frozen parameters, and with a layer that nothing reaches."""
    own = Rank(group, Setup("branches"), Sharding())
    for model in (own.model, own.plain):
        model.get_submodule("body").bias.requires_grad_(False)
    return [own.train(*step[group.rank()]) for step in batches]


def test_frozen_and_unused_parameters(pool: Pool) -> None:
    setup = Setup("branches")
    batches = draw("branches", SIZES["even"][:2], 2)
    for outcomes in pool.run(_partly, batches, ranks=2):
        for outcome in outcomes:
            missing = {name for name, g in outcome.gradients.items() if g is None}
            assert missing == {"body.bias"} | {
                f"{m}.{p}" for m in ("odd", "unused") for p in ("weight", "bias")
            }
    assert setup.model == "branches"


def _with_index(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> list[Outcome]:
    own, rank, found = Rank(group, setup, Sharding()), group.rank(), []
    for k, step in enumerate(batches):
        sizes = [len(batch[1]) for batch, _ in step]
        index = (torch.arange(sum(sizes)) + (k % 2) * 100).split(sizes)[rank]
        found.append(own.train(*step[rank], index=index))
    return found


def test_scores_are_reused(pool: Pool) -> None:
    setup = Setup(options={"every": 3, "reuse": "scores"})
    batches = draw("mlp", [(4, 2)] * 2, 6)
    batches[2] = batches[0]
    for outcomes in pool.run(_with_index, setup, batches, ranks=2):
        engines = [outcome.engine for outcome in outcomes]
        assert engines == ["layerwise", "layerwise", "remembered", "layerwise"] + ["remembered"] * 2
        assert torch.allclose(outcomes[2].scores, outcomes[0].scores, rtol=EXACT)


def _saved(group: dist.ProcessGroup, folder: str, batches: Batches) -> None:
    """A run continues from a distributed checkpoint, the held direction included."""
    setup = Setup(options={"every": 2, "direction_decay": 0.5}, optimizer=torch.optim.Adam)
    runs = [Rank(group, setup, Sharding()) for _ in range(2)]
    rank = group.rank()
    for step in batches[:3]:
        runs[0].train(*step[rank])

    def state(run: Rank) -> dict[str, Any]:
        model, optimizer = get_state_dict(run.model, run.optimizer)
        held = run.reweighter.state_dict()["direction"]["direction"]["values"]
        return {"model": model, "optimizer": optimizer, "direction": held}

    checkpoint.save(state(runs[0]), checkpoint_id=folder, process_group=group)
    runs[1].train(*batches[0][rank])  # so that there is a state to load into
    loaded = state(runs[1])
    checkpoint.load(loaded, checkpoint_id=folder, process_group=group)
    set_state_dict(
        runs[1].model,
        runs[1].optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )
    reweighter = runs[0].reweighter.state_dict()
    reweighter["direction"]["direction"]["values"] = loaded["direction"]
    runs[1].reweighter.load_state_dict(reweighter)
    for step in batches[3:]:
        first, second = (run.train(*step[rank]) for run in runs)
        assert torch.equal(first.scores, second.scores)
        for name, g in first.gradients.items():
            theirs = second.gradients[name]
            assert g is not None
            assert theirs is not None
            assert torch.equal(g, theirs), name


def test_a_distributed_checkpoint(pool: Pool, tmp_path: Path) -> None:
    pool.run(_saved, str(tmp_path), draw("mlp", SIZES["uneven"][:2], 5), ranks=2)


def _grouped(group: dist.ProcessGroup, batches: Batches) -> str:
    """What ``explain()`` says, and the error for a group that is not that of the mesh."""
    own, rank = Rank(group, Setup(), Sharding()), group.rank()
    with pytest.raises(ValueError, match="no rank can be weighed alone"):
        Reweighter(own.model, cross_entropy, process_group=None).backward(*batches[0][rank])
    with pytest.raises(ValueError, match="so that each rank needs one"):
        own.reweighter.backward(batches[0][rank][0], batches[0][rank][1] if rank == 0 else None)
    return str(own.reweighter.explain(*batches[0][rank]))


def test_groups(pool: Pool) -> None:
    for said in pool.run(_grouped, draw("mlp", [(4, 2)] * 2), ranks=2):
        assert "2 ranks, among which parameters are sharded" in said


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def _peaks(group: dist.ProcessGroup, width: int, depth: int) -> dict[str, int]:
    """The largest resident memory, less what is there without the model, by how a step is made."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed is given back
    empty = resident()
    torch.manual_seed(0)
    model = nn.Sequential(*(_Block(width) for _ in range(depth)), nn.Linear(width, CLASSES))
    Sharding().of(group, model)
    batch, clean = (vectors(n, width, dtype=torch.float32) for n in (4, 2))

    def plain() -> None:
        cross_entropy(model(batch[0]), batch[1]).mean().backward()

    steps: dict[str, Callable[[], Any]] = {"plain": plain}
    for low_memory in (False, True):
        reweighter = Reweighter(model, cross_entropy, low_memory=low_memory)
        steps[f"low_memory={low_memory}"] = functools.partial(reweighter.backward, batch, clean)
    peaks = {}
    for name, step in steps.items():
        for _ in range(3):  # the first loads libraries, and makes a plan
            model.zero_grad()
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
            step()
            peaks[name] = resident("VmHWM") - empty
    return peaks


def resident(kind: str = "VmRSS") -> int:
    """Bytes of this process that are in memory, now or (``"VmHWM"``) at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def test_the_peak_of_memory_is_that_of_a_plain_step(pool: Pool) -> None:
    for peaks in pool.run(_peaks, 512, 6, ranks=2, seconds=120):
        assert peaks["low_memory=True"] <= 1.2 * peaks["plain"], peaks
        assert peaks["low_memory=False"] <= 1.2 * peaks["plain"], peaks
