"""Learn digits from noisy labels in a loop with Accelerate: plain and reweighted.

    pip install accelerate scikit-learn
    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py

Two fifths of the training labels are wrong, a hundred other images are clean. With bfloat16
autocast, two micro-batches a step, clipped gradients, and a checkpoint from which to resume.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from l2rw_ext import CleanBatches, Reweighter

EPOCHS, BATCH = 40, 50
losses = nn.CrossEntropyLoss(reduction="none")


class Run:
    """Everything that a checkpoint holds; without a clean set, training is plain.

    Args:
        data: (inputs, targets, index).
        clean: (inputs, targets), on the CPU.
    """

    def __init__(self, data: TensorDataset, clean: Any = None, precision: str = "bf16") -> None:
        torch.manual_seed(0)
        self.accelerator = accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=2,
            # The order depends on the epoch alone, so that a resumed run sees the same batches.
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
            cpu=not torch.cuda.is_available(),
        )
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        rank, processes = accelerator.process_index, accelerator.num_processes
        loader = DataLoader(data, BATCH // processes, shuffle=True, drop_last=True)
        self.net, self.optimizer, self.loader = accelerator.prepare(net, optimizer, loader)
        self.reweighter = None
        if clean is not None:
            own = tuple(x[rank::processes] for x in clean)  # each process has its own part
            self.clean_batches = CleanBatches(own, BATCH // processes, device=accelerator.device)
            self.reweighter = Reweighter(self.net, losses)  # the model as it has been prepared
            accelerator.register_for_checkpointing(self.clean_batches, self.reweighter)

    def backward(self, batches: list[Any]) -> None:
        """Score and weigh all micro-batches of an optimiser step together."""
        with self.reweighter.accumulate():
            for x, y, index in batches:
                clean = next(self.clean_batches) if self.reweighter.needs_clean else None
                self.reweighter.backward((x, y), clean, self.accelerator.scaler, index)

    def train(self, epochs: range) -> None:
        """Train in the epochs of these numbers."""
        accelerator, waiting = self.accelerator, []
        for epoch in epochs:
            self.loader.set_epoch(epoch)
            for x, y, index in self.loader:
                with accelerator.accumulate(self.net):
                    if self.reweighter is None:
                        accelerator.backward(losses(self.net(x), y).mean())
                    else:
                        waiting.append((x, y, index))
                    if accelerator.sync_gradients:
                        if waiting:
                            self.backward(waiting)
                            waiting.clear()
                        accelerator.clip_grad_norm_(self.net.parameters(), 1.0)
                    self.optimizer.step()  # on the last micro-batch only, and so is zero_grad
                    self.optimizer.zero_grad()


def main() -> None:
    """Train plainly and reweighted, each with a break in the middle."""
    x, true = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x, generator = x.float() / 16, torch.Generator().manual_seed(0)
    clean, test, rest = torch.randperm(len(x), generator=generator).split([100, 400, 1297])
    flipped = torch.rand(len(rest), generator=generator) < 0.4
    shift = flipped * torch.randint(1, 10, flipped.shape, generator=generator)
    labels = (true[rest] + shift) % 10
    data = TensorDataset(x[rest], labels, torch.arange(len(rest)))
    for name, given in (("plain", None), ("reweighted", (x[clean], true[clean]))):
        run = Run(data, given)
        run.train(range(EPOCHS // 2))
        run.accelerator.save_state(f"digits-{name}")
        run = Run(data, given)
        run.accelerator.load_state(f"digits-{name}")
        run.train(range(EPOCHS // 2, EPOCHS))
        outputs = run.net(x[test].to(run.accelerator.device)).cpu()
        accuracy = (outputs.argmax(1) == true[test]).float().mean()
        run.accelerator.print(f"{name}: test accuracy {accuracy:.3f}")
    found = run.reweighter.record.issues(labels).is_label_issue
    precision = flipped.numpy()[found].mean()
    run.accelerator.print(f"{found.sum()} labels found, precision {precision:.3f}")


if __name__ == "__main__":
    main()
