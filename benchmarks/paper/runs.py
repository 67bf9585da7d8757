"""One training run: from its settings to its result, through any number of interruptions."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from .augment import crop_and_flip
from .diagnosis import diagnose
from .evaluation import accuracy, class_errors, confusion, confusion_of_labels, probabilities
from .files import (
    FINAL,
    read_checkpoint,
    read_final_state,
    read_result,
    remove_temporaries,
    write_checkpoint,
    write_json,
)
from .images import Images, floats
from .logs import Log
from .networks import make_model
from .order import Epochs, generator
from .settings import Settings
from .splits import sha256
from .tasks import make_split
from .trace import Trace
from .training_methods import Batch, CleanOnly, Context, Method, Statistics, make

EVALUATIONS = 40
CLOSEST = 100
REPORTS = 200
LOOKED_AT = 1000


class Progress(NamedTuple):
    """How far a run is: accuracy in percent, steps per second of this process."""

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
        origin: versions, commit and machine; a result lists those of all its parts.
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
        return self.of(settings.key)

    def of(self, key: str) -> Path:
        """The file of the result of a run, by its key."""
        return self.folder / f"{key}.json"

    def checkpoint(self, settings: Settings) -> Path:
        """The file of the checkpoint; gone when the result is there."""
        return self.folder / f"{settings.key}.pt"

    def final(self, key: str) -> Path:
        """The file of the state at the end of a run that is kept."""
        return self.folder / f"{key}{FINAL}"


def check(settings: Settings, place: Place) -> dict[str, Any] | None:
    """The result if the run is finished; nothing is written.

    Raises:
        UsageError: result or checkpoint are of other settings, or the run that the result started
            from has been run again and ended otherwise.
    """
    path = place.result(settings)
    result = read_result(path, settings)
    if result is None:
        read_checkpoint(place.checkpoint(settings), settings)
        return None
    for key, parameters in result["parents"].items():
        with contextlib.suppress(FileNotFoundError):
            if json.loads(place.of(key).read_text())["parameters"] != parameters:
                raise UsageError(f"{path} started from another {place.of(key)}; remove it")
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
    with reproducible(settings.seed, place.device):
        training = Training(settings, place)
        training.load()
        with Log(place.tensorboard, settings.key, training.done) as log:
            training.to_the_end(tick, stop, log)
        if settings.kept:
            training.keep()
        result = training.result()
    write_json(place.result(settings), result)
    place.checkpoint(settings).unlink(missing_ok=True)
    return result


@contextlib.contextmanager
def reproducible(seed: int, device: str) -> Iterator[None]:
    """One thread, or deterministic CUDA kernels; initial parameters and dropout by the seed."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warning = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    on_cuda = device.startswith("cuda")
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(on_cuda)
        memory.fill_uninitialized_memory = False  # no kernel reads what it has not written
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warning)
            memory.fill_uninitialized_memory = filling


