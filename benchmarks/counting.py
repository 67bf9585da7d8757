"""Counts what a call launches: floating-point operations, bytes and kernels of each operation.

Torch's formulas count the operations of products, convolutions and attention; whatever else an
operation computes is taken to hide behind the bytes that it moves. These are all numbers of its
tensors, read or written, those of a broadcast tensor once. Views, and memory that is only
allocated, cost nothing. An operator of this package is counted as in ``benchmarks kernels``, or, if
CUDA has no kernel for it, by the operations of torch that it is composed of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.ops.formulas import Arguments, Results, as_results

from .operator_counts import byte_count, operation_count, uses_tensor_cores

COMPOSED = (
    "batch_norm_tangent",
    "embedding_weighted_gradient",
    "group_norm_backward",
    "linear_weighted_gradient",
)
"""The operators that have no CUDA kernel."""

_aten = torch.ops.aten
_LAUNCHES = {"normalize_weights": 1, "conv_weighted_gradient": 3}
_USUAL_LAUNCHES = 2
# The kernel itself, and the one that adds up the sums of its blocks. Aligned copies are not known.

_FORMULAS = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _aten._scaled_dot_product_flash_attention
    ],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
_ALLOCATIONS = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}
_PRECISIONS = {torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Counted(NamedTuple):
    """One operation.

    ``precision`` is the one whose rate limits its floating-point operations. ``own`` marks a kernel
    of this package, ``part_of`` names the operator of this package that it is a part of.
    """

    name: str
    operations: int
    moved: int
    precision: str
    own: bool = False
    launches: int = 1
    part_of: str = ""


def count_operator(
    operator: str, arguments: Arguments, results: Results, precision: str
) -> Counted:
    """An operator of this package that has a kernel."""
    if precision != "fp64" and not uses_tensor_cores(operator, arguments):
        precision = "fp32"
    return Counted(
        operator,
        operation_count(operator, arguments),
        byte_count(operator, arguments, results),
        precision,
        own=True,
        launches=_LAUNCHES.get(operator, _USUAL_LAUNCHES),
    )


def _tensors(tree: object) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _distinct_bytes(x: Tensor) -> int:
    """Those of a tensor, without the repetitions of a broadcast one."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {x.untyped_storage()._cdata for x in tensors}


def _launches_nothing(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether an operation computes no number."""
    if func.overloadpacket in _ALLOCATIONS or torch.Tag.inplace_view in func.tags:
        return True
    return not func._schema.is_mutable and _storages(outputs) <= _storages(inputs)


class OperationCounter(TorchDispatchMode):
    """Counts all operations that run inside, on any device.

    Args:
        tf32: whether products of float32 run in TF32.
    """

    def __init__(self, *, tf32: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.counted: list[Counted] = []
        self._tf32 = tf32

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count it, or what it is composed of."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        own = func.namespace == "l2rw_ext"
        if own and name in COMPOSED:
            first = len(self.counted)
            with self:
                out = OPERATORS[name].composition(*args, **kwargs)
            parts = [c._replace(part_of=name) for c in self.counted[first:]]
            self.counted[first:] = parts
            return out
        if not own:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if own:
            precision = self._precision(inputs)
            self.counted.append(count_operator(name, args, as_results(out), precision))
        elif not _launches_nothing(func, inputs, outputs):
            formula = _FORMULAS.get(func.overloadpacket)
            operations = formula(*args, **kwargs, out_val=out) if formula else 0
            moved = sum(map(_distinct_bytes, [*inputs, *outputs]))
            self.counted.append(Counted(name, operations, moved, self._precision(inputs)))
        return out

    def _precision(self, tensors: list[Tensor]) -> str:
        dtype = next((x.dtype for x in tensors if x.is_floating_point()), torch.float32)
        return _PRECISIONS.get(dtype, "tf32" if self._tf32 else "fp32")
