"""The two forms in which a perturbed layer takes its part of the direction v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor


def _check_floating(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{owner}: {name} must have a real floating dtype, got {value.dtype}")


@dataclass(frozen=True, eq=False)
class Dense:
    """The direction as tensors: ``V`` like the weight and ``V_b`` like the bias.

    Args:
        V: shape of the layer's weight. ``None`` for a normalization layer without a weight.
        V_b: shape of the layer's bias. ``None`` leaves the bias unperturbed.

    The dtype is that of the layer's output, or float32 for a float16 or bfloat16 output.

    Raises:
        TypeError: a field is neither a real floating tensor nor ``None``.
        ValueError: both are ``None``, or they differ in device or dtype.

    Example:
        >>> import torch
        >>> Dense(torch.ones(3, 2), torch.ones(3)).V.shape
        torch.Size([3, 2])
    """

    V: Tensor | None
    V_b: Tensor | None = None

    def __post_init__(self) -> None:
        if self.V is None and self.V_b is None:
            raise ValueError("Dense: V and V_b are both None; a direction needs at least one")
        for name, value in (("V", self.V), ("V_b", self.V_b)):
            if value is not None:
                _check_floating("Dense", name, value)
        if self.V is not None and self.V_b is not None:
            if self.V.dtype != self.V_b.dtype:
                raise ValueError(
                    f"Dense: V and V_b must share a dtype, got {self.V.dtype} and {self.V_b.dtype}"
                )
            if self.V.device != self.V_b.device:
                raise ValueError(
                    "Dense: V and V_b must share a device, "
                    f"got {self.V.device} and {self.V_b.device}"
                )


@dataclass(frozen=True, eq=False)
class Factored:
    """The direction as the factors of Eq. 12: V = Σ_js g'_js z'_jsᵀ and V_b = Σ_js g'_js.

    Args:
        z_clean: z', what the layer takes as input for the clean batch (the indices for an
            embedding, the input before normalization for a normalization layer), laid out like
            the layer's input. ``None`` for ``add`` and ``expand``, which multiply no input.
        g_clean: g', the gradient of the *mean* clean loss with respect to the layer's output for
            ``z_clean``: it carries the 1/m.
        bias: ``False`` leaves the layer's bias unperturbed, as a frozen bias needs. A layer without
            a bias has no V_b in any case.

    The factors have the dtype of the layer's output. ``linear`` never forms V where the factored
    form takes fewer operations. The other layers form it: there V is no larger than the factors,
    or the factored form would cost more.

    Raises:
        TypeError: a factor is not a tensor, or ``g_clean`` is not real floating.
        ValueError: the factors lie on different devices.

    Example:
        >>> import torch
        >>> Factored(torch.ones(4, 2), torch.ones(4, 3)).g_clean.shape
        torch.Size([4, 3])
    """

    z_clean: Tensor | None
    g_clean: Tensor
    bias: bool = True

    def __post_init__(self) -> None:
        _check_floating("Factored", "g_clean", self.g_clean)
        if self.z_clean is None:
            return
        if not isinstance(self.z_clean, Tensor):
            raise TypeError(
                f"Factored: z_clean must be a tensor or None, got {type(self.z_clean).__name__}"
            )
        if self.z_clean.device != self.g_clean.device:
            raise ValueError(
                "Factored: z_clean and g_clean must share a device, "
                f"got {self.z_clean.device} and {self.g_clean.device}"
            )


Direction: TypeAlias = Dense | Factored
