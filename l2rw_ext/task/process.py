"""What a step changes for the whole process, also for other threads, while it runs."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from l2rw_ext.tracing.fast_path import fast_paths

from .cached_weights import cached_weights_kept
from .checkpointing import non_reentrant
from .unfused import unfused_in_traces


def _eager() -> AbstractContextManager[Any]:
    """A context in which compiled code runs as the Python code that it was made from.

    A compiled forward shows no torch function to the interception and no second derivative to
    double backward. The compiled code is kept, and calls outside of a step use it as before.
    """
    # If dynamo was never imported, nothing is compiled; importing it takes seconds.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    from torch.compiler import set_stance

    try:
        stance: AbstractContextManager[Any] = set_stance("force_eager")
    except RuntimeError as error:
        raise RuntimeError(
            "a step cannot run inside torch.compile: compile the model, and call the step from "
            "code that is not compiled"
        ) from error
    return stance


@contextlib.contextmanager
def _changes() -> Iterator[None]:
    with _eager(), non_reentrant(), fast_paths(), unfused_in_traces(), cached_weights_kept():
        yield


class _Shared:
    """Changes that the first step to enter makes and the last to leave undoes, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                changes = _changes()
                changes.__enter__()
                self._changes = changes
            self._inside += 1

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._changes.__exit__(None, None, None)


for_steps = _Shared()
"""A context: compiled models run eagerly, reentrant checkpoints as non-reentrant ones, torch's
transformers without the modes of a step where these would keep them off the fast path, LSTM layers
unfused in a trace; and cached weights are put back in the end."""
