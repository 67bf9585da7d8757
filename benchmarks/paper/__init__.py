"""The paper's experiments: ``python -m benchmarks paper EXPERIMENT --help``.

Interrupted at any moment, the same command continues from its checkpoints, to the same numbers.
"""

from __future__ import annotations

from .cli import add_arguments, run

__all__ = ["add_arguments", "run"]
