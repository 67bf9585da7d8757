"""The pool of worker processes says what went wrong, and works again afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.processes import SIZE, Pool, RanksError


def _sum_of_ranks(group: dist.ProcessGroup, factor: int) -> tuple[int, int, int]:
    total = torch.tensor(factor * dist.get_rank(group))
    dist.all_reduce(total, group=group)
    return int(total), dist.get_world_size(group), torch.get_num_threads()


def _raise(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        raise ValueError("of rank one")
    dist.barrier(group)


def _die(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        os._exit(7)


def _hang(group: dist.ProcessGroup) -> None:
    while dist.get_rank(group) == 1:
        time.sleep(0.1)


@pytest.mark.parametrize("ranks", range(1, SIZE + 1))
def test_results_of_each_rank(pool: Pool, ranks: int) -> None:
    expected = 3 * sum(range(ranks))
    assert pool.run(_sum_of_ranks, 3, ranks=ranks) == [(expected, ranks, 1)] * ranks


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_raise, r"(?s)rank 0: .*barrier.*rank 1: .*ValueError: of rank one"),
        (_die, r"^rank 1: died with exit code 7$"),
        (_hang, r"(?s)^rank 1: did not end; it was at.*in _hang"),
    ],
)
def test_failures_name_the_rank_and_the_next_call_works(
    pool: Pool, function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(RanksError, match=message):
        pool.run(function, ranks=2, seconds=2)
    assert pool.run(_sum_of_ranks, 1) == [(3, SIZE, 1)] * SIZE
