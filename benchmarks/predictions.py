"""What a kernel or a step should take on a GPU, from what is counted and a data sheet.

Every operation takes the longer of its floating-point operations and its bytes over the rates of
the data sheet. Between two kernels of a CUDA graph the device waits for a moment; eagerly a step
takes no less than the host does to launch it. That leaves out what makes a measured time longer:
tiles that do not fill the device, copies to another layout, atomics, library calls of several
kernels, memory below its peak, and the host's Python, of which this package adds about 0.1 ms for
each layer to an eager step. It also leaves out what makes it shorter: caches that hold what the
operation before wrote, and fusion by inductor. A compiled step is therefore held against the
captured one.

Steps are counted on the CPU, as if no value could be read. The forms of the layers are those chosen
for a CPU, layers in factored form are not grouped, and attention is one operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from l2rw_ext import devices
from l2rw_ext.ops._operator import OPERATORS

from .cases import CaseSpec, make_case
from .ceilings import Ceilings
from .counting import COMPOSED, Counted, OperationCounter, count_operator
from .data_sheets import EAGER_LAUNCH, GRAPH_LAUNCH, GRAPH_NODE, DataSheet
from .kernel_cases import KernelCase
from .methods import METHODS, YARDSTICK
from .operator_counts import byte_count, operation_count, results_like, uses_tensor_cores
from .profile import warm

STEP_METHODS = (YARDSTICK, "l2rw_ext", "double_backward")
"""What is predicted of a step; others are ways to compile or to capture one of these."""

_WGMMA = (
    "conv_correlation",
    "dense_correlation",
    "factored_correlation",
    "factored_correlations",
)


def predict(found: Sequence[Counted], sheet: DataSheet, own: Ceilings) -> dict[str, Any]:
    """Counts, and the seconds of an eager and of a captured call; ``own`` is for our kernels.

    ``composed_bytes`` are those of operators of this package that have no kernel.
    """
    spent = {"operations": 0.0, "bytes": 0.0}
    for c in found:
        ceilings = own if c.own else sheet.library
        bound = ceilings.bound(c.precision, c.operations, c.moved)
        spent[bound] += ceilings.floor(c.precision, c.operations, c.moved)
    launches = sum(c.launches for c in found)
    spent["launches"] = GRAPH_NODE * launches
    device = sum(spent.values())
    composed: Counter[str] = Counter()
    for c in found:
        if c.part_of:
            composed[c.part_of] += c.moved
    return {
        "operations": sum(c.operations for c in found),
        "bytes": sum(c.moved for c in found),
        "composed_bytes": dict(composed),
        "launches": launches,
        "bound": max(spent, key=lambda name: spent[name]),
        "eager": {"seconds": max(EAGER_LAUNCH * len(found), device)},
        "captured": {"seconds": GRAPH_LAUNCH + device},
    }


def _composition(case: KernelCase, precision: str, arguments: Any) -> list[Counted] | None:
    """The operations of a composition; None where those of CUDA are others than those of meta."""
    counter = OperationCounter(tf32=case.tf32(precision))
    with torch.no_grad(), counter:
        OPERATORS[case.operator].composition(*arguments)
    # CUDA multiplies narrow numbers as they are, other devices in float32.
    products = {c.precision for c in counter.counted if c.operations}
    return counter.counted if products <= {precision} else None


def predict_kernel(case: KernelCase, precision: str, sheet: DataSheet) -> dict[str, Any]:
    """One case of ``benchmarks kernels``: what runs, and our kernel with warpgroups if it can."""
    arguments = case.draw(precision, "meta")
    results = results_like(case.operator, arguments)
    operations = operation_count(case.operator, arguments)
    moved = byte_count(case.operator, arguments, results)
    rows = {}
    if case.operator in COMPOSED:
        composed = _composition(case, precision, arguments)
        if composed is not None:
            rows["composition"] = predict(composed, sheet, sheet.own)
    else:
        kernel = [count_operator(case.operator, arguments, results, precision)]
        rows["operator"] = predict(kernel, sheet, sheet.own)
        tiles = case.operator in _WGMMA and uses_tensor_cores(case.operator, arguments)
        if sheet.warpgroups and tiles and precision in ("bf16", "fp16"):
            rows["warpgroups"] = predict(kernel, sheet, sheet.library)
    return {
        "name": case.name,
        "title": case.title,
        "operator": case.operator,
        "precision": precision,
        "kernel": case.operator not in COMPOSED,
        "operations": operations,
        "bytes": moved,
        "floor_seconds": sheet.library.floor(precision, operations, moved),
        "bound": sheet.library.bound(precision, operations, moved),
        "candidates": [{"name": name, **row} for name, row in rows.items()],
    }


def predict_step(spec: CaseSpec, sheet: DataSheet, methods: Sequence[str]) -> dict[str, Any]:
    """One case of ``benchmarks step``, with products of float32 in TF32."""
    case = make_case(spec)
    rows = []
    for name in methods:
        step, clear = warm(case, name)
        clear()
        with devices.traced(), OperationCounter(tf32=True) as counter:
            step()
        found = predict(counter.counted, sheet, sheet.own)
        rows.append({"name": name, "label": METHODS[name].label, **found})
    return {"name": spec.name, "title": spec.title, "n": spec.n, "m": spec.m, "methods": rows}
