"""The scripts in ``examples/`` as modules."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from support.paths import ROOT

NEEDED = {
    "accelerate_loop": ["accelerate", "sklearn"],
    "language_model": [],
    "lightning_loop": ["lightning", "sklearn"],
    "noisy_labels": ["matplotlib", "mlxtend"],
    "tabular": ["matplotlib", "pandas"],
    "text": ["sklearn"],
    "trainer": ["transformers", "accelerate", "peft"],
}
"""The packages that a script imports, beside torch and NumPy."""


def script(name: str) -> Any:
    """A script as a module of its own, whose names a test may change; skips without packages."""
    for package in NEEDED[name]:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
