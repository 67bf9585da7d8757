"""The CUDA kernels on the host: the sources of csrc/cuda with the headers of emulator/.

The objects are kept in build/, so that only what has changed is compiled again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.paths import EMULATOR, ROOT

COMPILER = shlex.split(os.environ.get("CXX", "c++"))

# A vector at an odd address ends the process with its place. L2RW_EMULATOR_FLAGS adds others.
FLAGS = (
    "-std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -fno-math-errno"
    " -Wall -Wextra -Werror -Wno-unknown-pragmas"
    " -fsanitize=alignment,bounds,shift -fno-sanitize-recover "
) + os.environ.get("L2RW_EMULATOR_FLAGS", "")


def _rules() -> Iterator[str]:
    torch_root = Path(torch.__file__).parent
    include = f"-I{EMULATOR} -I{ROOT / 'csrc'} -isystem {torch_root / 'include'}"
    target = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
    compiler = shlex.join(COMPILER)
    yield f"rule compile\n  depfile = $out.d\n  deps = gcc\n  command = {compiler} {FLAGS}"
    yield f" {include} {target} -include {EMULATOR / 'emulator.h'} -MMD -MF $out.d"
    yield " -x c++ -c $in -o $out\n"
    yield f"rule link\n  command = {compiler} {FLAGS} -shared $in -o $out"
    yield f" -L{torch_root / 'lib'} -ltorch_cpu -ltorch -Wl,-rpath,{torch_root / 'lib'}\n"
    sources = [ROOT / "csrc" / "library.cpp", EMULATOR / "emulator.cpp", EMULATOR / "faults.cu"]
    sources += sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    for source in sources:
        yield f"build {_object(source)}: compile {source}\n"
    yield f"build emulated.so: link {' '.join(map(_object, sources))}\n"


def _object(source: Path) -> str:
    """A name of its own for each source, though folders may hold files of one name."""
    return "-".join(source.relative_to(ROOT).with_suffix(".o").parts)


def _folder() -> Path:
    """Where the objects are kept: one folder for each compiler, its options and torch."""
    how = "\0".join((*COMPILER, FLAGS, torch.__version__, str(Path(torch.__file__).parent)))
    return ROOT / "build" / f"emulator-{hashlib.sha256(how.encode()).hexdigest()[:12]}"


def _build(folder: Path) -> Path:
    """Compile what has changed. One process at a time does so; the others find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("".join(_rules()))
        command = [sys.executable, "-m", "ninja", "-C", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "emulated.so"


@pytest.fixture(scope="session")
def emulator() -> Any:
    """``torch.ops.l2rw_emulated``: the operators on tensors of the host, by the CUDA kernels."""
    if not (ROOT / "csrc").is_dir():
        pytest.skip("not a checkout")
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("no C++ compiler")
    torch.ops.load_library(_build(_folder()))
    return torch.ops.l2rw_emulated
