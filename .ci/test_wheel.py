"""What `.ci/try_wheel` asks of an installed wheel, beside the doctor and the doctests."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import l2rw_ext as l2rw

DISTRIBUTION = importlib.metadata.distribution("l2rw_ext")


def libraries() -> list[str]:
    assert DISTRIBUTION.files is not None
    return [str(file) for file in DISTRIBUTION.files if ".so" in file.suffixes]


def test_no_library_of_another_package_is_in_the_wheel() -> None:
    known = r"l2rw_ext/(_C\.cpython-\w+-[\w-]+|_ops|_ops_cuda)\.so"
    assert not [name for name in libraries() if not re.fullmatch(known, name)]


def test_operators_find_the_libraries_of_torch() -> None:
    """Through their RUNPATH: this process loads them before torch, and needs a file of torch."""
    path = DISTRIBUTION.locate_file("l2rw_ext/_ops.so")
    load = f"import ctypes, sys; ctypes.CDLL({str(path)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", load], check=True)


def test_the_example_on_its_page_trains() -> None:
    """A wheel carries the README, which the package index shows."""
    page = DISTRIBUTION.metadata.get_payload()
    namespace: dict[str, float] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        exec(block, namespace)
    assert namespace["accuracy"] > 0.85


def test_compiling_without_a_compiler_says_what_is_missing() -> None:
    def losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    batch = torch.randn(6, 4), torch.arange(6) % 3
    reweighter = l2rw.Reweighter(nn.Linear(4, 3), losses, compile=True)
    reweighter.backward(batch, batch)  # the first step of a kind is not compiled
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler; install one, or take compile="):
        step = reweighter.backward(batch, batch)
    assert step.weights.sum() == pytest.approx(1)
