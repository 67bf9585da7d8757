"""The models of the paper's experiments, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures import LeNet, ResNet32, WideResNet
from ..errors import UsageError


class WideLeNet(nn.Module):
    """The wider net of the authors' code: 5x5 convolutions 16/32/64, then 1024-100-(classes-1).

    3/2 max pooling comes before ReLU and aligns its windows as TensorFlow's "same" padding does.
    The output of the first class is 0: two classes are told apart by one sigmoid.

    Args:
        classes: how many there are.
        authors: parameters start as the authors' do, from a normal distribution of deviation 0.1
            cut off at twice that, with zero biases, and not as PyTorch's layers do, which is three
            to five times smaller in the second and third convolution and the first linear layer.
    """

    def __init__(self, classes: int = 2, *, authors: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(1024, 100)
        self.fc2 = nn.Linear(100, classes - 1)
        for parameter in self.parameters() if authors else ():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.1, a=-0.2, b=0.2)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True))
        x = F.relu(F.max_pool2d(self.conv2(x), 3, 2, ceil_mode=True))
        x = F.relu(F.max_pool2d(self.conv3(x), 3, 2, padding=1))
        return F.pad(self.fc2(F.relu(self.fc1(x.flatten(1)))), (1, 0))


class ConvNet(nn.Module):
    """Convolutions 16@3x3 (stride 2), 32@3x3, 64@3x3, each with BatchNorm; then 1024-classes.

    Small enough for thousands of steps on one core, and large enough to learn the flipped labels
    of a few thousand images by heart.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(width) for width in (16, 32, 64))
        self.fc = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.norm3(self.conv3(x))), 2)
        out: Tensor = self.fc(x.flatten(1))
        return out


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "lenet": LeNet,
    "lenet-authors": WideLeNet,
    "lenet-wide": lambda classes: WideLeNet(classes, authors=False),
    "convnet": ConvNet,
    "resnet-32": lambda classes: ResNet32("batch", classes),
    "wrn-28-10": lambda classes: WideResNet(28, 10, 0.3, classes),
}
SHAPES = {
    "lenet": (1, 28, 28),
    "lenet-authors": (1, 28, 28),
    "lenet-wide": (1, 28, 28),
    "convnet": (3, 32, 32),
    "resnet-32": (3, 32, 32),
    "wrn-28-10": (3, 32, 32),
}


def make_model(name: str, classes: int) -> nn.Module:
    """A new model; its parameters come from torch's global generator.

    The residual nets start as He et al. do, their convolutions from a normal distribution of
    variance 2 / (outputs times kernel area); ``lenet-authors`` as its docstring says, the others as
    PyTorch's layers do. The small convolutional nets lie channels last, which CPUs are faster with.

    Args:
        name: a key of ``MODELS``; ``SHAPES`` has the shape of its inputs.
        classes: how many outputs.

    Raises:
        UsageError: no model has this name.
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}, expected one of {', '.join(MODELS)}")
    model = MODELS[name](classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            if isinstance(model, (ResNet32, WideResNet)):
                nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(model, (WideLeNet, ConvNet)):
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return model
