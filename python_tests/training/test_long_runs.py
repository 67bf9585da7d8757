"""Many steps, on many shapes, with errors in between and in threads: nothing piles up."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from l2rw_ext import Reweighter
from l2rw_ext.engines.layerwise import engine as layerwise
from support.models import CLASSES, ENGINE_OPTIONS, Mean, cross_entropy, model_of, vectors
from support.oracle import assert_exact

SIZES = 50
"""Of the training batch."""

LONG = pytest.param(20_000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])


class _Trainer:
    """A model that one thread trains; every fifth step is preceded by a call that is an error."""

    def __init__(self, engine: Any, *, new_shapes: bool) -> None:
        norm = nn.BatchNorm1d(8) if engine == "auto" else nn.Identity()
        layers = [nn.Linear(5, 8), nn.Tanh(), Mean(last=True), norm, nn.Linear(8, CLASSES)]
        self.model = nn.Sequential(*layers).double()
        self.reweighter = Reweighter(self.model, cross_entropy, engine=engine)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self._new_shapes = new_shapes
        self._done = 0

    def _batch(self, n: int, positions: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, positions, 5, dtype=torch.float64), torch.randint(CLASSES, (n,))

    def batches(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Of SIZES shapes in turn; with ``new_shapes`` no two are alike."""
        positions = 1 + self._done // SIZES if self._new_shapes else 2
        return self._batch(2 + self._done % SIZES, positions), self._batch(4, positions)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            batch, clean = self.batches()
            if self._done % 10 == 3:
                with pytest.raises(ValueError, match="is nan"):
                    self.reweighter.backward(batch, (clean[0] * float("nan"), clean[1]))
            elif self._done % 10 == 8:
                with pytest.raises(RuntimeError, match="cannot be multiplied"):
                    self.reweighter.backward(
                        (batch[0][..., 1:], batch[1]), (clean[0][..., 1:], clean[1])
                    )
            self._optimizer.zero_grad()
            self.reweighter.backward(batch, clean)
            self._optimizer.step()
            self._done += 1


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """What was there before takes no part in collections, of which each test asks for several."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass
class _Held:
    """What the process holds, besides what was frozen."""

    tensors: int
    objects: int
    mebibytes: float

    @classmethod
    def now(cls) -> _Held:
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(issubclass(type(x), Tensor) for x in objects)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(tensors, len(objects), pages / 256)


@pytest.mark.parametrize("new_shapes", [False, True], ids=["fifty shapes", "new shapes"])
@pytest.mark.parametrize("steps", [600, LONG])
def test_nothing_piles_up(steps: int, new_shapes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half of the steps keeps nothing that the first half did not.

    A step that kept one tensor, or a shape that kept one object for ever, would add 300 in the
    shorter run. The allocator is given 32 MiB, which is 3 kB for each step of the longer one.
    """
    monkeypatch.setattr(layerwise, "_LARGEST_NUMBER_OF_KINDS", 60)  # soon to be reached
    trainers = [_Trainer(engine, new_shapes=new_shapes) for engine in ENGINE_OPTIONS]
    with ThreadPoolExecutor(len(trainers)) as threads:

        def train() -> _Held:
            list(threads.map(lambda t: t.train(steps // 2 // len(trainers)), trainers))
            return _Held.now()

        before, after = train(), train()
    print(before, after)
    assert after.tensors <= before.tensors + 20
    assert after.objects <= before.objects + 150
    assert after.mebibytes <= before.mebibytes + 32
    for trainer in trainers:
        batch, clean = trainer.batches()
        assert_exact(trainer.model, cross_entropy, batch, clean, reweighter=trainer.reweighter)


def _nan(reweighter: Reweighter, batch: Any, clean: Any) -> None:
    with pytest.raises(ValueError, match="is nan"):
        reweighter.backward(batch, (clean[0] * float("nan"), clean[1]))


KINDS = {
    "layers": lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)),
    "derived weights": lambda: parametrizations.weight_norm(nn.Linear(5, CLASSES)),
    "recurrent": lambda: model_of(
        lambda s, x: s.cell(x[:, None])[0][:, 0], cell=nn.LSTM(5, CLASSES, batch_first=True)
    ),
    "checkpointed": lambda: model_of(
        lambda s, x: s.b(checkpoint(s.a, x, use_reentrant=False)),
        a=nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        b=nn.Linear(8, CLASSES),
    ),
}
"""Models whose graphs hold something of the step."""


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("call", [Reweighter.weights, Reweighter.explain, _nan])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
def test_a_call_without_a_gradient_keeps_nothing(
    engine: Any, kind: str, call: Any, low_memory: bool
) -> None:
    model = KINDS[kind]().double()
    reweighter = Reweighter(model, cross_entropy, engine=engine, low_memory=low_memory)
    batch, clean = vectors(6), vectors(4)
    call(reweighter, batch, clean)
    before = _Held.now()
    for _ in range(5):
        call(reweighter, batch, clean)
    assert _Held.now().tensors <= before.tensors
