"""Every rule is held to its operation, on the samples of torch's own database."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

from l2rw_ext.layers.torch_functions import tensors_in
from l2rw_ext.tracing.example_map import ExampleMap
from support.example_maps import Checked

pytestmark = [pytest.mark.databases, pytest.mark.filterwarnings("ignore")]

N = 3


def _enter(example_map: ExampleMap, x: Tensor, dimension: int) -> None:
    """Let places along a dimension belong to examples 0, 1, 2, 0, ..."""
    size = x.shape[dimension]
    for place in range(size):
        part = x.narrow(dimension, place, 1)
        example_map.enter(part, dimension=dimension, first=place % N, size=1)


def _samples(op: Any, count: int) -> list[Any]:
    dtypes = op.supported_dtypes("cpu")
    dtype = next((d for d in (torch.float32, torch.int64) if d in dtypes), None)
    if dtype is None:
        return []
    found = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), 60))
    random.Random(0).shuffle(found)
    return found[:count]


def _taken(variant: Any, sample: Any) -> bool:
    """Whether torch has such a variant, and it takes the sample."""
    try:
        if variant is not None:
            variant(_input(sample), *sample.args, **sample.kwargs)
    except (AssertionError, RuntimeError):
        return False
    return variant is not None


def _input(sample: Any) -> Any:
    return sample.input.clone() if isinstance(sample.input, Tensor) else sample.input


def _check(op: Any, sample: Any, draw: random.Random) -> None:
    tensors = tensors_in((sample.input, sample.args, sample.kwargs))
    if any(x.layout != torch.strided or x.is_nested for x in tensors):
        return
    example_map = Checked(N, [])
    first = draw.random() < 0.5
    for x in tensors:
        if x.dim() and x.numel():
            _enter(example_map, x, 0 if first else draw.randrange(x.dim()))
    for variant in (op, op.inplace_variant):
        if _taken(variant, sample):
            with example_map:
                variant(_input(sample), *sample.args, **sample.kwargs)
    assert not example_map.wrong, sample


@pytest.mark.parametrize("op", op_db, ids=lambda op: op.formatted_name)
def test_operations_of_torchs_database(op: Any) -> None:
    draw = random.Random(op.name)
    with torch.no_grad():
        for sample in _samples(op, 6):
            _check(op, sample, draw)
