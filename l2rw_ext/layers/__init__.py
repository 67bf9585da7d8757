"""How each torch operation enters Eq. 12; importing this package fills the registry.

There is one file per family of operations. All build on ``base`` (what a rule is), ``registry``
(which handler takes which torch function) and ``costs`` (what the forms of a layer cost).
"""

from . import (
    activation,
    attention,
    batched,
    broadcast,
    convolution,
    data_dependent,
    embedding,
    embedding_bag,
    linear,
    normalization,
    products,
    recurrence,
    transposed_convolution,
)
from .registry import REGISTRY

__all__ = [
    "REGISTRY",
    "activation",
    "attention",
    "batched",
    "broadcast",
    "convolution",
    "data_dependent",
    "embedding",
    "embedding_bag",
    "linear",
    "normalization",
    "products",
    "recurrence",
    "transposed_convolution",
]
