"""Arguments that do not fit are errors that name the layer, the argument and the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from l2rw_ext import functional as PF

X = torch.ones(3, 4)
W, B = torch.ones(2, 4), torch.ones(2)
EPS = torch.zeros(3)
V = PF.Dense(torch.ones(2, 4), torch.ones(2))
IMAGES, FILTERS = torch.ones(3, 2, 5), torch.ones(4, 2, 3)
INDEX, TABLE = torch.zeros(3, 2, dtype=torch.int64), torch.ones(5, 4)


def linear(**kwargs: Any) -> Tensor:
    return PF.linear(X, W, B, **{"eps": EPS, "direction": V, **kwargs})


def conv(*args: Any, **kwargs: Any) -> Tensor:
    given = {"eps": EPS, "direction": PF.Dense(torch.ones_like(FILTERS)), **kwargs}
    return PF.conv1d(IMAGES, FILTERS, *args, **given)


def embedding(**kwargs: Any) -> Tensor:
    given = {"eps": EPS, "direction": PF.Dense(torch.ones_like(TABLE)), **kwargs}
    return PF.embedding(INDEX, TABLE, **given)


def layer_norm(**kwargs: Any) -> Tensor:
    given = {"perturbation": EPS, "direction": PF.Dense(torch.ones(4)), **kwargs}
    return PF.layer_norm(X, (4,), torch.ones(4), **given)


def batch_norm(**kwargs: Any) -> Tensor:
    given = {"perturbation": EPS, "direction": PF.Dense(torch.ones(4)), **kwargs}
    return PF.batch_norm(X, torch.zeros(4), torch.ones(4), torch.ones(4), **given)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


VALUE_ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "eps shape": (lambda: linear(eps=ones(4)), r"linear: eps must have shape \(3,\).*\(4,\)"),
    "eps dims": (lambda: linear(eps=ones(3, 1)), r"linear: eps must have shape.*\(3, 1\)"),
    "eps device": (lambda: linear(eps=EPS.to("meta")), "linear: eps must be on the device.*meta"),
    "V shape": (
        lambda: linear(direction=PF.Dense(ones(4, 2))),
        r"linear: direction.V must have the shape of weight, \(2, 4\), got \(4, 2\)",
    ),
    "V_b shape": (
        lambda: linear(direction=PF.Dense(ones(2, 4), ones(3))),
        r"linear: direction.V_b must have the shape of bias, \(2,\), got \(3,\)",
    ),
    "V_b without a bias": (
        lambda: PF.linear(X, W, eps=EPS, direction=V),
        r"linear: direction.V_b has shape \(2,\), but the layer has no bias",
    ),
    "V missing": (
        lambda: linear(direction=PF.Dense(None, ones(2))),
        "linear: direction.V must be a tensor, got None",
    ),
    "V device": (
        lambda: linear(direction=PF.Dense(ones(2, 4).to("meta"))),
        "linear: direction.V must be on the device of the input, cpu, got meta",
    ),
    "example_dim": (
        lambda: linear(example_dim=1),
        "linear: example_dim must name one of the first 1 of the 2 dimensions.*got 1",
    ),
    "linear weight": (
        lambda: PF.linear(X, ones(4), eps=EPS, direction=PF.Dense(ones(4))),
        r"linear: with eps, weight must have shape \(d_out, d_in\), got \(4,\)",
    ),
    "z_clean width": (
        lambda: linear(direction=PF.Factored(ones(2, 3), ones(2, 2))),
        r"linear: direction.z_clean must have shape.*d_in = 4, got \(2, 3\)",
    ),
    "g_clean width": (
        lambda: linear(direction=PF.Factored(ones(2, 4), ones(2, 4))),
        r"linear: direction.g_clean must have the shape of the output for z_clean, \(2, 2\), got",
    ),
    "factors disagree": (
        lambda: linear(direction=PF.Factored(ones(2, 4), ones(3, 2))),
        r"linear: direction.g_clean must have the shape of the output.*\(2, 2\), got \(3, 2\)",
    ),
    "z_clean missing": (
        lambda: linear(direction=PF.Factored(None, ones(2, 2))),
        "linear: direction.z_clean must be a tensor, got None",
    ),
    "padding mode": (
        lambda: conv(padding_mode="mirror"),
        "conv1d: padding_mode must be one of.*got 'mirror'",
    ),
    "padding name": (
        lambda: conv(padding="full"),
        'conv1d: padding must be "same", "valid" or numbers, got "full"',
    ),
    "same with a stride": (
        lambda: conv(None, 2, "same"),
        r'conv1d: padding="same" needs a stride of 1, got \(2,\)',
    ),
    "stride length": (
        lambda: conv(None, (1, 1)),
        r"conv1d: stride must be one number or 1, got \(1, 1\)",
    ),
    "convolution example_dim": (
        lambda: conv(example_dim=1),
        "conv1d: example_dim must name one of the first 1 of the 3 dimensions.*got 1",
    ),
    "convolution input": (
        lambda: PF.conv1d(ones(1, 2, 3, 4), FILTERS, eps=EPS, direction=V),
        r"conv1d: input must have 3 dimensions.*got shape \(1, 2, 3, 4\)",
    ),
    "convolution weight": (
        lambda: PF.conv1d(IMAGES, ones(2, 2), eps=EPS, direction=V),
        r"conv1d: weight must have 3 dimensions, got shape \(2, 2\)",
    ),
    "convolution z_clean": (
        lambda: conv(direction=PF.Factored(ones(2, 3, 5), ones(2, 4, 3))),
        r"conv1d: direction.z_clean must have 3 dimensions, \(m, 2, ...\), got shape \(2, 3, 5\)",
    ),
    "convolution g_clean": (
        lambda: conv(direction=PF.Factored(ones(2, 2, 5), ones(2, 4, 5))),
        r"conv1d: direction.g_clean must have the shape of the output.*\(2, 4, 3\), got",
    ),
    "frequencies": (
        lambda: embedding(scale_grad_by_freq=True),
        "embedding: scale_grad_by_freq must be False with eps.*got True",
    ),
    "embedding g_clean": (
        lambda: embedding(direction=PF.Factored(INDEX, ones(3, 4))),
        r"embedding: direction.g_clean must have the shape.*\(3, 2, 4\), got \(3, 4\)",
    ),
    "training": (
        lambda: batch_norm(training=True),
        "batch_norm: training must be False with perturbation, got True",
    ),
    "perturbation shape": (
        lambda: layer_norm(perturbation=ones(4)),
        r"layer_norm: perturbation must have shape \(3,\).*got \(4,\)",
    ),
    "normalized example_dim": (
        lambda: layer_norm(example_dim=-1),
        "layer_norm: example_dim must name one of the first 1 of the 2 dimensions.*got -1",
    ),
    "no parameter": (
        lambda: PF.layer_norm(X, (4,), perturbation=EPS, direction=PF.Dense(ones(4))),
        "layer_norm: with perturbation, the layer must have a weight or a bias",
    ),
    "layer_norm z_clean": (
        lambda: layer_norm(direction=PF.Factored(ones(2, 5), ones(2, 5))),
        r"layer_norm: direction.z_clean must be a batch whose shape ends in \(4,\), got \(2, 5\)",
    ),
    "batch_norm z_clean": (
        lambda: batch_norm(direction=PF.Factored(ones(4), ones(4))),
        r"batch_norm: direction.z_clean must be a batch.* got \(4,\)",
    ),
    "layer_norm g_clean": (
        lambda: layer_norm(direction=PF.Factored(ones(2, 4), ones(3, 4))),
        r"layer_norm: direction.g_clean must have the shape.*, \(2, 4\), got \(3, 4\)",
    ),
    "p per example": (
        lambda: PF.add(X, ones(3, 4), eps=EPS, direction=PF.Dense(ones(3, 4))),
        r"add: p must be shared by all examples.*got shape \(3, 4\)",
    ),
    "p larger than input": (
        lambda: PF.mul(X, ones(1, 1, 4), eps=EPS, direction=PF.Dense(ones(1, 1, 4))),
        r"mul: input must have at least the 3 dimensions of p.*got shape \(3, 4\)",
    ),
    "V unlike p": (
        lambda: PF.expand(ones(4), 3, 4, eps=EPS, direction=PF.Dense(ones(1, 4))),
        r"expand: direction.V must have the shape of p, \(4,\), got \(1, 4\)",
    ),
    "V_b of p": (
        lambda: PF.add(X, ones(4), eps=EPS, direction=PF.Dense(ones(4), ones(4))),
        "add: direction.V_b must be None",
    ),
    "g_clean unlike p": (
        lambda: PF.add(X, ones(4), eps=EPS, direction=PF.Factored(None, ones(2, 3))),
        r"add: direction.g_clean must have a shape to which p, \(4,\), broadcasts, got \(2, 3\)",
    ),
    "mul factors": (
        lambda: PF.mul(X, ones(4), eps=EPS, direction=PF.Factored(ones(2, 3), ones(2, 4))),
        r"mul: direction.z_clean must broadcast to g_clean, got shapes \(2, 3\) and \(2, 4\)",
    ),
    "empty direction": (lambda: PF.Dense(None), "Dense: V and V_b are both None"),
    "direction devices": (
        lambda: PF.Dense(ones(2, 4), ones(2).to("meta")),
        "Dense: V and V_b must share a device, got cpu and meta",
    ),
    "direction dtypes": (
        lambda: PF.Dense(ones(2, 4), ones(2).double()),
        "Dense: V and V_b must share a dtype, got torch.float32 and torch.float64",
    ),
    "factor devices": (
        lambda: PF.Factored(ones(2, 4).to("meta"), ones(2)),
        "Factored: z_clean and g_clean must share a device, got meta and cpu",
    ),
}

TYPE_ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "eps number": (lambda: linear(eps=0.5), "linear: eps must be a tensor.*got float"),
    "eps dtype": (
        lambda: linear(eps=torch.zeros(3, dtype=torch.int64)),
        "linear: eps must have a real floating dtype, got torch.int64",
    ),
    "no direction": (
        lambda: linear(direction=None),
        r"linear: with eps, direction must be Dense\(V, V_b\).*got None",
    ),
    "direction type": (lambda: linear(direction=W), "linear: with eps, direction.*got Tensor"),
    "direction dtype": (
        lambda: linear(direction=PF.Dense(ones(2, 4).double())),
        "linear: direction.V must have the dtype of the output, torch.float32.*got torch.float64",
    ),
    "complex": (
        lambda: PF.linear(X.cfloat(), W.cfloat(), eps=EPS, direction=V),
        "linear: the output must have a real floating dtype, got torch.complex64",
    ),
    "norm eps": (
        lambda: layer_norm(eps=EPS),
        "layer_norm: eps is the numerical constant.*goes into perturbation=",
    ),
    "norm perturbation": (
        lambda: batch_norm(perturbation=0.1),
        "batch_norm: perturbation must be a tensor.*got float",
    ),
    "embedding z_clean": (
        lambda: embedding(direction=PF.Factored(ones(3, 2), ones(3, 2, 4))),
        "embedding: direction.z_clean must hold indices.*got torch.float32",
    ),
    "V type": (lambda: PF.Dense([1.0]), "Dense: V must be a tensor, got list"),
    "V dtype": (
        lambda: PF.Dense(torch.ones(2, dtype=torch.int64)),
        "Dense: V must have a real floating dtype, got torch.int64",
    ),
    "z_clean type": (
        lambda: PF.Factored([1.0], ones(2)),
        "Factored: z_clean must be a tensor or None, got list",
    ),
    "g_clean type": (lambda: PF.Factored(ones(2), 1.0), "Factored: g_clean must be a tensor"),
}


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_value_errors(name: str) -> None:
    call, message = VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_type_errors(name: str) -> None:
    call, message = TYPE_ERRORS[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_without_eps_a_direction_is_ignored() -> None:
    """A model switches the perturbation off by eps alone."""
    expected = torch.nn.functional.linear(X, W, B)
    assert torch.equal(PF.linear(X, W, B, eps=None, direction=V), expected)


def test_directions_are_frozen() -> None:
    with pytest.raises(AttributeError):
        V.V = torch.zeros(2, 4)  # type: ignore[misc]
