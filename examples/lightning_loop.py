"""Learn digits from noisy labels with Lightning: plain and reweighted.

    pip install lightning scikit-learn
    python examples/lightning_loop.py
    torchrun --nproc-per-node 2 examples/lightning_loop.py

Two fifths of the training labels are wrong, a hundred other images are clean. With bfloat16
autocast, two micro-batches a step, clipped gradients, and a checkpoint from which to resume.
"""

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
        self.clean, self.reweighter, self.saved = clean, None, {}

    def on_fit_start(self) -> None:
        """Begin when `trainer.model` is the module as the strategy has wrapped it."""
        state, rank, ranks = self.state(), self.trainer.global_rank, self.trainer.world_size
        own = tuple(x[rank::ranks] for x in self.clean)  # each process has its own part
        self.clean_batches = CleanBatches(own, device=self.device)
        self.reweighter = Reweighter(self.trainer.model, losses)
        for name, saved in state.items():
            getattr(self, name).load_state_dict(saved)
        self.waiting: list[Any] = []  # micro-batches of the next step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Keep the micro-batch: a gradient made here would be erased."""
        self.waiting.append(batch)
        return torch.zeros((), device=self.device)

    def backward(self, loss: Tensor) -> None:
        """Score and weigh all micro-batches of an optimiser step together."""
        trainer, amp = self.trainer, self.trainer.precision_plugin
        if len(self.waiting) < trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        clean = amp.convert_input(next(self.clean_batches))
        with amp.train_step_context(), self.reweighter.accumulate() as accumulation:
            for x, y, index in self.waiting:
                self.reweighter.backward((x, y), clean, getattr(amp, "scaler", None), index)
        self.waiting.clear()
        self.log("effective_sample_size", accumulation.effective_sample_size)

    def state(self) -> dict[str, Any]:
        """What is known of the examples, and the place in the clean set, by attribute."""
        parts = ("clean_batches", "reweighter") if self.reweighter else ()
        return self.saved | {name: getattr(self, name).state_dict() for name in parts}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["l2rw"] = self.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved, self.reweighter = checkpoint.get("l2rw", {}), None  # for `on_fit_start`


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
    loader = DataLoader(data, BATCH, sampler=DistributedSampler(data, PROCESSES, RANK))
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
