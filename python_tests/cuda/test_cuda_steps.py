"""Whole steps are exact on a GPU, and on the host with the CUDA kernels in place of the CPU's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2rw_ext import Reweighter
from l2rw_ext.engines.layerwise import scoring
from l2rw_ext.ops._operator import OPERATORS
from support.feature_table import FEATURES
from support.models import cross_entropy, vectors
from support.operator_cases import map_tensors
from support.oracle import assert_exact

ROWS = {f.name: f for f in FEATURES if f.layerwise is None}


@pytest.fixture
def calls(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each kernel ran in place of the CPU's in the test; layers wait as on CUDA."""
    monkeypatch.setattr(scoring, "in_groups", lambda g: True)
    counts: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return getattr(emulator, name)(*arguments)

        return call

    library = torch.library.Library("l2rw_ext", "IMPL")
    for name in OPERATORS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"l2rw_emulated::{name}", "CPU"):
            library.impl(name, counted(name), "CPU", allow_override=True)
    yield counts
    library._destroy()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_coverage_table_on_a_gpu(name: str) -> None:
    feature = ROWS[name]
    model, batch, clean = feature.make()
    here, clean_here = map_tensors(Tensor.cuda, (batch, clean))
    reweighter = Reweighter(model.cuda(), feature.loss, engine="layerwise")
    assert_exact(
        model, feature.loss, here, clean_here, reweighter=reweighter, copied=feature.copied
    )


@pytest.mark.emulated
@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_coverage_table(name: str, calls: Counter[str]) -> None:
    feature = ROWS[name]
    model, batch, clean = feature.make()
    reweighter = Reweighter(model, feature.loss, engine="layerwise")
    assert_exact(model, feature.loss, batch, clean, reweighter=reweighter, copied=feature.copied)
    assert calls["normalize_weights"] > 0


@pytest.mark.emulated
@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_layers_of_a_model_are_one_call(calls: Counter[str]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).double()
    batch, clean = vectors(10, 64), vectors(3, 64)
    reweighter = Reweighter(model, cross_entropy, engine="layerwise")
    for _ in range(2):
        assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter)
    assert calls["factored_correlations"] == 2
    assert calls["factored_correlation"] == 0
