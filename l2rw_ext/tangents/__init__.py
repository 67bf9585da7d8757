"""Forward-mode differentiation of an unmodified model along one direction.

Importing this package fills the registry of rules, one file per family.
"""

from . import activation, composite, embedding, indexed_writes, multilinear, normalization
from .mode import Tangents

__all__ = [
    "Tangents",
    "activation",
    "composite",
    "embedding",
    "indexed_writes",
    "multilinear",
    "normalization",
]
