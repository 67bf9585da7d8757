"""Torch functions that run otherwise under interception; importing this registers them."""

from . import composed, elementwise, gradients, products, recurrence

__all__ = ["composed", "elementwise", "gradients", "products", "recurrence"]
