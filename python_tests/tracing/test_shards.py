"""What of sharded parameters is refused at the door; ``fully_shard`` itself is not."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

HEAD = """
    import os
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.nn import functional as F
    from l2rw_ext import NotExactError, Reweighter

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    loss = lambda out, y: F.cross_entropy(out, y, reduction="none")
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    KNOWN = (
        "is trained and not sharded, although others are",
        "sharded by FullyShardedDataParallel, which no engine supports",
        "is a DTensor, which no engine supports",
        "all-reduce hook",
        "is no graph",
        "are divided by [1, 2.0] in different modules",
        "parameter '1.weight' was one with '0.weight' before fully_shard",
    )
    ENGINES = ("auto", "layerwise", "forward", "double_backward")

    def net():
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def refused(act):
        try:
            act()
        except TypeError as error:
            assert any(known in str(error) for known in KNOWN), error
            assert "\\n" not in str(error)
        else:
            raise AssertionError("nothing was refused")
"""

FSDP2 = """
    hooked = fully_shard(nn.Linear(5, 3), mesh=mesh)
    hooked.set_all_reduce_hook(lambda x: None)
    refused(lambda: Reweighter(hooked, loss))
    refused(lambda: Reweighter(fully_shard(nn.Linear(5, 3), mesh=mesh), loss, compile="eager"))
    divided = net()
    fully_shard(divided[0], mesh=mesh).set_gradient_divide_factor(2.0)
    refused(lambda: Reweighter(fully_shard(divided, mesh=mesh), loss))
    for whole, again in ((False, False), (True, False), (True, True)):
        tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        tied[1].weight = tied[0].weight
        for module in (*tied, tied) if whole else tied:
            fully_shard(module, mesh=mesh)
        if again:
            tied[1].weight = tied[0].weight
        refused(lambda: Reweighter(tied, loss))
    coupled = fully_shard(net(), mesh=mesh)
    for engine in ("auto", "layerwise", "forward", "double_backward"):
        try:
            Reweighter(coupled, loss, engine=engine).backward((x, y), (x, y))
        except NotExactError as error:
            expected = "couples" if engine in ("auto", "layerwise") else "sharded parameters"
            assert expected in str(error) and "\\n" not in str(error), error
        else:
            raise AssertionError("nothing was refused")
    model = net()
    early = [Reweighter(model, loss, engine=e) for e in ENGINES]
    fully_shard(model[0], mesh=mesh)
    for sharded in (model, nn.Sequential(model)):
        for engine in ENGINES:
            refused(lambda: Reweighter(sharded, loss, engine=engine))
    for reweighter in early:
        refused(lambda: reweighter.backward((x, y), (x, y)))
        refused(lambda: reweighter.weights((x, y), (x, y)))
"""

FSDP1 = """
    for original in (False, True):
        wrapped = FullyShardedDataParallel(
            net(), use_orig_params=original, device_id=torch.device("cpu")
        )
        for engine in ENGINES:
            refused(lambda: Reweighter(wrapped, loss, engine=engine))
"""

DTENSOR = """
    model = net()
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    for engine in ENGINES:
        refused(lambda: Reweighter(model, loss, engine=engine))
    head = nn.Linear(3, 3)
    fully_shard(head, mesh=mesh)
    refused(lambda: Reweighter(net(), nn.Sequential(head)))
"""


@pytest.mark.parametrize("case", [FSDP2, FSDP1, DTENSOR], ids=["fully_shard", "FSDP1", "DTensor"])
def test_sharded_parameters_are_refused(case: str) -> None:
    """In a process of its own, for it has a process group."""
    # Gloo's threads may abort a process that ends the ordinary way.
    end = "print('done', flush=True)\nos._exit(0)\n"
    code = textwrap.dedent(HEAD) + textwrap.dedent(case) + end
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
