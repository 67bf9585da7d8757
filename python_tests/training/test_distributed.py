"""Wrappers that split a batch among processes or devices."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from l2rw_ext import NotExactError, Reweighter
from l2rw_ext.reference import relative_error
from support.models import ENGINES, cross_entropy, mlp, vectors
from support.oracle import assert_matches, truth, unchanged


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    store: pathlib.Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("compile", [False, "eager"])
@pytest.mark.usefixtures("group")
def test_distributed_data_parallel(
    engine: Any, options: dict[str, bool], compile: bool | str
) -> None:
    inner = mlp()
    model = nn.parallel.DistributedDataParallel(inner, **options)
    whole = {"fullgraph": True} if compile else None
    reweighter = Reweighter(
        model, cross_entropy, engine=engine, compile=compile, compile_options=whole
    )
    for k in range(5):
        batch, clean = vectors(6), vectors(4)
        expected = truth(inner, cross_entropy, batch, clean)
        if k == 1:
            assert relative_error(reweighter.weights(batch, clean), expected.weights) < 1e-12
        model.zero_grad()
        assert_matches(reweighter.backward(batch, clean), inner, expected)


@pytest.mark.usefixtures("group")
def test_a_wrapper_inside_of_the_model_that_searches_the_graph() -> None:
    inner = nn.parallel.DistributedDataParallel(mlp(), find_unused_parameters=True)
    model = nn.Sequential(inner)
    batch, clean = vectors(6), vectors(4)
    with unchanged(model), pytest.raises(NotExactError, match="leave find_unused_parameters off"):
        Reweighter(model, cross_entropy, engine="layerwise").backward(batch, clean)


def test_data_parallel_without_devices() -> None:
    inner = mlp()
    batch, clean = vectors(6), vectors(4)
    expected = truth(copy.deepcopy(inner), cross_entropy, batch, clean)
    step = Reweighter(nn.DataParallel(inner), cross_entropy).backward(batch, clean)
    assert_matches(step, inner, expected)
    assert step.engine == "layerwise"
