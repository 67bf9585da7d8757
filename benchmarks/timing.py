"""Clocks for short calls on the CPU and on CUDA, and calls captured in a CUDA graph.

On CUDA a call is timed by events on the stream, so that what the host does counts only where the
device waits for it. ``cold`` writes a buffer of several times the size of the L2 cache before each
call: its inputs then come from memory. ``warm`` leaves in the cache what earlier calls left there.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")
CACHES = ("cold", "warm")
_CAPTURE_WARMUP = 3
_FLUSH_BYTES = 2**28


def use_device(device: str) -> None:
    """Make ``cuda:K`` the current device, for streams, events and graphs without one of their own.

    Plain ``cpu`` and ``cuda`` leave the current device as it is.
    """
    index = torch.device(device).index
    if index is not None and device.startswith("cuda"):
        torch.cuda.set_device(index)


def _flush_buffer(device: str) -> torch.Tensor:
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(_FLUSH_BYTES, 4 * l2), dtype=torch.int8, device=device)


def _cuda_times(
    calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int, device: str, cache: str
) -> dict[str, list[float]]:
    flush = _flush_buffer(device) if cache == "cold" else None
    names = list(calls)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in names}
    for repeat in range(-warmup, repeats):
        for k in range(len(names)):
            name = names[(k + repeat) % len(names)]
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            if flush is not None:
                flush.zero_()
            start.record()
            calls[name]()
            end.record()
            if repeat >= 0:
                events[name].append((start, end))
        torch.cuda.synchronize(device)
    return {n: [1e-3 * a.elapsed_time(b) for a, b in pairs] for n, pairs in events.items()}


def _cpu_times(
    calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int
) -> dict[str, list[float]]:
    names = list(calls)
    times: dict[str, list[float]] = {n: [] for n in names}
    for repeat in range(-warmup, repeats):
        for k in range(len(names)):
            name = names[(k + repeat) % len(names)]
            start = time.perf_counter()
            calls[name]()
            elapsed = time.perf_counter() - start
            if repeat >= 0:
                times[name].append(elapsed)
    return times


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    device: str = "cpu",
    cache: str = "warm",
) -> dict[str, list[float]]:
    """Seconds of every call by name: one of each in turn, starting one further each round."""
    with without_collection():
        if device.startswith("cuda"):
            return _cuda_times(calls, repeats, warmup, device, cache)
        return _cpu_times(calls, repeats, warmup)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """The garbage collector does not start by itself inside."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class Captured(Generic[Result]):
    """A call in a CUDA graph: every replay writes its result where the first one lies."""

    graph: torch.cuda.CUDAGraph
    result: Result

    def replay(self) -> Result:
        """Compute the result again, from what the inputs hold now."""
        self.graph.replay()
        return self.result


def capture(call: Callable[[], Result]) -> Captured[Result]:
    """Capture a call whose inputs stay where they are, after some runs of it on another stream.

    Raises:
        RuntimeError: the call does what a CUDA graph cannot hold.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(_CAPTURE_WARMUP):
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # ``torch.cuda.graph`` leaves its stream current when a capture fails; what the collector frees
    # during a capture can end it.
    with without_collection(), torch.cuda.stream(current), torch.cuda.graph(graph):
        result = call()
    return Captured(graph, result)
