"""Parameters that are sharded among processes, which no engine supports."""

from __future__ import annotations

import sys

from l2rw_ext.tracing.members import Members


def check_not_sharded(members: Members) -> None:
    """Raise if a parameter is sharded.

    Raises:
        TypeError: names it, or the module that shards its parameters.
    """
    # Modules that were never imported have made nothing; importing them takes seconds.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for name, module in members.modules:
            if isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)):
                raise TypeError(
                    f"the parameters of {repr(name) if name else 'the model'} are sharded (FSDP), "
                    "which no engine supports; keep the parameters whole in each process, as "
                    "DistributedDataParallel does"
                )
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is not None:
        for name, p in members.parameters:
            if isinstance(p, tensor.DTensor):
                raise TypeError(
                    f"parameter {name!r} is a DTensor, which no engine supports; keep the "
                    "parameters whole in each process, as DistributedDataParallel does"
                )
