"""One rule per torch operation; importing this package fills the registry."""

from . import (
    attention,
    autocast,
    batched,
    broadcast,
    convolution,
    embedding,
    linear,
    normalization,
    products,
    recurrence,
    selection,
    transposed_convolution,
)
from .base import REGISTRY

__all__ = [
    "REGISTRY",
    "attention",
    "autocast",
    "batched",
    "broadcast",
    "convolution",
    "embedding",
    "linear",
    "normalization",
    "products",
    "recurrence",
    "selection",
    "transposed_convolution",
]
