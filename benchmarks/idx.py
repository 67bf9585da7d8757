"""The IDX files in which MNIST and Fashion-MNIST are handed out."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .errors import UsageError


def find_idx(path: Path) -> Path:
    """``path`` or its gzipped twin, whichever exists; the gzipped one, if neither does."""
    packed = path.with_name(path.name + ".gz")
    return path if path.is_file() and not packed.is_file() else packed


def read_idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file of unsigned bytes: magic 0x000008 and D, D sizes, then the bytes.

    Args:
        path: the file; a name that ends in ``.gz`` is gzipped.
        dimensions: D, 3 for images and 1 for labels.

    Returns:
        uint8, of the shape that the header gives.

    Raises:
        UsageError: the file is missing, broken, or has more or fewer dimensions or bytes.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError as error:
        raise UsageError(f"--data-root: {path} does not exist") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"--data-root: cannot read {path}: {error}") from error
    start = 4 + 4 * dimensions
    magic, *sizes = struct.unpack(f">{1 + dimensions}I", content[:start].ljust(start, b"\0"))
    if magic != 0x0800 + dimensions or len(content) != start + math.prod(sizes):
        raise UsageError(f"--data-root: {path} is not an IDX file of {dimensions} dimensions")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(sizes)
