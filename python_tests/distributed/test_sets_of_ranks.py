"""Scores along several clean batches, each of which is the union of what all ranks have of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from l2rw_ext import NotExactError, Reweighter
from l2rw_ext.reference import relative_error
from support.models import cross_entropy
from support.oracle import EXACT, truth_of_ranks, unchanged
from support.processes import Pool
from support.ranks import MODELS, WRAPPERS, Rank, Setup, union

NAMES = ("first", "second", "third")


def _drawn(model: str) -> tuple[list[Any], list[dict[str, Any]]]:
    """Training batches and clean sets by rank; only rank 0 has the third set."""
    torch.manual_seed(0)
    make = MODELS[model][1]
    batches = [make(n) for n in (5, 3)]
    first = {name: make(m) for name, m in zip(NAMES, (2, 3, 4), strict=True)}
    return batches, [first, {"first": make(4), "second": make(2), "third": None}]


def _scores(group: dist.ProcessGroup, setup: Setup) -> list[Tensor]:
    own, rank = Rank(group, setup), dist.get_rank(group)
    batches, sets = _drawn(setup.model)
    with unchanged(own.inner):
        return [own.reweighter.scores(batches[rank], sets[rank]) for _ in range(2)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model", ["mlp", "tokens", "shared", "batch norm", "meets if odd"])
def test_the_sets_of_all_ranks(pool: Pool, model: str, wrapper: str) -> None:
    setup = Setup(model, wrapper=WRAPPERS[wrapper])
    found = pool.run(_scores, setup, ranks=2)
    own = Rank(None, setup)
    batches, sets = _drawn(model)
    for k, name in enumerate(NAMES):
        cleans = [own_sets[name] for own_sets in sets]
        exact = truth_of_ranks(own.inner, cross_entropy, batches, cleans)
        for by_step, expected in zip(found, exact, strict=True):
            for scores in by_step:
                assert relative_error(scores[:, k], expected.scores) <= EXACT


def _sharded(group: dist.ProcessGroup, model: str) -> Tensor:
    torch.manual_seed(1)
    own, rank = MODELS[model][0](), dist.get_rank(group)
    fully_shard(own, mesh=DeviceMesh.from_group(group, "cpu"))
    batches, sets = _drawn(model)
    two = {name: sets[rank][name] for name in NAMES[:2]}
    return Reweighter(own, cross_entropy).scores(batches[rank], two)


def test_sharded_parameters(pool: Pool) -> None:
    found = pool.run(_sharded, "mlp", ranks=2)
    own = Rank(None, Setup("mlp"))
    batches, sets = _drawn("mlp")
    for k, name in enumerate(NAMES[:2]):
        _, clean = union([(batch, s[name]) for batch, s in zip(batches, sets, strict=True)])
        for scores, batch in zip(found, batches, strict=True):
            assert relative_error(scores[:, k], own.reweighter.scores(batch, clean)) <= EXACT


def _normalized(group: dist.ProcessGroup) -> str:
    own, rank = MODELS["mlp"][0](), dist.get_rank(group)
    fully_shard(own, mesh=DeviceMesh.from_group(group, "cpu"))
    batches, sets = _drawn("mlp")
    reweighter = Reweighter(own, cross_entropy, normalize="example")
    try:
        reweighter.backward(batches[rank], sets[rank]["first"])
    except NotExactError as error:
        return str(error)
    return "no error"


def test_cosines_of_sharded_parameters_are_an_error(pool: Pool) -> None:
    assert all("sharded" in text for text in pool.run(_normalized, ranks=2))


def _failing(group: dist.ProcessGroup, fault: str) -> tuple[str, str, bool]:
    own, rank = Rank(group, Setup()), dist.get_rank(group)
    batches, sets = _drawn("mlp")
    given: Any = sets[rank]
    if rank == 1:
        if fault == "order":
            given = dict(reversed(given.items()))
        elif fault == "one set":
            given = given["first"]
        elif fault == "empty":
            given = {}
        elif fault == "forward":
            given = {**given, "first": (torch.randn(2, 7).double(), given["first"][1])}
        elif fault == "no rank has it":
            given = {**given, "second": None}
    if fault == "no rank has it":
        given = {**given, "second": None}
    try:
        with unchanged(own.inner):
            own.reweighter.scores(batches[rank], given)
    except Exception as error:
        raised = error
    after = own.reweighter.scores(batches[rank], sets[rank])
    return type(raised).__name__, str(raised), bool(after.isfinite().all())


@pytest.mark.parametrize(
    ("fault", "kinds", "says"),
    [
        ("order", ["ValueError"] * 2, "other names"),
        ("one set", ["ValueError"] * 2, "other names"),
        ("empty", ["RankError", "ValueError"], "empty"),
        ("forward", ["RankError", "RuntimeError"], "shape"),
        ("no rank has it", ["ValueError"] * 2, "no rank has any"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all(
    pool: Pool, fault: str, kinds: list[str], says: str
) -> None:
    found = pool.run(_failing, fault, ranks=2)
    assert [kind for kind, _, _ in found] == kinds
    assert all(says in text for _, text, _ in found)
    assert all(works for _, _, works in found)
