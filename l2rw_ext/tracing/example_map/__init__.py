"""Which example each element of a forward belongs to, whatever today's values are."""

from .exits import Exits
from .ids import MIXED, NONE
from .map import ExampleMap
from .verdict import Verdict, judge

__all__ = ["MIXED", "NONE", "ExampleMap", "Exits", "Verdict", "judge"]
