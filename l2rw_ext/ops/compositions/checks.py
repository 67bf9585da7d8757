"""Argument checks: an argument that would be broadcast or converted silently is an error.

Every message names operator, argument and value, as those of the compiled kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l2rw_ext.ops.arithmetic import accumulation_dtype

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Checks:
    """The checks of one operator.

    Args:
        operation: its name.
        reference: name of the argument whose dtype and device the others share.
        tensor: that argument.
    """

    def __init__(self, operation: str, reference: str, tensor: Tensor) -> None:
        self._operation = operation
        self._reference = reference
        self._tensor = tensor

    def require(self, condition: bool, message: str) -> None:
        """Raise ``RuntimeError`` with the message unless the condition holds."""
        if not condition:
            raise RuntimeError(f"l2rw_ext::{self._operation}: {message}")

    def floating(self) -> None:
        """The reference has a dtype that operators compute in."""
        self.require(
            self._tensor.dtype in _FLOATING,
            f"{self._reference} must be float64, float32, bfloat16 or float16, got "
            f"{_name(self._tensor.dtype)}",
        )

    def dims(self, name: str, tensor: Tensor, count: int) -> None:
        """The argument has ``count`` dimensions."""
        self.require(
            tensor.dim() == count,
            f"{name} must have {count} dimension{'' if count == 1 else 's'}, got shape "
            f"{tuple(tensor.shape)}",
        )

    def size(self, name: str, tensor: Tensor, dim: int, size: int, what: str) -> None:
        """The argument has ``size`` in dimension ``dim``; ``what`` says what that size is."""
        self.require(
            tensor.shape[dim] == size,
            f"{name} must have size {size} ({what}) in dimension {dim}, got shape "
            f"{tuple(tensor.shape)}",
        )

    def device(self, name: str, tensor: Tensor) -> None:
        """The argument is on the device of the reference."""
        self.require(
            tensor.device == self._tensor.device,
            f"{name} must be on the device of {self._reference} ({self._tensor.device}), got "
            f"{tensor.device}",
        )

    def same(self, name: str, tensor: Tensor) -> None:
        """The argument shares dtype and device with the reference."""
        self.device(name, tensor)
        self.require(
            tensor.dtype == self._tensor.dtype,
            f"{name} must have the dtype of {self._reference} ({_name(self._tensor.dtype)}), got "
            f"{_name(tensor.dtype)}",
        )

    def same_or_wide(self, name: str, tensor: Tensor) -> None:
        """As :meth:`same`, or in the accumulation dtype: a direction, a weight, a statistic."""
        self.device(name, tensor)
        dtype = self._tensor.dtype
        wide = accumulation_dtype(dtype)
        self.require(
            tensor.dtype in (dtype, wide),
            f"{name} must have the dtype of {self._reference} ({_name(dtype)}) or its accumulation "
            f"dtype ({_name(wide)}), got {_name(tensor.dtype)}",
        )

    def vector(self, name: str, tensor: Tensor | None, size: int, what: str) -> None:
        """The argument, if given, has one number for each of something."""
        if tensor is None:
            return
        self.same_or_wide(name, tensor)
        self.dims(name, tensor, 1)
        self.size(name, tensor, 0, size, what)

    def numbers(self, name: str, numbers: Sequence[int], count: int, least: int) -> None:
        """There is one number for each spatial dimension, none below ``least``."""
        self.require(
            len(numbers) == count,
            f"{name} must have {count} number{'' if count == 1 else 's'}, one for each spatial "
            f"dimension of z, got {list(numbers)}",
        )
        self.require(
            all(number >= least for number in numbers),
            f"{name} must be at least {least}, got {list(numbers)}",
        )


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
