"""Whole steps whose operators are the CUDA kernels, run on the host (emulated.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import assert_exact
from zoo import FEATURES

from l2rw_ext import Reweighter
from l2rw_ext._registration import OPERATORS

pytestmark = pytest.mark.emulated

ROWS = {f.name: f for f in FEATURES if f.layerwise is None}


@pytest.fixture
def calls(emulator: Any) -> Iterator[Counter[str]]:
    """How often each kernel ran in place of the CPU's in the test."""
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


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_coverage_table(name: str, calls: Counter[str]) -> None:
    feature = ROWS[name]
    model, batch, clean = feature.make()
    reweighter = Reweighter(model, feature.loss, engine="layerwise")
    assert_exact(model, feature.loss, batch, clean, reweighter=reweighter, copied=feature.copied)
    assert calls["normalize_weights"] > 0
