"""Finds and loads the compiled operators, and remembers why a library is not loaded."""

from __future__ import annotations

import ctypes
import dataclasses
import pathlib

import torch

try:
    from l2rw_ext import _C
except ImportError as error:
    # An ImportError that names the package is one line, not a traceback, under `python -m`.
    raise ImportError(
        f"{pathlib.Path(__file__).parents[1]} has no compiled module for this Python; in a "
        "checkout, type pip install --no-build-isolation -e .",
        name="l2rw_ext",
    ) from error

__all__ = ["BUILD_INFO", "Library", "find_cuda", "instruction_set", "libraries", "load_cuda"]

BUILD_INFO = _C.build_info()

# An editable install keeps the compiled files apart from the Python sources.
_FOLDER = pathlib.Path(_C.__file__).parent


@dataclasses.dataclass(frozen=True)
class Library:
    """One operator library of the package.

    Attributes:
        name: file name, such as ``_ops.so``.
        path: its file, or None if this build has none.
        loaded: whether its operators are registered.
        reason: why it is not loaded; empty if it is.
    """

    name: str
    path: pathlib.Path | None
    loaded: bool
    reason: str


def _cause(error: OSError) -> BaseException:
    """The message of the dynamic linker, which torch wraps in another error."""
    return error.__cause__ or error


def _load_cpu() -> Library:
    path = _FOLDER / "_ops.so"
    if not path.exists():
        raise ImportError(
            f"l2rw_ext is not completely installed: {path} is missing; reinstall it",
            name="l2rw_ext",
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"l2rw_ext {BUILD_INFO['version']} needs torch {BUILD_INFO['torch_target']} or newer, "
            f"and torch {torch.__version__} does not load its operators: {_cause(error)}",
            name="l2rw_ext",
        ) from error
    return Library("_ops.so", path, True, "")


def find_cuda() -> Library:
    """The library of CUDA kernels, not loaded; the reason is empty if this torch can load it."""
    name = "_ops_cuda.so"
    path = _FOLDER / name
    if torch.version.cuda is None:
        reason = (
            f"torch {torch.__version__} is built without CUDA; for a GPU, install a CUDA build of "
            "torch"
        )
        return Library(name, path if path.exists() else None, False, reason)
    if not path.exists():
        reason = (
            "this build has no CUDA kernels; rebuild with nvcc: "
            "L2RW_CUDA=ON pip install --no-build-isolation ."
        )
        return Library(name, None, False, reason)
    built = BUILD_INFO["cuda_version"]
    if torch.version.cuda.split(".")[0] != built.split(".")[0]:
        reason = (
            f"it is built with CUDA {built} and torch with CUDA {torch.version.cuda}; "
            f"rebuild with nvcc {torch.version.cuda.split('.')[0]}: "
            "L2RW_CUDA=ON pip install --no-build-isolation ."
        )
        return Library(name, path, False, reason)
    return Library(name, path, False, "")


def load_cuda() -> Library:
    """Load the library of CUDA kernels, which registers them, if this torch can load it."""
    global _cuda
    found = find_cuda()
    if found.path is not None and not found.reason:
        try:
            torch.ops.load_library(str(found.path))
            found = dataclasses.replace(found, loaded=True)
        except OSError as error:
            reason = f"the dynamic linker refused it: {_cause(error)}"
            found = dataclasses.replace(found, reason=reason)
    _cuda = found
    return found


_cpu = _load_cpu()
_cuda = find_cuda()


def libraries() -> tuple[Library, Library]:
    """The libraries of CPU and CUDA kernels as they are now."""
    return _cpu, _cuda


def instruction_set() -> str:
    """The instruction set the inner loops run with: baseline, avx2 or avx512.

    The environment variable ``L2RW_CPU_ISA`` limits it, if set before the first operator runs.
    """
    function = ctypes.CDLL(str(_cpu.path)).l2rw_cpu_isa
    function.restype = ctypes.c_char_p
    name = function()
    assert isinstance(name, bytes)
    return name.decode()
