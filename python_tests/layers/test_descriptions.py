"""The parts of a layer's description agree: term and its transpose, the output and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext.layers import LAYERS
from l2rw_ext.reference import relative_error

# Torch says once per process that an even "same" kernel costs it a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def index(*shape: int) -> Tensor:
    return torch.randint(5, shape)


CALLS: dict[str, Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "linear": lambda: (F.linear, (randn(3, 2, 4), randn(5, 4), randn(5)), {}),
    "matmul": lambda: (torch.matmul, (randn(3, 2, 4), randn(4, 5)), {}),
    "addmm": lambda: (torch.addmm, (randn(5), randn(3, 4), randn(4, 5)), {}),
    "conv1d": lambda: (F.conv1d, (randn(3, 4, 9), randn(6, 2, 2), randn(6), 2, 1, 2, 2), {}),
    "conv2d, same": lambda: (
        F.conv2d,
        (randn(3, 4, 5, 6), randn(6, 4, 2, 3), randn(6)),
        {"padding": "same"},
    ),
    "conv_transpose1d": lambda: (
        F.conv_transpose1d,
        (randn(3, 4, 5), randn(4, 3, 3), randn(6), 2, 1, 1, 2),
        {},
    ),
    "embedding": lambda: (F.embedding, (index(3, 4), randn(5, 2), 1), {}),
    "bag, sum": lambda: (F.embedding_bag, (index(3, 4), randn(5, 2)), {"mode": "sum"}),
    "bag, mean": lambda: (F.embedding_bag, (index(3, 4), randn(5, 2)), {"padding_idx": 1}),
    "layer_norm": lambda: (F.layer_norm, (randn(3, 2, 4), (4,), randn(4), randn(4)), {}),
    "group_norm": lambda: (F.group_norm, (randn(3, 4, 5), 2, randn(4), randn(4)), {}),
    "rms_norm": lambda: (F.rms_norm, (randn(3, 2, 4), (4,), randn(4)), {}),
    "batch_norm": lambda: (
        F.batch_norm,
        (randn(3, 4, 5), randn(4), randn(4).abs() + 1, randn(4), randn(4)),
        {},
    ),
    "instance_norm": lambda: (
        F.instance_norm,
        (randn(3, 4, 5),),
        {"weight": randn(4), "bias": randn(4)},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_description(name: str) -> None:
    torch.manual_seed(0)
    func, args, kwargs = CALLS[name]()
    layer = LAYERS[func]
    call = layer.bind(func, *args, **kwargs)
    assert call is not None
    options = call.options
    x = layer.enter(call.x, options)
    V, V_b = (None if p is None else torch.randn_like(p) for p in (call.weight, call.bias))

    y = layer.forward(x, call.weight, call.bias, options)
    plain = func(*args, **kwargs)
    assert relative_error(y, plain) < 1e-12

    # The term is what the direction adds, up to a row without a gradient.
    g = torch.randn_like(y)
    operands = [p.requires_grad_() for p in (call.weight, call.bias) if p is not None]
    gradients = torch.autograd.grad(layer.forward(x, call.weight, call.bias, options), operands, g)
    expected = sum((a * v).sum() for a, v in zip(gradients, (V, V_b), strict=False))
    assert isinstance(expected, Tensor)
    found = (g * layer.term(x, V, V_b, options)).sum()
    assert relative_error(found, expected) < 1e-10

    transposed = layer.term_transpose(g, x, (call.weight, call.bias), options)
    given = [t for t in transposed if t is not None]
    assert len(given) == len(gradients)
    for a, b in zip(given, gradients, strict=True):
        assert relative_error(a, b) < 1e-10

    if x.is_floating_point():
        leaf = x.detach().requires_grad_()
        out = layer.forward(leaf, call.weight, call.bias, options)
        (data,) = torch.autograd.grad(out, leaf, g)
        assert call.weight is not None
        with torch.no_grad():
            of_layer = layer.data_gradient(g, x, call.weight, options)
        assert relative_error(of_layer, data) < 1e-10
