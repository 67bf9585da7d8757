"""The examples for Lightning, Hugging Face and Accelerate, with little data and watched steps.

As a program, it runs one of them on the ranks of torchrun, which save what they have seen:

    torchrun --nproc-per-node 2 python_tests/support/loops.py NAME FOLDER
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from l2rw_ext import Reweighter
from support.oracle import flat, gradients_of
from support.scripts import script

RANKS = int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class Seen:
    """An optimiser step of a loop."""

    model: nn.Module
    """A copy, as it was before the step."""
    micro_batches: list[tuple[Any, Any]]
    """Training batches and the clean batch, or None, of each."""
    weights: Tensor
    gradients: Tensor


class Watched(Reweighter):
    """Remembers its steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Seen] = []
        self.given: list[Any] = []

    @property
    def core(self) -> nn.Module:
        """The network inside of wrappers, and of the module of Lightning that holds much else."""
        model = getattr(self.model, "module", self.model)
        return getattr(model, "net", model)

    def backward(self, batch: Any, clean: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.given.append((batch, clean))
        return super().backward(batch, clean, *args, **kwargs)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[Any]:
        self.given.clear()
        before = copy.deepcopy(self.core)
        vars(before).pop("forward", None)  # Accelerate's, with autocast
        with super().accumulate() as accumulation:
            yield accumulation
        weights, gradients = torch.cat(accumulation.weights), flat(gradients_of(self.core).values())
        self.seen.append(Seen(before, [*self.given], weights, gradients))


def _script(name: str, patch: pytest.MonkeyPatch) -> Any:
    """A script whose reweighters are watched."""
    found = script(name)
    patch.setattr(found, "Reweighter", Watched)
    return found


def _vectors() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(30, 64), torch.randint(10, (30,)), torch.arange(30))
    return data, (torch.randn(8, 64), torch.randint(10, (8,)))


class LightningLoop:
    """Three micro-batches of ten, which are two steps of an epoch."""

    losses = staticmethod(nn.CrossEntropyLoss(reduction="none"))

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.script, self.folder = _script("lightning_loop", patch), folder
        self.data, self.clean = _vectors()

    def run(self, epochs: range, *, exact: bool) -> Watched:
        torch.manual_seed(0)
        module = self.script.Reweighted(self.clean)
        ranks = self.script.PROCESSES
        ordered = DistributedSampler(self.data, ranks, self.script.RANK)
        loader = DataLoader(self.data, 10 // ranks, sampler=ordered)
        path = str(self.folder / "last.ckpt")
        trainer = self.script.fit(
            module,
            loader,
            epochs.stop,
            resume=path if epochs.start else None,
            precision="32-true" if exact else "bf16-mixed",
            enable_checkpointing=False,
        )
        trainer.save_checkpoint(path)
        return module.reweighter


class TrainerLoop:
    """The same for sentences, and a BERT without dropout, whose masks no reference would have."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.script, self.folder = _script("trainer", patch), folder / "saved"
        self.losses = self.script.losses
        self.settings = {**self.script.SETTINGS, "per_device_train_batch_size": 10 // RANKS}
        self.patch, bert = patch, self.script.adapted_bert
        patch.setattr(self.script, "adapted_bert", lambda: _without_dropout(bert()))
        torch.manual_seed(0)
        words, topics = torch.randint(40, (38, 12)), torch.randint(4, (38,))
        self.data = [{"input_ids": words[i], "labels": topics[i], "_idx": i} for i in range(30)]
        self.clean = {"input_ids": words[30:]}, topics[30:]

    def run(self, epochs: range, *, exact: bool) -> Watched:
        if not epochs.start:  # resuming takes the last checkpoint that is there
            shutil.rmtree(self.folder, ignore_errors=True)
        self.patch.setattr(self.script, "SETTINGS", {**self.settings, "bf16": not exact})
        trainer = self.script.train(
            self.script.ReweightedTrainer,
            str(self.folder),
            self.data,
            epochs.stop,
            epochs.start > 0,
            clean=self.clean,
        )
        return trainer.reweighter


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class AccelerateLoop:
    """As of Lightning."""

    losses = staticmethod(nn.CrossEntropyLoss(reduction="none"))

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.script, self.folder = _script("accelerate_loop", patch), folder
        patch.setattr(self.script, "BATCH", 10)
        self.data, self.clean = _vectors()

    def run(self, epochs: range, *, exact: bool) -> Watched:
        run = self.script.Run(self.data, self.clean, "no" if exact else "bf16")
        if epochs.start:
            run.accelerator.load_state(str(self.folder))
        run.train(epochs)
        run.accelerator.save_state(str(self.folder))
        return run.reweighter


Loop = LightningLoop | TrainerLoop | AccelerateLoop
LOOPS: dict[str, type[Loop]] = {
    "lightning": LightningLoop,
    "trainer": TrainerLoop,
    "accelerate": AccelerateLoop,
}


def main(name: str, folder: str) -> None:
    """Two steps of a rank."""
    from support import loops  # what is saved is found by the name that it has there

    with pytest.MonkeyPatch.context() as patch:
        reweighter = loops.LOOPS[name](patch, Path(folder)).run(range(1), exact=True)
    torch.save(reweighter.seen, Path(folder, f"{torch.distributed.get_rank()}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
