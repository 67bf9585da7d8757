"""Operations whose tangent has a separate rule; importing this package registers the rules."""

from . import activation, embedding, indexed_writes, normalization, unfused

__all__ = ["activation", "embedding", "indexed_writes", "normalization", "unfused"]
