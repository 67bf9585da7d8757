"""Torch's database of operators: calls of each, in three ways, by every engine."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from support.samples import Call, assert_right_or_refused, is_small, seed, spread

pytestmark = [pytest.mark.databases, pytest.mark.filterwarnings("ignore")]

NARROWER = {"half", "bfloat16", "float", "chalf", "cfloat"}
"""Conversions to a dtype whose numbers are not those of float64."""

CALLS = {
    f"{op.name}.{op.variant_test_name}".rstrip(".") + f", {how}": (op, fn, how == "on parameters")
    for op in op_db
    if op.supports_autograd and torch.float64 in op.dtypes and op.name not in NARROWER
    for how, fn in (
        ("on the batch", op.op),
        ("on parameters", op.op),
        ("in place", op.inplace_variant),
    )
    if fn is not None
}


@pytest.mark.parametrize("name", CALLS)
def test_operator(name: str) -> None:
    op, fn, scaled = CALLS[name]
    seed(name)
    samples = [
        sample
        for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True)
        if is_small((sample.input, sample.args, sample.kwargs))
        # Torch reads beyond the lengths if there are more rows, as in a merged batch.
        and not (name.startswith("_segment_reduce") and sample.kwargs["axis"])
    ]
    assert_right_or_refused(
        lambda s=s: Call(fn, (s.input, *s.args), s.kwargs, scaled=scaled)
        for s in spread(samples, 3)
    )
