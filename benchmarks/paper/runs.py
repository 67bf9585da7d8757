"""One training run: from its settings to its result, through any number of interruptions."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from .augment import crop_and_flip
from .files import (
    read_checkpoint,
    read_result,
    remove_temporaries,
    write_checkpoint,
    write_json,
)
from .images import Images
from .logs import Log
from .methods import Batch, CleanOnly, Context, Method, Statistics, make
from .models import make_model
from .order import Epochs, generator
from .settings import Settings
from .tasks import make_split

EVALUATIONS = 20
REPORTS = 200
TEST_BATCH = 500


class Progress(NamedTuple):
    """How far a run is: test accuracy in percent, steps per second of this process."""

    key: str
    step: int
    steps: int
    loss: float
    accuracy: float
    rate: float


class StoppedError(Exception):
    """The run was asked to stop, and has written a checkpoint."""


@dataclass(frozen=True)
class Place:
    """Where and how a run runs; none of it changes its numbers on a machine.

    Attributes:
        folder: for checkpoint and result.
        data_root: for the data; None for what packages carry.
        device: of model and batches.
        interval: steps between checkpoints.
        origin: versions, commit and machine, for the result.
        tensorboard: a folder for the log; None for none.
    """

    folder: Path
    data_root: Path | None
    device: str
    interval: int
    origin: dict[str, Any]
    tensorboard: Path | None = None

    def result(self, settings: Settings) -> Path:
        """The file of the result."""
        return self.folder / f"{settings.key}.json"

    def checkpoint(self, settings: Settings) -> Path:
        """The file of the checkpoint; gone when the result is there."""
        return self.folder / f"{settings.key}.pt"


def check(settings: Settings, place: Place) -> dict[str, Any] | None:
    """The result if the run is finished; nothing is written.

    Raises:
        UsageError: result or checkpoint are of other settings.
    """
    result = read_result(place.result(settings), settings)
    if result is None:
        read_checkpoint(place.checkpoint(settings), settings)
    return result


def run(
    settings: Settings,
    place: Place,
    tick: Callable[[Progress], None],
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train from the last checkpoint, or the start, to the end.

    Args:
        settings: what to run.
        place: where.
        tick: called now and then.
        stop: asked after each step; if true, a checkpoint is written and the run ends.

    Returns:
        The result, as it is written.

    Raises:
        UsageError: the settings are impossible, or files are of other settings.
        StoppedError: ``stop`` was true.
    """
    finished = check(settings, place)
    if finished is not None:
        return finished
    remove_temporaries(place.folder, settings.key)
    with _reproducible(settings.seed, place.device):
        training = Training(settings, place)
        training.load()
        with Log(place.tensorboard, settings.key, training.done) as log:
            training.to_the_end(tick, stop, log)
        result = training.result()
    write_json(place.result(settings), result)
    place.checkpoint(settings).unlink(missing_ok=True)
    return result


