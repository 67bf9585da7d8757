"""Small models with the verdict that an example map should give of each."""

from . import certain, chosen, coupled, hidden
from .table import CASES, Case, Row

__all__ = ["CASES", "Case", "Row", "certain", "chosen", "coupled", "hidden"]
