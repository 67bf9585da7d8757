"""Steps on parameters that ``fully_shard`` shards are the oracle's, and leave what FSDP2 leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from l2rw_ext import NotExactError, Reweighter, Step
from l2rw_ext.reference import relative_error
from support.models import CLASSES, cross_entropy, model_of, vectors
from support.oracle import EXACT
from support.processes import SIZE, Pool
from support.ranks import (
    MODELS,
    SIZES,
    Batches,
    Outcome,
    Setup,
    assert_steps,
    draw,
    of_one_process,
    truths,
)

SHARDED = ("mlp", "linear", "convolutions", "tokens", "shared", "checkpointed")


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

    parts: Callable[[nn.Module], Sequence[nn.Module]] = _children
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


@pytest.mark.parametrize("ranks", range(1, SIZE + 1))
@pytest.mark.parametrize("low_memory", [False, True, "auto"])
@pytest.mark.parametrize("model", SHARDED)
def test_models(pool: Pool, model: str, low_memory: Any, ranks: int) -> None:
    _assert_exact(pool, Setup(model, options={"low_memory": low_memory}), ranks=ranks)


def _none(model: nn.Module) -> Sequence[nn.Module]:
    return ()


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("parts", [_children, _none])
def test_how_modules_are_sharded(
    pool: Pool, parts: Any, reshard: bool, low_memory: bool
) -> None:
    sharding = Sharding(parts, {"reshard_after_forward": reshard})
    _assert_exact(pool, Setup(options={"low_memory": low_memory}), sharding)


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
    joined = [[tuple(map(torch.cat, zip(*(step[r][0] for step in batches), strict=True)))
               for r in range(2)]]
    whole = [[(joined[0][r], batches[0][r][1]) for r in range(2)]]
    (expected,) = truths(Setup(), whole)
    for (weights, gradients), truth in zip(found, expected, strict=True):
        assert relative_error(torch.cat(weights), truth.weights) <= EXACT
        for name, g in gradients.items():
            assert relative_error(g, truth.gradients[name]) <= EXACT, name


FAULTS = ("input", "middle", "loss", "nan", "clean", "argument")


class _Faulty(nn.Module):
    """Raises in the middle of the forward of an input that begins with -1."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x[:, :1] == -1).any()):
            raise ValueError("in the middle")
        return x


def _faults(group: dist.ProcessGroup, batches: Batches) -> list[list[str]]:
    """What each rank raises if one of them meets a fault, and that steps are right before and after."""
    torch.manual_seed(1)
    layers = (nn.Linear(5, 8), nn.Linear(8, 8), _Faulty(), nn.Linear(8, 8), nn.Linear(8, CLASSES))
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
        fault = FAULTS[number // 2]
        print(fault, said)