@contextmanager
def _reproducible(seed: int, device: str) -> Iterator[None]:
    """One thread, or deterministic CUDA kernels; initial parameters and dropout by the seed."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    on_cuda = device.startswith("cuda")
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(on_cuda)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)


class Training:
    """The state of a run between two steps."""

    def __init__(self, settings: Settings, place: Place) -> None:
        self.settings, self.place = settings, place
        self.split = make_split(settings, place.data_root)
        self.classes = len(self.split.train.classes)
        self.method: Method = make(settings.method)
        self.train_set, self.flipped = self.split.train, self.split.flipped
        if settings.clean_in_training and not self.method.uses_clean:
            self.train_set = _union(self.split.train, self.split.clean)
            right = torch.zeros(len(self.split.clean), dtype=torch.bool)
            self.flipped = torch.cat([self.flipped, right])
        self.model = make_model(settings.model, self.classes).to(place.device).train()
        self._prepare(self.method)
        self.tuning = CleanOnly()
        self._prepare(self.tuning)
        clean_size = min(settings.clean_batch, len(self.split.clean))
        self.clean_order = Epochs(len(self.split.clean), clean_size, settings.seed, "clean batches")
        self.optimizer = self._optimizer()
        self.data = self._data_digest()
        self.done = 0
        self.seconds = 0.0
        self.curve: list[list[float]] = []

    @property
    def steps(self) -> int:
        """All of them, fine-tuning included."""
        return self.settings.steps + self.settings.finetune

    def _prepare(self, method: Method) -> None:
        targets, settings = self.train_set.targets, self.settings
        method.prepare(
            Context(
                self.model,
                targets,
                self.flipped,
                self.classes,
                min(settings.batch, len(targets)),
                settings.seed,
            )
        )

    def _optimizer(self) -> torch.optim.SGD:
        """Momentum SGD; L2 on matrices and kernels only, and on nothing of the method's own."""
        parameters = list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {
                "params": [p for p in parameters if p.dim() <= 1] + self.method.parameters(),
                "weight_decay": 0.0,
            },
        ]
        return torch.optim.SGD(
            groups,
            lr=self.settings.lr,
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
        )

    def to_the_end(
        self, tick: Callable[[Progress], None], stop: Callable[[], bool], log: Log
    ) -> None:
        """Run the remaining steps; see :func:`run`."""
        steps, first, began, earlier = self.steps, self.done, time.perf_counter(), self.seconds
        evaluate, report = max(1, steps // EVALUATIONS), max(1, steps // REPORTS)
        while self.done < steps:
            statistics = self.step()
            self.done += 1
            last = self.done == steps
            if self.done % report == 0 or last:
                loss = float((statistics.losses * statistics.weights).sum())
                if self.done % evaluate == 0 or last:
                    errors = self.class_errors()
                    accuracy = 100 - self.test_error(errors)
                    self.curve.append([self.done, loss, accuracy])
                    log.evaluation(self.done, accuracy, errors)
                self.seconds = earlier + time.perf_counter() - began
                rate = (self.done - first) / (time.perf_counter() - began)
                accuracy = self.curve[-1][2] if self.curve else float("nan")
                log.step(self.done, loss, rate, statistics.weights)
                tick(Progress(self.settings.key, self.done, steps, loss, accuracy, rate))
            stopping = not last and stop()
            if self.done % self.place.interval == 0 or stopping:
                self.seconds = earlier + time.perf_counter() - began
                self.save()
            if stopping:
                raise StoppedError

    def step(self) -> Statistics:
        """One step of the optimizer."""
        number = self.done
        for group in self.optimizer.param_groups:
            passed = sum(number >= decay for decay in self.settings.decays)
            group["lr"] = self.settings.lr * 0.1**passed
        tuning = number >= self.settings.steps
        method: Method = self.tuning if tuning else self.method
        clean = None
        if method.uses_clean:
            clean = self.batch(self.split.clean, self.clean_order[number], number, "clean")
        batch = self.batch(self.train_set, method.draw(number), number, "training")
        self.optimizer.zero_grad()
        statistics = method.step(number, batch, clean)
        self.optimizer.step()
        return statistics

    def batch(self, images: Images, index: Tensor, number: int, purpose: str) -> Batch:
        """Examples as the model takes them."""
        inputs = images.floats(index, signed=self.settings.signed)
        if self.settings.augment:
            draw = generator(self.settings.seed, f"augmentation of {purpose} images", number)
            inputs = crop_and_flip(inputs, draw)
        targets = images.targets[index]
        return Batch(inputs.to(self.place.device), targets.to(self.place.device))

    @torch.no_grad()
    def class_errors(self) -> list[float]:
        """Percentage of the test images of each class that the model gets wrong."""
        self.model.eval()
        test = self.split.test
        wrong = torch.cat(
            [
                self.predict(test, index) != test.targets[index]
                for index in torch.arange(len(test)).split(TEST_BATCH)
            ]
        )
        self.model.train()
        return [100 * float(wrong[test.targets == c].double().mean()) for c in range(self.classes)]

    def predict(self, images: Images, index: Tensor) -> Tensor:
        """The most likely class of each image, on the CPU."""
        inputs = images.floats(index, signed=self.settings.signed)
        found: Tensor = self.model(inputs.to(self.place.device)).argmax(1).cpu()
        return found

    def test_error(self, class_errors: list[float]) -> float:
        """Over all test images, in percent."""
        counts = torch.bincount(self.split.test.targets, minlength=self.classes).tolist()
        wrong = sum(e * n for e, n in zip(class_errors, counts, strict=True) if n)
        return float(wrong) / len(self.split.test)

    def result(self) -> dict[str, Any]:
        """What is kept of a finished run."""
        errors = self.class_errors()
        return {
            "settings": self.settings.as_dict(),
            "test_error": self.test_error(errors),
            "class_errors": errors,
            "curve": self.curve,
            "counts": torch.bincount(self.train_set.targets, minlength=self.classes).tolist(),
            "parameters": self.digest(self.model.state_dict().values()),
            "data": self.data,
            "seconds": self.seconds,
            "origin": self.place.origin,
        }

    def _data_digest(self) -> str:
        """SHA-256 of training, clean and test labels and of the training and clean inputs."""
        split = self.split
        tensors = [self.train_set.targets, split.clean.targets, split.test.targets]
        return self.digest([*tensors, self.train_set.inputs, split.clean.inputs])

    @staticmethod
    def digest(tensors: Any) -> str:
        """SHA-256 of tensors, bit by bit."""
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(memoryview(tensor.detach().cpu().contiguous().numpy()).cast("B"))
        return digest.hexdigest()

    def save(self) -> None:
        """Write the checkpoint."""
        content = {
            "settings": self.settings.as_dict(),
            "data": self.data,
            "done": self.done,
            "seconds": self.seconds,
            "curve": self.curve,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "generators": self._generators(),
        }
        write_checkpoint(self.place.checkpoint(self.settings), content)

    def _generators(self) -> list[Tensor]:
        """States of torch's own generators, which dropout draws from."""
        states = [torch.get_rng_state()]
        if self.place.device.startswith("cuda"):
            states.append(torch.cuda.get_rng_state(self.place.device))
        return states

    def load(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            UsageError: it is of other settings, other data or another kind of device.
        """
        path = self.place.checkpoint(self.settings)
        content = read_checkpoint(path, self.settings)
        if content is None:
            return
        if content["data"] != self.data:
            raise UsageError(f"{path} is of other data; give another --out or remove it")
        states = content["generators"]
        if len(states) != len(self._generators()):
            raise UsageError(f"{path} is of another kind of device; give another --out")
        self.done, self.seconds = content["done"], content["seconds"]
        self.curve = content["curve"]
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.method.load_state_dict(content["method"])
        torch.set_rng_state(states[0])
        for state in itertools.islice(states, 1, None):
            torch.cuda.set_rng_state(state, self.place.device)


def _union(a: Images, b: Images) -> Images:
    inputs, targets = torch.cat([a.inputs, b.inputs]), torch.cat([a.targets, b.targets])
    return replace(a, inputs=inputs, targets=targets)
