"""``python -m benchmarks.gpu``: build, test and measure on a machine with an NVIDIA GPU.

What ``make gpu`` runs, with the torch and the build tools that are installed and without a network.
The phases run one after the other, each in a process of its own. Every phase has a share of the
time and inherits what earlier ones left; one that fails or runs out of time does not stop the
others. Writes the log of all phases to ``gpu.log`` and their outcome, with the seconds, to
``gpu.json``, beside the JSON of the benchmarks. With ``--sanitize`` the tests of the kernels run
under compute-sanitizer instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from . import provenance
from .errors import UsageError

ARCHITECTURE = "90a"
CAPABILITY = (9, 0)
RESULTS = provenance.ROOT / "benchmarks" / "results"
LOG = "gpu.log"
REPORT = "gpu.json"
_TAIL = 15
# A few processes keep a GPU and its host busy; each holds a CUDA context.
_CORES_A_TEST = 2

# The other way to multiply rows, and cases large enough for its tiles.
_WARPGROUPS = {"L2RW_CUDA_WARPGROUPS": "1"}
_PRODUCTS = (
    "factored-16384",
    "dense-16384",
    "wrn28-160-160-32",
    "wrn28-320-320-16",
    "wrn28-640-640-8",
)

# Steps that fit the time: a multilayer perceptron, a net with each norm, a transformer.
STEP_CASES = ("mlp-256-64", "resnet-100-100", "vit", "resnet-bn-100-100")
# Those that compile in seconds, with every way to compile and to capture.
COMPILED_CASES = ("mlp-256-64", "lenet", "vit")
_COMPILED_METHODS = (
    "plain_union",
    "plain_union_captured",
    "plain_union_compiled",
    "plain_union_reduce_overhead",
    "l2rw_ext",
    "l2rw_ext_cudagraphs",
    "l2rw_ext_compiled",
    "l2rw_ext_reduce_overhead",
)


@dataclass(frozen=True)
class Phase:
    """A command, and the seconds that are its share."""

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a phase ended: ``passed``, ``failed``, or ``out of time``."""

    name: str
    command: str
    status: str
    seconds: float


def device_folder(name: str) -> str:
    """The folder of a device's results: ``h200`` for "NVIDIA H200"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce")) or "gpu"


def _test_command(workers: int, marker: str) -> tuple[str, ...]:
    parallel = ("-n", str(workers)) if workers > 1 else ()
    return (sys.executable, "-m", "pytest", "-q", "-m", marker, *parallel)


def test_workers(cores: int) -> int:
    """How many processes share the tests: one without pytest-xdist."""
    if importlib.util.find_spec("xdist") is None:
        return 1
    return max(1, cores // _CORES_A_TEST)


def _build(prebuilt: Path | None) -> Phase:
    environment = {"L2RW_CUDA": "ON"}
    if prebuilt is not None:
        environment = {"L2RW_CUDA": "OFF", "L2RW_PREBUILT_CUDA": str(prebuilt)}
    install = ["install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    install += [f"-Ccmake.define.L2RW_CUDA_ARCHITECTURES={ARCHITECTURE}"]
    return Phase("build", (sys.executable, "-m", "pip", *install), 130, environment)


def sanitizer_phases(prebuilt: Path | None) -> list[Phase]:
    """The tests of the kernels under compute-sanitizer, one tool after the other."""
    tests = (*_test_command(1, "cuda"), "python_tests/cuda/test_cuda_ops.py", "-k")
    # Every tensor in an allocation of its own, so that what lies beyond it belongs to none.
    environment = {"L2RW_REQUIRE_CUDA": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    todo = [_build(prebuilt)]
    for tool in ("memcheck", "racecheck"):
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *tests)
        large = "test_large_tiles and (bfloat16 or float16)"
        todo += [
            Phase(tool, (*command, "gpu"), 150, environment),
            Phase(f"{tool}, warpgroups", (*command, large), 50, environment | _WARPGROUPS),
        ]
    return todo


def phases(folder: Path, prebuilt: Path | None, workers: int, cores: int) -> list[Phase]:
    """What runs, in order; the shares add up to less than nine minutes."""
    if folder.is_relative_to(provenance.ROOT):  # where every phase runs
        folder = folder.relative_to(provenance.ROOT)
    tests = {
        "L2RW_REQUIRE_CUDA": "1",
        "OMP_NUM_THREADS": str(max(1, cores // workers)),
    }
    benchmarks = (sys.executable, "-m", "benchmarks")
    on_cuda = ("--device", "cuda", "--json")
    step = (*benchmarks, "step", "--tf32", "--case")
    eager = ("plain", "plain_union", "l2rw_ext", "double_backward", "jvp", "finite_difference")
    return [
        _build(prebuilt),
        Phase("doctor", (sys.executable, "-m", "l2rw_ext.doctor"), 15),
        Phase("tests of CUDA", _test_command(workers, "cuda"), 60, tests),
        Phase(
            "tests of warpgroups",
            (*_test_command(workers, "cuda"), "python_tests/cuda/test_cuda_ops.py"),
            20,
            tests | _WARPGROUPS,
        ),
        Phase("other tests", _test_command(workers, "not cuda and not emulated"), 90, tests),
        Phase("kernels", (*benchmarks, "kernels", *on_cuda, str(folder / "kernels.json")), 75),
        Phase(
            "kernels, warpgroups",
            (
                *(*benchmarks, "kernels", "--precision", "bf16", "--case", *_PRODUCTS),
                *(*on_cuda, str(folder / "kernels-warpgroups.json")),
            ),
            20,
            _WARPGROUPS,
        ),
        Phase(
            "step, compiled",
            (
                *(*step, *COMPILED_CASES, "--methods", *_COMPILED_METHODS),
                *(*on_cuda, str(folder / "step-compiled.json")),
            ),
            70,
        ),
        Phase(
            "step",
            (*step, *STEP_CASES, "--methods", *eager, *on_cuda, str(folder / "step.json")),
            40,
        ),
        Phase(
            "memory",
            (
                *benchmarks,
                "memory",
                "--case",
                *STEP_CASES[:3],
                "--methods",
                "plain_union",
                "l2rw_ext",
                *on_cuda,
                str(folder / "memory.json"),
            ),
            15,
        ),
    ]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a phase and whatever it started, which is in a session of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    process.wait()


def run_phase(phase: Phase, limit: float, log: TextIO) -> Outcome:
    """Run one phase for at most ``limit`` seconds, with what it prints in the log."""
    command = shlex.join("python" if c == sys.executable else c for c in phase.command)
    log.write(f"=== {phase.name}: {command}\n")
    log.flush()
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            phase.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=provenance.ROOT,
            env={**os.environ, **phase.environment},
            start_new_session=True,
        )
    except OSError as error:
        log.write(f"{error}\n")
        return Outcome(phase.name, command, "failed", 0.0)
    try:
        status = "failed" if process.wait(timeout=max(0.0, limit)) else "passed"
    except subprocess.TimeoutExpired:
        status = "out of time"
        _stop(process)
    except BaseException:
        _stop(process)
        raise
    seconds = time.monotonic() - start
    log.write(f"=== {phase.name}: {status} after {seconds:.1f} s\n\n")
    log.flush()
    return Outcome(phase.name, command, status, round(seconds, 1))


def run_phases(todo: Sequence[Phase], folder: Path, facts: dict[str, Any]) -> list[Outcome]:
    """Run all phases and write ``gpu.log`` and, after each phase, ``gpu.json``.

    A phase may run until the shares of all phases up to it are used up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    end = 0.0
    outcomes: list[Outcome] = []
    with (folder / LOG).open("w") as log:
        for phase in todo:
            end += phase.seconds
            left = start + end - time.monotonic()
            print(f"{phase.name}: at most {left:.0f} s ...", flush=True)
            began = log.tell()
            outcome = run_phase(phase, left, log)
            outcomes.append(outcome)
            print(f"{phase.name}: {outcome.status} after {outcome.seconds:.1f} s", flush=True)
            if outcome.status != "passed":
                lines = (folder / LOG).read_text(errors="replace")[began:].splitlines()
                print("\n".join(f"  | {line}" for line in lines[-_TAIL:]), flush=True)
            provenance.write(folder / REPORT, {**facts, "phases": [asdict(o) for o in outcomes]})
    return outcomes


