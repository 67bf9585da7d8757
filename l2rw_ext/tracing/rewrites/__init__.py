"""Torch functions that are composed of layers, or decide by values; importing registers them."""

from . import composed, elementwise, gradients, products, recurrence

__all__ = ["composed", "elementwise", "gradients", "products", "recurrence"]
