"""Torch's database of modules: calls of each, in two ways, by every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.common_modules import module_db

from support.samples import Call, assert_right_or_refused, is_small, seed, spread

pytestmark = [pytest.mark.databases, pytest.mark.filterwarnings("ignore")]

MODULES = {
    f"{info.name.removeprefix('nn.')}, {mode}, {how}": (
        info,
        mode == "train",
        how == "on parameters",
    )
    for info in module_db
    for mode in (("train", "eval") if info.train_and_eval_differ else ("train",))
    for how in ("on the batch", "on parameters")
}


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str) -> None:
    info, training, scaled = MODULES[name]
    seed(name)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )

    def call(sample: Any) -> Call:
        made, given = sample.constructor_input, sample.forward_input
        module = info.module_cls(*made.args, **made.kwargs).double().train(training)
        with torch.no_grad():
            module(*given.args, **given.kwargs)  # a lazy module has its parameters only then
        return Call(module, given.args, given.kwargs, scaled=scaled)

    small = [s for s in samples if is_small((s.forward_input.args, s.forward_input.kwargs))]
    assert_right_or_refused(lambda s=s: call(s) for s in spread(small, 6))
