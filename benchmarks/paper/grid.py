"""Many runs: side by side where asked, shown in one progress display, stopped together."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Display

from ..errors import UsageError
from .files import read_checkpoint
from .runs import Place, Progress, StoppedError, check, run
from .settings import Settings
from .tasks import make_split

Results = list[dict[str, Any]]
POLL_SECONDS = 0.2


class TimeIsUpError(Exception):
    """Runs are unfinished, and have written checkpoints; says how much remains."""


def run_all(
    grid: list[Settings], place: Place, jobs: int, console: Console, minutes: float = math.inf
) -> Results:
    """Results in the order of ``grid``; finished runs are read, not run again.

    Args:
        grid: the runs, all of different keys; those that others start from are among them.
        place: where they run.
        jobs: how many at a time; each in a process of its own if more than one.
        console: for the progress.
        minutes: after which runs write checkpoints and stop.

    Raises:
        UsageError: files of any of the runs are of other settings or other data, or a split is
            impossible; nothing was run then.
        TimeIsUpError: before all runs had finished.
        KeyboardInterrupt: by the user; runs in processes of their own have written checkpoints.
    """
    results = {settings: check(settings, place) for settings in grid}
    missing = [settings for settings, result in results.items() if result is None]
    for settings in results.keys() - set(missing):
        place.checkpoint(settings).unlink(missing_ok=True)  # of a run killed at its very end
    if missing:
        _check_data(results, place)
        clock = _Clock(minutes, grid, place)
        with _Bars(grid, missing, console) as bars:
            for wave in _waves(missing):
                runner = _in_turn if min(jobs, len(wave)) == 1 else _side_by_side
                results.update(runner(wave, place, jobs, bars, clock.is_up))
                if clock.is_up() and None in results.values():
                    raise TimeIsUpError(clock.summary())
    found = [results[settings] for settings in grid]
    return [result for result in found if result is not None]


class _Clock:
    """How long the grid may run, and how far it comes meanwhile."""

    def __init__(self, minutes: float, grid: list[Settings], place: Place) -> None:
        self._minutes, self._grid, self._place = minutes, grid, place
        self._first = self._done() if math.isfinite(minutes) else 0
        self._began = time.monotonic()

    def is_up(self) -> bool:
        """Whether to stop."""
        return time.monotonic() - self._began > 60 * self._minutes

    def _done(self) -> int:
        """Steps of all runs together, by the files."""
        return sum(self._done_of(settings) for settings in self._grid)

    def _done_of(self, settings: Settings) -> int:
        if self._place.result(settings).exists():
            return settings.total_steps
        content = read_checkpoint(self._place.checkpoint(settings), settings)
        return int(content["done"]) if content else 0

    def summary(self) -> str:
        """How many steps are done, how fast, and how many more calls it takes."""
        done, steps = self._done(), sum(settings.total_steps for settings in self._grid)
        new = done - self._first
        rate = new / (time.monotonic() - self._began)
        text = (
            f"Time is up: {done:,} of {steps:,} steps are done, {new:,} of them now, {rate:.1f}/s."
        )
        if not new:
            return text
        calls = math.ceil((steps - done) / new)
        more = "1 more call ends" if calls == 1 else f"{calls} more calls end"
        return f"{text} The same command goes on; at this speed {more} it."


def _check_data(results: dict[Settings, dict[str, Any] | None], place: Place) -> None:
    """Draw each split once, before anything runs.

    Raises:
        UsageError: a split is impossible, or a finished run had other data.
    """
    drawn: dict[tuple[Any, ...], str] = {}
    for settings, result in results.items():
        if settings.split not in drawn:
            drawn[settings.split] = make_split(settings, place.data_root).digest()
        if result is not None and result["data"] != drawn[settings.split]:
            raise UsageError(
                f"{place.result(settings)} is of other data; give another --out or remove it"
            )


def _waves(missing: list[Settings]) -> Iterator[list[Settings]]:
    """All runs, those that others start from before these."""
    while missing:
        keys = {settings.key for settings in missing}
        wave = [settings for settings in missing if not settings.parents & keys]
        assert wave, "runs that start from each other"
        yield wave
        missing = [settings for settings in missing if settings not in wave]


class _Bars:
    """A bar for the grid and one for each run that is on."""

    def __init__(self, grid: list[Settings], missing: list[Settings], console: Console) -> None:
        self._display = Display(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
        )
        steps = sum(s.total_steps for s in grid)
        open_steps = sum(s.total_steps for s in missing)
        finished = f"{len(grid) - len(missing)} of {len(grid)} runs were there"
        self._all = self._display.add_task(
            "all runs, steps", total=steps, completed=steps - open_steps, state=finished
        )
        self._bars: dict[str, TaskID] = {}
        self._seen: dict[str, int] = {}

    def __enter__(self) -> _Bars:
        self._display.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._display.stop()

    def tick(self, now: Progress) -> None:
        """Show how far a run is."""
        if now.key not in self._bars:
            self._bars[now.key] = self._display.add_task(now.key, total=now.steps, state="")
        state = f"loss {now.loss:.3f}  held out {now.accuracy:.1f}%  {now.rate:.0f} steps/s"
        self._display.update(self._bars[now.key], completed=now.step, state=state)
        self._display.advance(self._all, now.step - self._seen.get(now.key, 0))
        self._seen[now.key] = now.step
        if now.step == now.steps:
            self._display.remove_task(self._bars.pop(now.key))


def _in_turn(
    missing: list[Settings], place: Place, jobs: int, bars: _Bars, stopping: Callable[[], bool]
) -> dict[Settings, dict[str, Any]]:
    del jobs
    results: dict[Settings, dict[str, Any]] = {}
    with contextlib.suppress(StoppedError):
        for settings in missing:
            results[settings] = run(settings, place, bars.tick, stopping)
    return results


def _side_by_side(
    missing: list[Settings], place: Place, jobs: int, bars: _Bars, stopping: Callable[[], bool]
) -> dict[Settings, dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    ticks: multiprocessing.Queue[Progress] = context.Queue()
    results: dict[Settings, dict[str, Any]] = {}
    with ProcessPoolExecutor(
        min(jobs, len(missing)), mp_context=context, initializer=_begin, initargs=(ticks, stop)
    ) as pool:
        futures = {pool.submit(_run, settings, place): settings for settings in missing}
        waiting: set[Future[dict[str, Any]]] = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                _drain(ticks, bars.tick)
                found = {futures[future]: future.result() for future in done}
                results.update({settings: result for settings, result in found.items() if result})
                if stopping():
                    stop.set()
        except BrokenProcessPool as error:
            raise UsageError(
                "a run's process was killed (out of memory?); start again to continue, "
                "with fewer --jobs"
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return results


def _drain(ticks: multiprocessing.Queue[Progress], tick: Callable[[Progress], None]) -> None:
    while True:
        try:
            tick(ticks.get_nowait())
        except queue.Empty:
            return


_ticks: multiprocessing.Queue[Progress]
_stop: Event


def _begin(ticks: multiprocessing.Queue[Progress], stop: Event) -> None:
    """In a new process: leave Ctrl-C to the parent, and end when it does, however it ends."""
    global _ticks, _stop
    _ticks, _stop = ticks, stop
    ticks.cancel_join_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run(settings: Settings, place: Place) -> dict[str, Any]:
    """In a process of the pool; some are handed to it before the others are cancelled."""
    if _stop.is_set():
        return {}
    try:
        return run(settings, place, _ticks.put, _stop.is_set)
    except StoppedError:
        return {}
