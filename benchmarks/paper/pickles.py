"""Pickles that hold lists, text and numpy arrays, and nothing that runs code when it is read."""

from __future__ import annotations

import codecs
import importlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError


def _admitted() -> dict[str, Callable[..., Any]]:
    """What an array is pickled with, under the names of numpy 1 and 2."""
    try:
        numpy: Any = importlib.import_module("numpy")
    except ImportError as error:
        raise UsageError("install numpy to read CIFAR") from error
    reconstruct = numpy.empty(0).__reduce__()[0]
    return {
        "numpy.core.multiarray._reconstruct": reconstruct,
        "numpy._core.multiarray._reconstruct": reconstruct,
        "numpy.ndarray": numpy.ndarray,
        "numpy.dtype": numpy.dtype,
        "_codecs.encode": codecs.encode,
    }


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _admitted()[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array") from None


def read_pickle(content: bytes, name: str) -> dict[str, Any]:
    """A pickled dict as Python 2 wrote it; keys that were byte strings come back as text.

    Raises:
        UsageError: it is broken, no dict, or holds anything but plain values and arrays; the
            sentence has ``name``.
    """
    try:
        found = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except UsageError:
        raise
    except Exception as error:
        # A damaged pickle raises whatever its opcodes stumble over.
        raise UsageError(f"--data-root: {name} is not a pickle of arrays: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"--data-root: {name} holds {type(found).__name__}, expected a dict")
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in found.items()}


def read_torch(file: Path | io.BytesIO, name: str) -> dict[str, Any]:
    """A dict of arrays that ``torch.save`` wrote, read with the same suspicion."""
    admitted = _admitted()
    numpy: Any = importlib.import_module("numpy")
    safe = [(f, path) for path, f in admitted.items()] + [numpy.dtypes.Int64DType]
    try:
        with torch.serialization.safe_globals(safe):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # The archive reader and the unpickler raise errors of many types for a damaged file.
        first = str(error).strip().split("\n", 1)[0]
        raise UsageError(f"cannot read {name}: {first}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{name} holds {type(found).__name__}, expected a dict")
    return found
