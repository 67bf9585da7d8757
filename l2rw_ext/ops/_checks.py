"""Argument checks: an argument that would be broadcast or converted silently is an error.

Every message names argument and value, as those of the compiled kernels do; the operator's name is
put before it by :mod:`l2rw_ext.ops._operator`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arithmetic import accumulation_dtype

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Size = tuple[int, str] | None
"""The size that a dimension must have and what that size is; None: any size."""


class ArgumentError(Exception):
    """An argument does not fit."""


class Checks:
    """The checks of one call. Where they name several sizes, these are those of all dimensions.

    Args:
        reference: name of the argument whose dtype and device the others share.
        tensor: that argument; it must have a dtype that operators compute in.
        dims: number of its dimensions; None: a check follows that is not as simple.
    """

    def __init__(self, reference: str, tensor: Tensor, dims: int | None = 3) -> None:
        self._reference = reference
        self._tensor = tensor
        if dims is not None:
            self._shape(reference, tensor, (None,) * dims)
        self._dtype(reference, tensor, _FLOATING)

    def require(self, condition: bool, message: str) -> None:
        """The condition holds, or an error has the message."""
        if not condition:
            raise ArgumentError(message)

    def same(self, name: str, tensor: Tensor | None, *sizes: Size, or_wide: bool = False) -> None:
        """The argument, if given, shares dtype and device with the reference.

        A direction, a weight or a statistic may also have the accumulation dtype (``or_wide``).
        """
        if tensor is None:
            return
        self._shape(name, tensor, sizes)
        self._device(name, tensor)
        dtype = self._tensor.dtype
        wide = accumulation_dtype(dtype)
        other = f" or its accumulation dtype ({_name(wide)})" if or_wide else ""
        self.require(
            tensor.dtype == dtype or (or_wide and tensor.dtype == wide),
            f"{name} must have the dtype of {self._reference} ({_name(dtype)}){other}, got "
            f"{_name(tensor.dtype)}",
        )

    def integers(
        self, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], *sizes: Size
    ) -> None:
        """The argument holds indices, on the device of the reference."""
        self._shape(name, tensor, sizes)
        self._device(name, tensor)
        self._dtype(name, tensor, dtypes)

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

    def _dtype(self, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
        *others, last = map(_name, dtypes)
        wanted = f"{', '.join(others)} or {last}" if others else last
        self.require(tensor.dtype in dtypes, f"{name} must be {wanted}, got {_name(tensor.dtype)}")

    def _device(self, name: str, tensor: Tensor) -> None:
        self.require(
            tensor.device == self._tensor.device,
            f"{name} must be on the device of {self._reference} ({self._tensor.device}), got "
            f"{tensor.device}",
        )

    def _shape(self, name: str, tensor: Tensor, sizes: Sequence[Size]) -> None:
        got, count = f"got shape {tuple(tensor.shape)}", len(sizes)
        self.require(
            tensor.dim() == count,
            f"{name} must have {count} dimension{'' if count == 1 else 's'}, {got}",
        )
        for dim, size in enumerate(sizes):
            if size is not None:
                self.require(
                    tensor.shape[dim] == size[0],
                    f"{name} must have size {size[0]} ({size[1]}) in dimension {dim}, {got}",
                )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
