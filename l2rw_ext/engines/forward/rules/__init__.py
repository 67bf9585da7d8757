"""Operations whose tangent has a separate rule; importing this package fills the registry."""

from l2rw_ext.engines.forward.registry import REGISTRY

from . import activation, embedding, indexed_writes, multilinear, normalization, unfused

__all__ = [
    "REGISTRY",
    "activation",
    "embedding",
    "indexed_writes",
    "multilinear",
    "normalization",
    "unfused",
]
