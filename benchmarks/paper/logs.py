"""TensorBoard: one log for each run, where it is asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..errors import UsageError


def check_installed() -> None:
    """Raise a usage error where there is no TensorBoard."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise UsageError("--tensorboard: install tensorboard to write its logs") from error


class Log:
    """Scalars of a run; does nothing without a folder. A resumed run overwrites what it repeats."""

    def __init__(self, folder: Path | None, key: str, done: int) -> None:
        self._writer: Any = None
        if folder is not None:
            tensorboard = importlib.import_module("torch.utils.tensorboard")
            self._writer = tensorboard.SummaryWriter(str(folder / key), purge_step=done + 1)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def step(self, step: int, loss: float, rate: float, weights: Tensor) -> None:
        """Weighted loss, steps per second, and how many examples count."""
        if self._writer is not None:
            self._writer.add_scalar("training/loss", loss, step)
            self._writer.add_scalar("training/steps per second", rate, step)
            share = float((weights > 0).double().mean())
            self._writer.add_scalar("training/share with weight", share, step)

    def evaluation(self, point: dict[str, float], class_errors: list[float]) -> None:
        """A point of the curve, and the error of each class; all in percent."""
        if self._writer is not None:
            step = int(point["step"])
            self._writer.add_scalar("held out/accuracy", point["accuracy"], step)
            self._writer.add_scalar("training/accuracy", point["training_accuracy"], step)
            for label, error in enumerate(class_errors):
                self._writer.add_scalar(f"held out/error of class {label}", error, step)
