"""Argument checks that all perturbed layers share; messages name layer, argument and value."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from l2rw_ext.ops.arithmetic import accumulation_dtype

from .directions import Dense, Direction, Factored


def checked_example_dim(layer: str, example_dim: int, dims: int, allowed: int) -> int:
    """Returns ``example_dim`` counted from the front; it must be among the first ``allowed``."""
    positive = example_dim + dims if example_dim < 0 else example_dim
    if not 0 <= positive < allowed:
        raise ValueError(
            f"{layer}: example_dim must name one of the first {allowed} of the {dims} dimensions "
            f"of the input, got {example_dim}"
        )
    return positive


def is_single(layer: str, name: str, eps: Any) -> bool:
    """Says whether the input is one example without an example dimension: ``eps`` of shape ()."""
    if not isinstance(eps, Tensor):
        raise TypeError(
            f"{layer}: {name} must be a tensor of shape (n,) or None, got {type(eps).__name__}"
        )
    return eps.dim() == 0


def checked_eps(layer: str, name: str, eps: Tensor, y: Tensor, example_dim: int) -> Tensor:
    """Returns ``eps`` with shape (n,), one entry for each example of the layer's output ``y``."""
    n = y.shape[example_dim]
    if not y.is_floating_point():
        raise TypeError(f"{layer}: the output must have a real floating dtype, got {y.dtype}")
    if not eps.is_floating_point():
        raise TypeError(f"{layer}: {name} must have a real floating dtype, got {eps.dtype}")
    if eps.device != y.device:
        raise ValueError(
            f"{layer}: {name} must be on the device of the input, {y.device}, got {eps.device}"
        )
    if eps.dim() == 0 and n == 1:
        return eps.reshape(1)
    if eps.dim() != 1 or eps.shape[0] != n:
        raise ValueError(
            f"{layer}: {name} must have shape ({n},), one entry for each example (dimension "
            f"{example_dim} of the input), got {tuple(eps.shape)}"
        )
    return eps


def checked_direction(layer: str, name: str, direction: Any, y: Tensor) -> Direction:
    """Returns the direction, which must be given and fit the output ``y`` in dtype and device."""
    if not isinstance(direction, (Dense, Factored)):
        got = "None" if direction is None else type(direction).__name__
        raise TypeError(
            f"{layer}: with {name}, direction must be Dense(V, V_b) or Factored(z_clean, g_clean), "
            f"got {got}"
        )
    if isinstance(direction, Dense):
        fields = (("V", direction.V), ("V_b", direction.V_b))
        dtypes = (y.dtype, accumulation_dtype(y.dtype))
    else:
        fields = (("z_clean", direction.z_clean), ("g_clean", direction.g_clean))
        dtypes = (y.dtype, y.dtype)
    for field, value in fields:
        if value is None:
            continue
        if value.device != y.device:
            raise ValueError(
                f"{layer}: direction.{field} must be on the device of the input, {y.device}, "
                f"got {value.device}"
            )
        if field != "z_clean" and value.dtype not in dtypes:
            raise TypeError(
                f"{layer}: direction.{field} must have the dtype of the output, {y.dtype}, "
                f"got {value.dtype}"
            )
    return direction


def check_dense(layer: str, direction: Dense, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raises unless V and V_b have the shapes of the parameters that they perturb."""
    for field, value, parameter_name, parameter in (
        ("V", direction.V, "weight", weight),
        ("V_b", direction.V_b, "bias", bias),
    ):
        if value is None:
            continue
        if parameter is None:
            raise ValueError(
                f"{layer}: direction.{field} has shape {tuple(value.shape)}, but the layer has no "
                f"{parameter_name}"
            )
        if value.shape != parameter.shape:
            raise ValueError(
                f"{layer}: direction.{field} must have the shape of {parameter_name}, "
                f"{tuple(parameter.shape)}, got {tuple(value.shape)}"
            )


def required(layer: str, name: str, value: Tensor | None) -> Tensor:
    """Returns a field of a direction that this layer cannot do without."""
    if value is None:
        raise ValueError(f"{layer}: direction.{name} must be a tensor, got None")
    return value
