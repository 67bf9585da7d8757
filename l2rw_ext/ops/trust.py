"""Which CUDA kernels of this package run in place of compositions.

The environment variable ``L2RW_CUDA_KERNELS`` decides. By default it is ``auto``: on the GPUs of a
machine a kernel runs only after it agreed there with what it computes, on small arguments and on
arguments of several tiles. ``on`` takes all kernels without a check, and ``off`` takes none.

A verdict holds for the names of the GPUs, the driver, torch and the library of kernels. It is kept
in a file in ``$XDG_CACHE_HOME/l2rw_ext``, or ``~/.cache/l2rw_ext``. Where there is none, one
process makes it in a subprocess, which has 60 seconds, and the other processes of the machine wait
for the file. A kernel that disagrees, raises, crashes or does not return is left out. Where no
verdict can be made, compositions run. ``python -m l2rw_ext.doctor --kernels`` makes it anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from . import _native

__all__ = ["MODES", "VERIFIED", "NoVerdictError", "Verdict", "devices", "make", "mode", "verdict"]

MODES = ("auto", "on", "off")
VERIFIED: frozenset[str] = frozenset()
"""GPUs, as :func:`devices` names them, on which all kernels passed the whole test suite."""

SECONDS = 60.0
"""How long the subprocess, with all that follow where kernels crash, may take."""

_EXAMINER = (sys.executable, "-m", "l2rw_ext.agreement")
_EXITS = 5.0
_WAITS = 30.0  # beyond the time of a check, for one that another process makes
_POLLS = 0.1


class NoVerdictError(Exception):
    """No verdict can be made; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """What is known of the kernels on the GPUs of this machine.

    Attributes:
        agreed: the operators whose kernels run; None for all that have one.
        left_out: why the kernels of other operators do not, by operator.
    """

    agreed: tuple[str, ...] | None
    left_out: dict[str, str] = field(default_factory=dict)


def mode() -> str:
    """The setting of ``L2RW_CUDA_KERNELS``.

    Raises:
        ValueError: it is none of :data:`MODES`.
    """
    found = os.environ.get("L2RW_CUDA_KERNELS") or "auto"
    if found not in MODES:
        raise ValueError(f"L2RW_CUDA_KERNELS={found}: expected {', '.join(MODES[:-1])} or off")
    return found


def devices() -> tuple[str, ...]:
    """The kinds of GPUs that this process sees, such as ``NVIDIA H200, sm_90``, sorted."""
    found = set()
    for k in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(k)
        found.add(f"{torch.cuda.get_device_name(k)}, sm_{major}{minor}")
    return tuple(sorted(found))


def verdict(library: Path) -> Verdict:
    """The verdict on the kernels of a library: that of the package, of the file, or a new one.

    Raises:
        NoVerdictError: there is none, and none can be made.
    """
    here = devices()
    _check_architectures(here)
    if VERIFIED.issuperset(here):
        return Verdict(None)
    with _locked(library, here) as path:
        return _read(path) or _made(path, here)


def make(library: Path) -> Verdict:
    """Make the verdict anew and keep it, whatever was known before.

    Raises:
        NoVerdictError: none can be made.
    """
    here = devices()
    _check_architectures(here)
    with _locked(library, here) as path:
        return _made(path, here)


def _check_architectures(here: Sequence[str]) -> None:
    """Raise if a GPU can run nothing of what the library holds."""
    built = _native.BUILD_INFO["cuda_architectures"]
    for device in here:
        capability = int(device.rpartition("sm_")[2])
        if not any(_runs(architecture, capability) for architecture in built.split()):
            raise NoVerdictError(f"the kernels are built for {built}, and the GPU is {device}")


def _runs(architecture: str, capability: int) -> bool:
    """Whether code for an architecture, such as 80 or 90a, may run on a capability, such as 90."""
    if not architecture.isdigit():  # 90a runs on 90 alone
        return architecture == f"{capability}a"
    return capability >= int(architecture)  # as it is, or translated by the driver


