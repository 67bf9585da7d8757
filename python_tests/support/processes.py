"""Worker processes with process groups, in which tests run functions on several ranks.

The workers are forked from a server that has loaded torch and has no threads. Spawned ones would
load torch each for itself, which takes seconds; forks of the test's own process would hold locks of
threads that torch and pytest have started there.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZE = 3
"""Workers of a pool."""
COLLECTIVE = 30.0
"""Seconds after which a rank that waits for others in a collective gives up."""
CALL = 60.0
"""Seconds after which a call has failed."""
AFTER_ERROR = 5.0
"""Seconds that the other ranks have to end after one has raised, for they may wait for it."""

_PRELOADED = ["torch.distributed", "torch.nn.parallel", "l2rw_ext"]


class RanksError(AssertionError):
    """Some ranks of a call raised, died or did not end; the message says which, and where."""


class Pool:
    """Workers that start at the first call, and again at the first call after one that failed.

    Example::

        def total(group, x):
            y = torch.tensor([x * dist.get_rank(group)])
            dist.all_reduce(y, group=group)
            return y.item()

        with Pool() as pool:
            assert pool.run(total, 2, ranks=2) == [2, 2]
    """

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._folder = ""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(
        self, function: Callable[..., Any], *args: Any, ranks: int = SIZE, seconds: float = CALL
    ) -> list[Any]:
        """The results of ``function(group, *args)`` on ranks 0 to ``ranks - 1`` of a group.

        The function is one of a module; arguments and results are pickled. Before each call torch's
        generator is seeded with 0 on each rank.

        Raises:
            RanksError: a rank raised, died, or did not end within ``seconds``.
        """
        task = pickle.dumps((function, args, ranks))
        if not self._workers:
            self._start()
        called = self._workers[:ranks]
        for worker in called:
            with contextlib.suppress(OSError):  # it has died, which its answer will tell
                worker.connection.send_bytes(task)
        answers, failures = self._answers(called, seconds)
        if failures:
            self._end()
            lines = (f"rank {rank}: {text}" for rank, text in sorted(failures.items()))
            raise RanksError("\n".join(lines))
        return [answers[worker.rank] for worker in called]

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._workers = [_Worker(context, rank, self._folder) for rank in range(SIZE)]

    def _answers(
        self, called: list[_Worker], seconds: float
    ) -> tuple[dict[int, Any], dict[int, str]]:
        """Results and failures by rank; each of the called workers has one of them."""
        deadline = time.monotonic() + seconds
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {worker.connection: worker for worker in called}
        while waiting and (ready := wait(list(waiting), max(0, deadline - time.monotonic()))):
            for connection in ready:
                assert isinstance(connection, Connection)
                worker = waiting.pop(connection)
                try:
                    returned, value = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    worker.process.join(1)
                    returned, value = False, f"died with exit code {worker.process.exitcode}"
                (answers if returned else failures)[worker.rank] = value
            if failures:
                deadline = min(deadline, time.monotonic() + AFTER_ERROR)
        for worker in waiting.values():
            failures[worker.rank] = f"did not end; it was at\n{worker.stack()}"
        return answers, failures

    def _end(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()
        self._workers = []
        shutil.rmtree(self._folder, ignore_errors=True)


class _Worker:
    """One process, as the test's process sees it."""

    def __init__(
        self, context: multiprocessing.context.ForkServerContext, rank: int, folder: str
    ) -> None:
        self.rank = rank
        self._stack = Path(folder) / f"stack-{rank}"
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(rank, folder, str(self._stack), theirs), daemon=True
        )
        self.process.start()
        theirs.close()

    def stack(self) -> str:
        """Where the process is."""
        if self._stack.exists() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.5)
            return self._stack.read_text()
        return "its start"


def _serve(rank: int, folder: str, stack: str, connection: Connection) -> None:
    """Run functions until the other end is closed.

    The process ends by ``os._exit``: gloo's threads abort one in ten that end the ordinary way.
    """
    with open(stack, "w") as file, contextlib.suppress(EOFError, OSError):
        faulthandler.register(signal.SIGUSR1, file=file)
        torch.set_num_threads(1)
        seconds = datetime.timedelta(seconds=COLLECTIVE)
        store = f"file://{folder}/store"
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=SIZE, timeout=seconds
        )
        groups = {k: dist.new_group(range(k), timeout=seconds) for k in range(1, SIZE)}
        groups[SIZE] = dist.group.WORLD
        while True:
            task = connection.recv_bytes()
            try:
                function, args, ranks = pickle.loads(task)
                torch.manual_seed(0)
                answer = pickle.dumps((True, function(groups[ranks], *args)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(answer)
    os._exit(0)
