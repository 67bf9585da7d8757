"""Torch functions that are composed of layers, or decide by values; importing registers them."""

from . import composed, elementwise, products, recurrence

__all__ = ["composed", "elementwise", "products", "recurrence"]
