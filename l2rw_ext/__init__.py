"""Exact and cheap example weights of "Learning to Reweight Examples" for PyTorch models."""

from . import _loader as _loader
from . import functional, ops, reference
from .accumulation import Accumulation
from .cycle import CleanBatches
from .engines.base import NotExactError
from .examples import ExampleRecord
from .plan import Explanation
from .result import Step
from .reweighter import Reweighter

__all__ = [
    "Accumulation",
    "CleanBatches",
    "ExampleRecord",
    "Explanation",
    "NotExactError",
    "Reweighter",
    "Step",
    "functional",
    "ops",
    "reference",
]