@contextlib.contextmanager
def _locked(library: Path, here: Sequence[str]) -> Iterator[Path]:
    """The file of the verdict, which no other process of the machine makes at the same time.

    Raises:
        NoVerdictError: something cannot be read, written or started, or another process holds the
            file for longer than a check takes.
    """
    try:
        path = _file(library, here)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            end = time.monotonic() + SECONDS + _WAITS
            while not _lock(lock):
                if time.monotonic() >= end:
                    raise NoVerdictError(f"another process holds {lock.name}")
                time.sleep(_POLLS)
            yield path
    except (OSError, RuntimeError) as error:  # no home is a RuntimeError
        raise NoVerdictError(f"no verdict can be made and kept: {error}") from error


def _file(library: Path, here: Sequence[str]) -> Path:
    """Where the verdict on a library is kept: a name for all that it holds for."""
    try:
        driver = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        driver = "unknown"
    kernels = hashlib.sha256(library.read_bytes()).hexdigest()
    holds_for = json.dumps([here, driver, torch.__version__, kernels])
    name = hashlib.sha256(holds_for.encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "l2rw_ext", f"kernels-{name}.json")


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path) -> Verdict | None:
    try:
        content = json.loads(path.read_text())
        return Verdict(tuple(content["agreed"]), dict(content["left_out"]))
    except (OSError, ValueError, KeyError, TypeError):  # none, or of no use
        return None


def _made(path: Path, here: Sequence[str]) -> Verdict:
    found = _examined(here)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(asdict(found), file, indent=1)
    os.replace(file.name, path)
    return found


def _examined(here: Sequence[str]) -> Verdict:
    """Examine the kernels in a subprocess, and those that are left after a crash in another.

    Raises:
        NoVerdictError: the first one did not name the kernels, saw other GPUs, or had no memory.
    """
    end = time.monotonic() + SECONDS
    left: list[str] | None = None
    reasons: dict[str, str] = {}
    while left is None or left:
        lines, problem = _subprocess((*_EXAMINER, *(left or ())), end)
        before = len(reasons)
        for line in lines:
            if "unjudged" in line:
                raise NoVerdictError(line["unjudged"])
            if "kernels" in line and left is None:
                left = line["kernels"]
                if line["devices"] != list(here):
                    seen = "; ".join(line["devices"]) or "no GPU"
                    raise NoVerdictError(f"the check saw {seen} in the place of {'; '.join(here)}")
            reasons |= {line["operator"]: line["reason"]} if "operator" in line else {}
        if left is None:
            raise NoVerdictError(f"the check did not start: {problem or 'it named no kernel'}")
        left = [name for name in left if name not in reasons]
        if left and (problem or len(reasons) == before):  # it ended without a word on the first
            reasons[left.pop(0)] = problem or "it was passed over"
        if time.monotonic() >= end:
            reasons |= dict.fromkeys(left, f"not examined within {SECONDS:g} s")
            break
    agreed = tuple(name for name, reason in reasons.items() if not reason)
    return Verdict(agreed, {name: reason for name, reason in reasons.items() if reason})


def _subprocess(command: Sequence[str], end: float) -> tuple[list[dict[str, Any]], str]:
    """What an examiner printed, and how it ended if not well."""
    here = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, "L2RW_CUDA_KERNELS": "on", "PYTHONPATH": here}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment
        )
        problem = ""
        try:
            status = process.wait(max(0.0, end - time.monotonic()))
            if status:
                problem = f"its process ended with {status}"
        except subprocess.TimeoutExpired:
            problem = f"no result within {SECONDS:g} s"
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a GPU may hold it for ever
                process.wait(_EXITS)
        out.seek(0)
        err.seek(0)
        last = err.read().strip().rpartition("\n")[2][:200]
        if problem and last:
            problem += f": {last}"
        return [found for line in out if (found := _json_object(line))], problem


def _json_object(line: str) -> dict[str, Any]:
    """A line of an examiner; empty for what something else has printed."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
