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
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from l2rw_ext import NotExactError, Reweighter
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
        self.plain = MODELS[setup.model][0]()
        self.model = sharding.of(group, copy.deepcopy(self.plain))
        self.plain = sharding.of(group, self.plain)
        self.optimizer = setup.optimizer(self.model.parameters(), lr=setup.rate)
        options = dict(setup.options)
        if options.get("preconditioner"):
            options["preconditioner"] = self.optimizer
        self.reweighter = Reweighter(self.model, cross_entropy, **options)

    def train(self, batch: Any, clean: Any, **arguments: Any) -> Outcome:
        """One step, whose gradients are those of plain training with its weights."""
        for p, q in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            q.detach().copy_(p.detach())
        self.optimizer.zero_grad()
        self.plain.zero_grad()
        step = self.reweighter.backward(batch, clean, **arguments)
        losses = cross_entropy(self.plain(batch[0]), batch[1])
        (losses @ step.weights * dist.get_world_size(self.group)).backward()
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
                assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), name
                gradients[name] = p.grad.full_tensor()
        self.optimizer.step()
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
    steps: int = 3,
    sizes: str = "uneven",
) -> None:
    batches = draw(setup.model, SIZES[sizes][:ranks], steps)
    found = pool.run(train, setup, sharding, batches, ranks=ranks)
    assert_steps(found, truths(setup, batches))
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
