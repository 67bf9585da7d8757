"""Torch's LSTM runs unfused while a step is traced.

The fused layer of the CPU keeps what its backward needs only where autograd records, which a graph
does not do when it runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from l2rw_ext.devices import tracing


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """In the body, recurrent layers run as compositions of operations."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


@contextlib.contextmanager
def unfused_in_traces() -> Iterator[None]:
    """In the body, LSTM layers run so in steps that are traced."""
    original = nn.LSTM.forward

    @functools.wraps(original)
    def forward(module: nn.LSTM, *args: Any, **kwargs: Any) -> Any:
        with without_onednn() if tracing() else contextlib.nullcontext():
            return original(module, *args, **kwargs)

    setattr(nn.LSTM, "forward", forward)  # noqa: B010  mypy takes it for a method
    try:
        yield
    finally:
        setattr(nn.LSTM, "forward", original)  # noqa: B010  as above
