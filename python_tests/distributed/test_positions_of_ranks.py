"""With ``per="position"`` all positions of all ranks that count are weighed together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from l2rw_ext import NotExactError, Reweighter, weighing
from l2rw_ext.reference import relative_error
from support.oracle import flat, gradients_of
from support.positions import Language, expected_of, masked, words
from support.processes import Pool
from support.ranks import union

SIZES = [(5, 2), (2, 4)]


def _model() -> Language:
    torch.manual_seed(1)
    return Language().double()


def _steps(
    group: dist.ProcessGroup, options: dict[str, Any], batches: list[Any], count: int
) -> tuple[Tensor, Tensor]:
    model = _model()
    wrapped = DistributedDataParallel(model, process_group=group)
    reweighter = Reweighter(wrapped, masked, per="position", **options)
    for _ in range(count):
        model.zero_grad()
        step = reweighter.backward(*batches[dist.get_rank(group)])
    return step.weights, flat(gradients_of(model).values())


@pytest.mark.parametrize("option", ["", "compile", "top_k", "double_backward"])
def test_union(pool: Pool, option: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "": {},
        "compile": {"compile": "eager"},
        "top_k": {"weighing": weighing.top_k(5)},
        "double_backward": {"engine": "double_backward"},
    }
    batches = [(words(n), words(m)) for n, m in SIZES]
    found = pool.run(_steps, options[option], batches, 4, ranks=2)
    batch, clean = union(batches)
    top = {"weigh": lambda u: torch.zeros_like(u).index_fill(0, u.argsort()[-5:], 0.2)}
    _, weights, gradients = expected_of(
        _model(), masked, batch, clean, **(top if option == "top_k" else {})
    )
    assert relative_error(torch.cat([w for w, _ in found]), weights) < 1e-11
    for _, gradient in found:
        assert relative_error(gradient, flat(gradients)) < 1e-10


def test_a_rank_of_whose_clean_positions_none_counts(pool: Pool) -> None:
    batches: list[Any] = [(words(n), words(m)) for n, m in SIZES]
    batches[0][1][1].zero_()
    found = pool.run(_steps, {}, batches, 2, ranks=2)
    batch, clean = union(batches)
    _, weights, gradients = expected_of(_model(), masked, batch, clean)
    assert relative_error(torch.cat([w for w, _ in found]), weights) < 1e-11
    for _, gradient in found:
        assert relative_error(gradient, flat(gradients)) < 1e-10


def _sharded(group: dist.ProcessGroup, batches: list[Any]) -> str:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    model = _model()
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    with pytest.raises(NotExactError) as caught:
        Reweighter(model, masked, per="position").backward(*batches[dist.get_rank(group)])
    return str(caught.value)


def test_sharded_parameters_are_refused(pool: Pool) -> None:
    for text in pool.run(_sharded, [(words(n), words(m)) for n, m in SIZES], ranks=2):
        assert "does not support sharded parameters" in text
        assert "per='position'" in text
