"""One rule per torch operation; importing this package fills the registry."""

from . import (
    attention,
    autocast,
    broadcast,
    convolution,
    embedding,
    linear,
    normalization,
    recurrence,
    selection,
    transposed_convolution,
)
from .base import REGISTRY

__all__ = [
    "REGISTRY",
    "attention",
    "autocast",
    "broadcast",
    "convolution",
    "embedding",
    "linear",
    "normalization",
    "recurrence",
    "selection",
    "transposed_convolution",
]
