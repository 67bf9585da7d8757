"""The loops of Lightning, Hugging Face and Accelerate: their steps are exact, and they resume."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from l2rw_ext import Reweighter
from l2rw_ext.reference import relative_error
from support.oracle import flat, gradients_of, truth
from support.paths import ROOT

pytestmark = [pytest.mark.examples, pytest.mark.filterwarnings("ignore")]

SINGLE = 1e-5
"""Relative error of a step in float32, whose sums have some thousand terms."""


NEEDED = {
    "lightning_loop": ["lightning", "sklearn"],
    "trainer": ["transformers", "accelerate", "peft"],
    "accelerate_loop": ["accelerate", "sklearn"],
}
"""The packages that a script imports."""


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
        """The network, which Lightning has in a module that holds much else."""
        return getattr(self.model, "net", self.model)

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


def _script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script as a module whose reweighters are watched."""
    for package in NEEDED[name]:
        pytest.importorskip(package)
    found = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    monkeypatch.setattr(script, "Reweighter", Watched)
    return script


def _vectors() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    data = TensorDataset(torch.randn(30, 64), torch.randint(10, (30,)), torch.arange(30))
    return data, (torch.randn(8, 64), torch.randint(10, (8,)))


class LightningLoop:
    """Three micro-batches of ten, which are two steps of an epoch."""

    losses = staticmethod(nn.CrossEntropyLoss(reduction="none"))

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.script, self.folder = _script("lightning_loop", monkeypatch), folder
        self.data, self.clean = _vectors()

    def run(self, epochs: range, *, exact: bool) -> Watched:
        torch.manual_seed(0)
        module = self.script.Reweighted(self.clean)
        loader = DataLoader(self.data, 10, sampler=DistributedSampler(self.data, 1, 0))
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

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.script, self.folder = _script("trainer", monkeypatch), folder / "saved"
        self.folder.mkdir()
        self.losses = self.script.losses
        self.settings = {**self.script.SETTINGS, "per_device_train_batch_size": 10}
        self.monkeypatch, bert = monkeypatch, self.script.adapted_bert
        monkeypatch.setattr(self.script, "adapted_bert", lambda: _without_dropout(bert()))
        words, topics = torch.randint(40, (38, 12)), torch.randint(4, (38,))
        self.data = [{"input_ids": words[i], "labels": topics[i], "_idx": i} for i in range(30)]
        self.clean = {"input_ids": words[30:]}, topics[30:]

    def run(self, epochs: range, *, exact: bool) -> Watched:
        if not epochs.start:  # resuming takes the last checkpoint that is there
            shutil.rmtree(self.folder)
        self.monkeypatch.setattr(self.script, "SETTINGS", {**self.settings, "bf16": not exact})
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

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.script, self.folder = _script("accelerate_loop", monkeypatch), folder
        monkeypatch.setattr(self.script, "BATCH", 10)
        self.data, self.clean = _vectors()

    def run(self, epochs: range, *, exact: bool) -> Watched:
        run = self.script.Run(self.data, self.clean, "no" if exact else "bf16")
        if epochs.start:
            run.accelerator.load_state(str(self.folder))
        run.train(epochs)
        run.accelerator.save_state(str(self.folder))
        return run.reweighter


Loop = LightningLoop | TrainerLoop | AccelerateLoop
LOOPS: list[Callable[[pytest.MonkeyPatch, Path], Loop]] = [
    LightningLoop,
    TrainerLoop,
    AccelerateLoop,
]


@pytest.fixture(params=LOOPS)
def loop(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Loop]:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # put back what frameworks leave here
    monkeypatch.chdir(tmp_path)
    found = request.param(monkeypatch, tmp_path)
    yield found
    if not isinstance(found, LightningLoop):
        state = importlib.import_module("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def test_weights_and_gradients_are_those_of_the_union_of_micro_batches(loop: Loop) -> None:
    seen = loop.run(range(1), exact=True).seen
    assert [len(step.micro_batches) for step in seen] == [2, 1]
    for step in seen:
        batches, (clean, *_) = zip(*step.micro_batches, strict=True)
        batch = tree_map(lambda *parts: torch.cat(parts), *batches)
        expected = truth(step.model, loop.losses, batch, clean)
        assert relative_error(step.weights, expected.weights) < SINGLE
        assert relative_error(step.gradients, flat(expected.gradients.values())) < SINGLE


def test_autocast_is_that_of_a_plain_loop(loop: Loop) -> None:
    for step in loop.run(range(1), exact=False).seen:
        plain = Reweighter(step.model, loop.losses)
        with torch.autocast("cpu", torch.bfloat16), plain.accumulate() as accumulation:
            for batch, clean in step.micro_batches:
                plain.backward(batch, clean)
        assert torch.equal(torch.cat(accumulation.weights), step.weights)
        assert torch.equal(flat(gradients_of(step.model).values()), step.gradients)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(loop: Loop) -> None:
    whole = loop.run(range(3), exact=False)
    loop.run(range(2), exact=False)
    resumed = loop.run(range(2, 3), exact=False)
    assert len(resumed.seen) == 2
    for a, b in zip(whole.core.parameters(), resumed.core.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, table in whole.record.state_dict().items():
        assert torch.equal(table, resumed.record.state_dict()[name]), name
    assert whole.record.visits.tolist() == [3] * 30
