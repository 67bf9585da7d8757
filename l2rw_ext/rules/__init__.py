"""One rule per torch operation; importing this package fills the registry."""

from . import attention, broadcast, convolution, embedding, linear, normalization, selection
from .base import REGISTRY

__all__ = [
    "REGISTRY",
    "attention",
    "broadcast",
    "convolution",
    "embedding",
    "linear",
    "normalization",
    "selection",
]
