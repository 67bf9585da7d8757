"""Sums over ranks of one tensor for each parameter, which arrive in the background."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l2rw_ext.ops.arithmetic import accumulation_dtype

from .group import Processes

_BUCKET_BYTES = 25 * 2**20
"""Small tensors are sent together, up to this size, as DistributedDataParallel does."""


class Sums(Mapping[int, Tensor]):
    """By id of the parameter, the sum over all ranks; whoever asks for one waits for it.

    Args:
        processes: all of which make this object at the same time, for the same parameters.
        parameters: in an order that all ranks agree on.
        values: what this rank adds, by id of the parameter, in its shape; zero if it is absent.
        factor: by which this rank's values are multiplied.

    A sum has the accumulation dtype, so that it does not depend on the number of ranks.
    """

    def __init__(
        self,
        processes: Processes,
        parameters: Sequence[nn.Parameter],
        values: Mapping[int, Tensor],
        factor: float | Tensor = 1,
    ) -> None:
        self.divisor: Tensor | None = None
        """By what sums are divided when they have arrived, shape ()."""
        self._keys = [id(p) for p in parameters]
        self._found: dict[int, Tensor] = {}
        self._pending: dict[int, tuple[list[nn.Parameter], Tensor, Any]] = {}
        for bucket in _buckets(parameters):
            flat = _flat(bucket, values, factor)
            work = dist.all_reduce(flat, group=processes.group, async_op=True)
            self._pending.update({id(p): (bucket, flat, work) for p in bucket})

    def __getitem__(self, key: int) -> Tensor:
        if key in self._pending:
            bucket, flat, work = self._pending[key]
            work.wait()
            if self.divisor is not None:
                flat.div_(self.divisor)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                del self._pending[id(p)]
                self._found[id(p)] = part.view(p.shape)
        return self._found[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one device and dtype, up to the size of a bucket."""
    bucket: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        more = p.numel() * dtype_of_sums(p).itemsize
        alike = bucket and (p.dtype, p.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and size + more <= _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += more
    if bucket:
        yield bucket


def _flat(
    parameters: Sequence[nn.Parameter], values: Mapping[int, Tensor], factor: float | Tensor
) -> Tensor:
    """The values of neighbours, one after the other, times a factor."""
    first, sizes = parameters[0], [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes), dtype=dtype_of_sums(first), device=first.device)
    for p, part in zip(parameters, flat.split(sizes), strict=True):
        value = values.get(id(p))
        if value is not None:
            value = value.to_dense() if value.is_sparse else value
            part.copy_(value.reshape(-1)).mul_(factor)
    return flat


def dtype_of_sums(p: nn.Parameter) -> torch.dtype:
    """In which dtype values of a parameter are added up."""
    return p.dtype if p.is_complex() else accumulation_dtype(p.dtype)
