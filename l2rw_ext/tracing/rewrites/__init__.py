"""Torch functions that are composed of layers, or decide by values; importing registers them."""

from . import composed, data_dependent, elementwise, gradients, products, recurrence

__all__ = ["composed", "data_dependent", "elementwise", "gradients", "products", "recurrence"]
