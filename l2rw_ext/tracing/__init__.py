"""What a model's forward does with parameters and examples."""

from . import rewrites

__all__ = ["rewrites"]
