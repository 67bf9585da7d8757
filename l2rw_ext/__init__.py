"""Exact and cheap example weights of "Learning to Reweight Examples" for PyTorch models."""

from . import functional, ops, reference, weighing
from .data.clean_batches import CleanBatches
from .data.example_record import ExampleRecord
from .engines.explanation import Explanation
from .errors import NotExactError, RankError
from .reweighter import Reweighter
from .step.accumulation import Accumulation
from .step.weighing import Step

__all__ = [
    "Accumulation",
    "CleanBatches",
    "ExampleRecord",
    "Explanation",
    "NotExactError",
    "RankError",
    "Reweighter",
    "Step",
    "functional",
    "ops",
    "reference",
    "weighing",
]
