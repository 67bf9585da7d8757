"""The index arithmetic of the CUDA kernels is tested on the host, without a GPU."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from support.paths import INDEX_TEST, ROOT

COMPILER = shlex.split(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")
@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a checkout")
def test_index_logic(tmp_path: Path) -> None:
    program = tmp_path / "cuda_index_test"
    command = [*COMPILER, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [*command, f"-I{ROOT / 'csrc'}", str(INDEX_TEST), "-o", str(program)], check=True
    )
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all passed\n"


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a checkout")
def test_calls_of_the_runtime() -> None:
    """All are in launch.cuh, where a failed one leaves no error for the launch after it."""
    calls = {
        (path.name, check, call)
        for path in (ROOT / "csrc").rglob("*.*")
        for check, call in re.findall(r"(\w*)\(\s*(cuda[A-Z]\w+)\(", path.read_text())
    }
    assert calls == {
        ("launch.cuh", "check_runtime", "cudaDeviceGetAttribute"),
        ("launch.cuh", "check_runtime", "cudaFuncSetAttribute"),
        ("launch.cuh", "", "cudaGetLastError"),
    }