def check_prebuilt(path: str) -> Path:
    """The absolute path of a prebuilt ``_ops_cuda.so``.

    Raises:
        UsageError: there is no such file.
    """
    found = Path(path).resolve()
    if not found.is_file():
        raise UsageError(f"L2RW_PREBUILT_CUDA={path}: there is no such file")
    return found


def check_gpu() -> str:
    """The name of the GPU.

    Raises:
        UsageError: torch sees none, or one that this build is not for.
    """
    if not torch.cuda.is_available():
        raise UsageError("this torch sees no CUDA device")
    name = torch.cuda.get_device_name()
    found = torch.cuda.get_device_capability()
    if found != CAPABILITY:
        raise UsageError(
            f"make gpu builds for sm_{ARCHITECTURE} alone, and {name} is sm_{found[0]}{found[1]}"
        )
    return name


def main(arguments: list[str] | None = None) -> int:
    """Run everything; the exit status is 1 where a phase did not pass."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="default: benchmarks/results/<device>"
    )
    parser.add_argument(
        "--prebuilt",
        default=os.environ.get("L2RW_PREBUILT_CUDA") or None,
        metavar="FILE",
        help="an _ops_cuda.so to install instead of building it (default: $L2RW_PREBUILT_CUDA)",
    )
    parser.add_argument("--build", action="store_true", help="build, and nothing else")
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="run the tests of the kernels under compute-sanitizer, and nothing else",
    )
    args = parser.parse_args(arguments)
    try:
        if args.sanitize and shutil.which("compute-sanitizer") is None:
            raise UsageError("--sanitize: there is no compute-sanitizer on PATH")
        prebuilt = check_prebuilt(args.prebuilt) if args.prebuilt else None
        name = check_gpu()
    except UsageError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    if args.build:
        phase = _build(prebuilt)
        return subprocess.call(phase.command, env={**os.environ, **phase.environment})
    folder = (args.results or RESULTS / device_folder(name)).resolve()
    cores = os.cpu_count() or 1
    what = f"takes {prebuilt}" if prebuilt else f"builds for sm_{ARCHITECTURE} alone"
    print(f"{name}, torch {torch.__version__}: {what}; results in {folder}", flush=True)
    facts = provenance.header("gpu", "cuda", [])
    facts["command"] = "make gpu"
    todo = phases(folder, prebuilt, test_workers(cores), cores)
    if args.sanitize:
        folder, todo = folder / "sanitize", sanitizer_phases(prebuilt)
        facts["command"] += " ARGS=--sanitize"
    start = time.monotonic()
    outcomes = run_phases(todo, folder, facts)
    print(f"\n{time.monotonic() - start:.0f} s in all; log in {folder / LOG}")
    for outcome in outcomes:
        print(f"{outcome.seconds:7.1f} s  {outcome.name}: {outcome.status}")
    return 1 if any(outcome.status != "passed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
