"""Learn from noisy labels with parameters sharded among processes (FSDP2): plain and reweighted.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Two fifths of the training labels are wrong; a few hundred clean examples are shared out among the
processes. Runs on GPUs with NCCL where there is one for each process, else on the CPU with gloo.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from l2rw_ext import CleanBatches, Reweighter

CLASSES, SIDE, WIDTH, EPOCHS = 10, 8, 128, 8
BATCH = CLEAN_BATCH = 100  # of all processes together


class Block(nn.Module):
    """Two layers beside an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (n, WIDTH) -> the same."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


def draw(n: int, generator: torch.Generator, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy images of ten shapes, shape (n, 1, 8, 8), and their classes."""
    y = torch.randint(CLASSES, (n,), generator=generator)
    return prototypes[y] + 1.5 * torch.randn(n, 1, SIDE, SIDE, generator=generator), y


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Unreduced."""
    return F.cross_entropy(outputs, targets, reduction="none")


def main() -> None:
    """Train twice from the same parameters, and print what came out."""
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (size,))

    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(CLASSES, 1, SIDE, SIDE, generator=generator)
    x, true = draw(4000, generator, prototypes)
    clean = draw(200, generator, prototypes)
    x_test, y_test = (t.to(device) for t in draw(2000, generator, prototypes))
    flipped = torch.rand(len(x), generator=generator) < 0.4
    wrong = (true + torch.randint(1, CLASSES, true.shape, generator=generator)) % CLASSES
    data = TensorDataset(x, true.where(~flipped, wrong), flipped)

    for name in ("plain", "reweighted"):
        torch.manual_seed(0)
        blocks = [Block(), Block()]
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(SIDE * SIDE, WIDTH), *blocks, nn.Linear(WIDTH, CLASSES)
        ).to(device)
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        reweighter = Reweighter(model, losses)
        # Every process has its own part of the clean examples, as it has of the training ones.
        own = (clean[0][rank::size], clean[1][rank::size])
        clean_batches = CleanBatches(own, CLEAN_BATCH // size, seed=rank, device=device)
        sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data, seed=0)
        loader = DataLoader(data, BATCH // size, sampler=sampler, drop_last=True)
        counts = torch.zeros(2, device=device)  # examples without weight, and how many are flipped
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            for batch in loader:
                inputs, targets, is_flipped = (t.to(device) for t in batch)
                optimizer.zero_grad()
                if name == "plain":
                    losses(model(inputs), targets).mean().backward()
                else:
                    # The weights are those of one process that has all ranks' examples.
                    step = reweighter.backward((inputs, targets), next(clean_batches))
                    low = step.weights == 0
                    counts += torch.stack([low.sum(), (low & is_flipped).sum()])
                optimizer.step()
        with torch.no_grad():
            accuracy = (model(x_test).argmax(1) == y_test).float().mean()
        dist.all_reduce(counts)
        if rank == 0:
            print(f"{name}: test accuracy {float(accuracy):.3f}")
            if name == "reweighted":
                print(f"flipped labels among weights of zero: {float(counts[1] / counts[0]):.3f}")
    dist.barrier()  # gloo may abort a process that ends while others are busy
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