class Training:
    """The state of a run between two steps."""

    def __init__(self, settings: Settings, place: Place) -> None:
        self.settings, self.place = settings, place
        self.split = make_split(settings, place.data_root)
        self.classes = len(self.split.train.classes)
        self.method: Method = make(settings.method)
        train_set, self.flipped = self.split.train, self.split.flipped
        if settings.clean_in_training and self.method.trains_on_clean:
            train_set = _union(self.split.train, self.split.clean)
            right = torch.zeros(len(self.split.clean), dtype=torch.bool)
            self.flipped = torch.cat([self.flipped, right])
        self.targets = train_set.targets
        self.data = self.split.digest()
        self.train_set = train_set.to(place.device)
        self.clean = self.split.clean.to(place.device)
        self.validation = self.split.validation.to(place.device)
        self.test = self.split.test.to(place.device)
        self.model = make_model(settings.model, self.classes).to(place.device).train()
        self.parents: dict[str, str] = {}
        self._prepare(self.method, self._confusion())
        self.tuning = CleanOnly()
        self._prepare(self.tuning, None)
        clean_size = min(settings.clean_batch, len(self.clean))
        self.clean_order = Epochs(len(self.clean), clean_size, settings.seed, "clean batches")
        self.optimizer = self._optimizer()
        self.trace = Trace(self.classes) if settings.traced else None
        self.done = 0
        self.seconds = self.data_seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self.origins = [place.origin]

    def _confusion(self) -> Tensor | None:
        """What the noise layer starts from."""
        if not self.settings.transition:
            return None
        found: Tensor = self._parent(self.settings.transition)["confusion_of_labels"]
        return found

    def _parent(self, key: str) -> dict[str, Any]:
        """The state that a finished run has left."""
        parameters = json.loads(self.place.of(key).read_text())["parameters"]
        self.parents[key] = parameters
        return read_final_state(self.place.final(key), self.data, parameters)

    def _prepare(self, method: Method, confusion: Tensor | None) -> None:
        settings = self.settings
        method.prepare(
            Context(
                self.model,
                self.targets,
                self.flipped,
                self.classes,
                min(settings.batch, len(self.targets)),
                settings.seed,
                settings.weight_decay if settings.authors else 0.0,
                settings.direction_decay,
                confusion,
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
        steps, first, began = self.settings.total_steps, self.done, time.perf_counter()
        earlier = self.seconds
        evaluate, report = max(CLOSEST, steps // EVALUATIONS), max(1, steps // REPORTS)
        while self.done < steps:
            statistics = self.step()
            self.done += 1
            last = self.done == steps
            looking = self.done % evaluate == 0 or last
            if self.done % report == 0 or looking:
                loss = float((statistics.losses * statistics.weights).sum())
                if looking:
                    self.look(loss, log)
                self.seconds = earlier + time.perf_counter() - began
                rate = (self.done - first) / (time.perf_counter() - began)
                reached = self.curve[-1]["accuracy"] if self.curve else float("nan")
                log.step(self.done, loss, rate, statistics.weights)
                tick(Progress(self.settings.key, self.done, steps, loss, reached, rate))
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
        began = time.perf_counter()
        tuning = number >= self.settings.steps
        method: Method = self.tuning if tuning else self.method
        clean = self.clean_batch(number) if method.uses_clean else None
        batch = clean
        if method.uses_training or clean is None:
            batch = self.batch(self.train_set, method.draw(number), number, "training")
        assert batch is not None
        self.data_seconds += time.perf_counter() - began
        self.optimizer.zero_grad()
        statistics = method.step(number, batch, clean)
        self.optimizer.step()
        if self.trace:
            self.trace.add(batch.targets, statistics)
        return statistics

    def clean_batch(self, number: int) -> Batch:
        """The clean examples of a step."""
        return self.batch(self.clean, self.clean_order[number], number, "clean")

    def batch(self, images: Images, index: Tensor, number: int, purpose: str) -> Batch:
        """Examples as the model takes them."""
        index = index.to(self.place.device, non_blocking=True)
        inputs = images.inputs[index]
        if self.settings.augment:
            draw = generator(self.settings.seed, f"augmentation of {purpose} images", number)
            inputs = crop_and_flip(inputs, draw)
        return Batch(floats(inputs, signed=self.settings.signed), images.targets[index])

    def look(self, loss: float, log: Log) -> None:
        """Add a point to the curve: accuracy on held-out images, and on some training images.

        The former are the hyper-validation images by their true labels, or the test images where
        there are no others; the latter go by the labels that they are trained with.
        """
        images, true = self.validation, self.split.validation_of_true
        if not len(images):
            images, true = self.test, self.split.test.targets
        held_out = confusion(self.predict(images), true, self.classes)
        some = torch.arange(0, len(self.targets), max(1, len(self.targets) // LOOKED_AT))
        trained = self.predict(self.train_set.take(some.to(self.place.device)))
        point = {
            "step": self.done,
            "loss": loss,
            "accuracy": accuracy(held_out),
            "training_accuracy": 100 * float((trained == self.targets[some]).double().mean()),
        }
        if self.trace:
            clean = Batch(self.clean.floats(signed=self.settings.signed), self.clean.targets)
            point |= self.trace.take(self.model, clean)
        self.curve.append(point)
        log.evaluation(point, class_errors(held_out))

    def predict(self, images: Images) -> Tensor:
        """The most likely class of each image, on the CPU."""
        return probabilities(self.model, images, signed=self.settings.signed).argmax(1)

    def result(self) -> dict[str, Any]:
        """What is kept of a finished run."""
        counts = confusion(self.predict(self.test), self.split.test.targets, self.classes)
        out = {
            "settings": self.settings.as_dict(),
            "test_error": 100 - accuracy(counts),
            "class_errors": class_errors(counts),
            "confusion": counts.tolist(),
            "classes": list(self.split.test.classes),
            "curve": self.curve,
            "counts": torch.bincount(self.targets, minlength=self.classes).tolist(),
            "flipped": int(self.flipped.sum()),
            "parameters": sha256(self.model.state_dict().values()),
            "parents": self.parents,
            "data": self.data,
            "source": self.split.train.source,
            "seconds": self.seconds,
            "data_seconds": self.data_seconds,
            "origins": self.origins,
        }
        if self.trace:
            trained = confusion(self.predict(self.train_set), self.targets, self.classes)
            out["training_class_errors"] = class_errors(trained)
        if self.settings.diagnosed:
            out["diagnosis"] = self.diagnosis()
        return out

    def diagnosis(self) -> dict[str, Any]:
        """Weights and scores of the hyper-validation images; the run is over afterwards."""
        settings, steps = self.settings, self.settings.total_steps

        def weigh(index: Tensor, number: int) -> Statistics:
            self.optimizer.zero_grad()
            batch = self.batch(self.validation, index, number, "diagnosed")
            return self.method.step(steps + number, batch, self.clean_batch(steps + number))

        return diagnose(weigh, self.split, settings.batch, settings.seed)

    def save(self) -> None:
        """Write the checkpoint."""
        write_checkpoint(self.place.checkpoint(self.settings), self.state())

    def keep(self) -> None:
        """Write the state at the end, for the runs that start from it."""
        found = probabilities(self.model, self.validation, signed=self.settings.signed)
        confused = confusion_of_labels(found, self.split.validation.targets)
        content = {**self.state(), "confusion_of_labels": confused}
        write_checkpoint(self.place.final(self.settings.key), content)

    def state(self) -> dict[str, Any]:
        """All that the remaining steps depend on."""
        return {
            "settings": self.settings.as_dict(),
            "data": self.data,
            "done": self.done,
            "seconds": self.seconds,
            "data_seconds": self.data_seconds,
            "curve": self.curve,
            "parents": self.parents,
            "origins": self.origins,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "trace": self.trace.state_dict() if self.trace else {},
            "generators": self._generators(),
        }

    def _generators(self) -> list[Tensor]:
        """States of torch's own generators, which dropout draws from."""
        states = [torch.get_rng_state()]
        if self.place.device.startswith("cuda"):
            states.append(torch.cuda.get_rng_state(self.place.device))
        return states

    def load(self) -> None:
        """Continue from the checkpoint, or else from the run that this one continues, if any.

        Raises:
            UsageError: it is of other settings, other data or another kind of device.
        """
        path = self.place.checkpoint(self.settings)
        content = read_checkpoint(path, self.settings)
        if content is None and self.settings.continues:
            path = self.place.final(self.settings.continues)
            content = self._parent(self.settings.continues)
            own = {"seconds": 0.0, "data_seconds": 0.0, "origins": [], "parents": self.parents}
            content |= own
        if content is None:
            return
        if content["data"] != self.data:
            raise UsageError(f"{path} is of other data; give another --out or remove it")
        states = content["generators"]
        if len(states) != len(self._generators()):
            raise UsageError(f"{path} is of another kind of device; give another --out")
        self.done, self.curve = content["done"], content["curve"]
        self.seconds, self.data_seconds = content["seconds"], content["data_seconds"]
        self.parents = content["parents"]
        self.origins = content["origins"]
        if self.place.origin not in self.origins:
            self.origins = [*self.origins, self.place.origin]
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.method.load_state_dict(content["method"])
        if self.trace:
            self.trace.load_state_dict(content["trace"])
        torch.set_rng_state(states[0])
        for state in itertools.islice(states, 1, None):
            torch.cuda.set_rng_state(state, self.place.device)


def _union(a: Images, b: Images) -> Images:
    inputs, targets = torch.cat([a.inputs, b.inputs]), torch.cat([a.targets, b.targets])
    return replace(a, inputs=inputs, targets=targets)
