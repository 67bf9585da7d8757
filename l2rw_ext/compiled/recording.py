"""Calls recorded in a CUDA graph and run again: the only place that knows torch's CUDA graphs."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

_BROKEN: list[Any] = []
"""Graphs whose capture did not end. The allocator may go on asking them which streams they took,
so they are kept as long as the process."""


class Graph(Protocol):
    """What a recording needs of a ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None:
        """Run again what was recorded."""


@dataclass(frozen=True)
class Recording(Generic[Result]):
    """A recorded call: what it returned lies where every replay writes its results."""

    graph: Graph
    result: Result

    def replay(self) -> Result:
        """Compute the result again, from what the inputs hold now."""
        self.graph.replay()
        return self.result


class Recorder:
    """Records calls on one device.

    Args:
        device: of CUDA, with an index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None

    @staticmethod
    def takes(device: torch.device) -> bool:
        """Whether calls on the device can be recorded."""
        return device.type == "cuda"

    def join(self) -> None:
        """Let the current stream wait for what the last one was given before another joined."""
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream

    def warm_up(self, call: Callable[[], Result]) -> Result:
        """Run a call on another stream, as a capture does.

        Libraries then have made what they make once for a stream, and autograd has no node left
        that belongs to the caller's.
        """
        current = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                return call()
        finally:
            current.wait_stream(stream)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Results of :meth:`warm_up` go to the caller's stream."""
        stream = torch.cuda.current_stream(self._device)
        for x in tensors:
            x.record_stream(stream)

    def record(self, call: Callable[[], Result]) -> Recording[Result]:
        """Record a call whose inputs stay where they are; nothing of it is computed yet.

        After an error the current stream is the caller's again, and nothing is recorded.

        Raises:
            RuntimeError: the call does what a CUDA graph cannot hold.
        """
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self._device)
        # What the collector frees during a capture can end it.
        gc.collect()
        torch.cuda.empty_cache()
        # Not ``torch.cuda.graph``, which leaves its own stream current when a capture fails.
        with without_collection(), torch.cuda.stream(torch.cuda.Stream(self._device)):
            # Other threads, those that load data among them, may allocate meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = call()
                graph.capture_end()
            except BaseException:
                self._abandon(graph, pool)
                raise
        return Recording(graph, result)

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """End a capture that failed.

        ``capture_end`` raises before it tells the allocator and the generator. The first would then
        hold back freed memory for as long as the process runs, and keep what the capture took.
        """
        try:
            graph.capture_end()
        except RuntimeError:
            _BROKEN.append(graph)
            with contextlib.suppress(RuntimeError):
                # Where the allocator has been told, ``reset`` releases the memory.
                torch._C._cuda_endAllocateToPool(self._device.index, pool)
                torch._C._cuda_releasePool(self._device.index, pool)
            self._capture_nothing()
        with contextlib.suppress(RuntimeError):
            graph.reset()

    def _capture_nothing(self) -> None:
        """Begin a capture and end it.

        Until 2.13, torch's generator of the device goes on capturing after a capture that did not
        end, and refuses to draw outside of one. The next capture that ends sets it right.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            contextlib.suppress(RuntimeError),
            warnings.catch_warnings(),
            torch.cuda.stream(torch.cuda.Stream(self._device)),
        ):
            warnings.simplefilter("ignore")  # that the graph is empty
            graph.capture_begin(
                pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local"
            )
            graph.capture_end()


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection of its own accord inside."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
