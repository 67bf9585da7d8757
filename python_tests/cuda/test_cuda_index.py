"""The index arithmetic of the CUDA kernels is tested on the host, without a GPU."""

from __future__ import annotations

import os
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
