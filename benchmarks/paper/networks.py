"""The models of the paper's experiments, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures import LeNet, ResNet32, WideResNet
from ..errors import UsageError


class WideLeNet(nn.Module):
    """The wider net of the authors' code: 5x5 convolutions 16/32/64, then 1024-100-classes.

    3/2 max pooling comes before ReLU and aligns its windows as TensorFlow's "same" padding does.
    The classes have one output each, where the authors tell two classes by one sigmoid.
    """

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(1024, 100)
        self.fc2 = nn.Linear(100, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True))
        x = F.relu(F.max_pool2d(self.conv2(x), 3, 2, ceil_mode=True))
        x = F.relu(F.max_pool2d(self.conv3(x), 3, 2, padding=1))
        out: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return out


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "lenet": LeNet,
    "lenet-authors": WideLeNet,
    "resnet-32": lambda classes: ResNet32("batch", classes),
    "wrn-28-10": lambda classes: WideResNet(28, 10, 0.3, classes),
}
SHAPES = {
    "lenet": (1, 28, 28),
    "lenet-authors": (1, 28, 28),
    "resnet-32": (3, 32, 32),
    "wrn-28-10": (3, 32, 32),
}


def make_model(name: str, classes: int) -> nn.Module:
    """A new model; its parameters come from torch's global generator.

    The residual nets start as He et al. do, their convolutions from a normal distribution of
    variance 2 / (outputs times kernel area); the others as PyTorch's layers do.

    Args:
        name: a key of ``MODELS``; ``SHAPES`` has the shape of its inputs.
        classes: how many outputs.

    Raises:
        UsageError: no model has this name.
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}, expected one of {', '.join(MODELS)}")
    model = MODELS[name](classes)
    if isinstance(model, (ResNet32, WideResNet)):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
