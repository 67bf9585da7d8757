"""One rule per torch operation; importing this package fills the registry."""

from . import (
    activation,
    attention,
    autocast,
    batched,
    broadcast,
    convolution,
    embedding,
    embedding_bag,
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
    "activation",
    "attention",
    "autocast",
    "batched",
    "broadcast",
    "convolution",
    "embedding",
    "embedding_bag",
    "linear",
    "normalization",
    "products",
    "recurrence",
    "selection",
    "transposed_convolution",
]
