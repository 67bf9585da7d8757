"""Learn digits from noisy labels with Lightning: plain and reweighted.

    pip install lightning scikit-learn
    python examples/lightning_loop.py
    torchrun --nproc-per-node 2 examples/lightning_loop.py

Two fifths of the training labels are wrong, a hundred other images are clean. With bfloat16
autocast, two micro-batches a step, clipped gradients, and a checkpoint from which to resume.
"""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from l2rw_ext import CleanBatches, Reweighter

RANK, PROCESSES = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
EPOCHS, BATCH = 40, 50 // PROCESSES
SETTINGS = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
losses = nn.CrossEntropyLoss(reduction="none")


class Plain(L.LightningModule):
    """A module as you have it; its batches are (inputs, targets, index)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return losses(self(batch[0]), batch[1]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Reweighted(Plain):
    """The same module, reweighted: its gradients are made in `backward`."""

    def __init__(self, clean: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.clean = clean
        self.resumed: dict[str, Any] = {}

    def on_fit_start(self) -> None:
        """Begin when `trainer.model` is the module as the strategy has wrapped it."""
        own = tuple(x[RANK::PROCESSES] for x in self.clean)  # each process has its own part
        self.clean_batches = CleanBatches(own, BATCH, device=self.device)
        self.reweighter = Reweighter(self.trainer.model, losses)
        for name, state in self.resumed.items():
            getattr(self, name).load_state_dict(state)
        self.waiting: list[Any] = []  # micro-batches of the next step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Keep the micro-batch: a gradient made here would be erased."""
        self.waiting.append(batch)
        return torch.zeros((), device=self.device)

    def backward(self, loss: Tensor) -> None:
        """Score and weigh all micro-batches of an optimiser step together."""
        at_once, amp = self.trainer.accumulate_grad_batches, self.trainer.precision_plugin
        if len(self.waiting) < at_once and not self.trainer.is_last_batch:
            return
        with amp.train_step_context(), self.reweighter.accumulate():
            for x, y, index in self.waiting:
                clean = next(self.clean_batches) if self.reweighter.needs_clean else None
                self.reweighter.backward((x, y), clean, getattr(amp, "scaler", None), index)
        self.waiting.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what is known of the examples, and the place in the clean set."""
        parts = {"clean_batches": self.clean_batches, "reweighter": self.reweighter}
        checkpoint["l2rw"] = {name: part.state_dict() for name, part in parts.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep it for `on_fit_start`, which comes later."""
        self.resumed = checkpoint["l2rw"]


def fit(module: Plain, loader: Any, epochs: int, resume: Any = None, **options: Any) -> L.Trainer:
    """Train up to an epoch, from the beginning or from a checkpoint."""
    quiet = dict.fromkeys(["enable_progress_bar", "enable_model_summary", "logger"], False)
    trainer = L.Trainer(max_epochs=epochs, devices=PROCESSES, **quiet, **SETTINGS | options)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def main() -> None:
    """Train plainly and reweighted, each with a break in the middle."""
    x, true = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x, generator = x.float() / 16, torch.Generator().manual_seed(0)
    clean, test, rest = torch.randperm(len(x), generator=generator).split([100, 400, 1297])
    flipped = torch.rand(len(rest), generator=generator) < 0.4
    labels = (true[rest] + flipped * torch.randint(1, 10, rest.shape, generator=generator)) % 10
    data = TensorDataset(x[rest], labels, torch.arange(len(rest)))
    # An order that depends on the epoch alone: a resumed run sees the same batches.
    ordered = DistributedSampler(data, PROCESSES, RANK)
    loader = DataLoader(data, BATCH, sampler=ordered, drop_last=True)
    for make in (Plain, lambda: Reweighted((x[clean], true[clean]))):
        torch.manual_seed(0)
        half = fit(make(), loader, EPOCHS // 2).checkpoint_callback.best_model_path
        trainer = fit(module := make(), loader, EPOCHS, resume=half)
        accuracy = (module(x[test]).argmax(1) == true[test]).float().mean()
        trainer.print(f"{type(module).__name__}: test accuracy {accuracy:.3f}")
    found = module.reweighter.record.issues(labels).is_label_issue
    trainer.print(f"{found.sum()} labels found, precision {flipped.numpy()[found].mean():.3f}")


if __name__ == "__main__":
    main()
