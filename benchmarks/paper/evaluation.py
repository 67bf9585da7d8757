"""What a trained model makes of images: predictions, accuracy, confusion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .images import Images

BATCH = 500


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def probabilities(model: nn.Module, images: Images, *, signed: bool) -> Tensor:
    """Softmax of the model's outputs on the images' device, shape (N, C), float32 on the CPU."""
    with evaluating(model):
        parts = torch.arange(len(images), device=images.inputs.device).split(BATCH)
        outputs = [model(images.floats(index, signed=signed)).softmax(1).cpu() for index in parts]
    return torch.cat(outputs)


def confusion(predicted: Tensor, targets: Tensor, classes: int) -> Tensor:
    """How many images of each target (rows) the model takes for each class (columns), (C, C)."""
    cells = torch.bincount(targets * classes + predicted, minlength=classes**2)
    return cells.view(classes, classes)


def accuracy(counts: Tensor) -> float:
    """Share of the images on the diagonal of a confusion matrix, in percent."""
    return 100 * float(counts.diagonal().sum()) / max(1, int(counts.sum()))


def class_errors(counts: Tensor) -> list[float]:
    """Percentage of each class off the diagonal; NaN for a class without images."""
    return (100 - 100 * counts.diagonal().double() / counts.sum(1)).tolist()


def confusion_of_labels(found: Tensor, labels: Tensor) -> Tensor:
    """Share of each label among what a model takes for each class.

    The estimate of p(label | class) that Goldberger & Ben-Reuven (2017) start their noise layer
    from, with the model's probabilities in the place of true classes.

    Args:
        found: probabilities, shape (N, C).
        labels: as given, flipped or not, shape (N,).

    Returns:
        float32, shape (C, C), rows sum to one.
    """
    given = torch.nn.functional.one_hot(labels, found.shape[1]).to(found.dtype)
    return (found.T @ given) / found.sum(0)[:, None]
