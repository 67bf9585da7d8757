"""``python -m benchmarks.gpu``: build, test and measure on a machine with an NVIDIA GPU.

What ``make gpu`` runs, with the torch and the build tools that are installed and without a network.
The phases run one after the other, each in a process of its own, in the order in which they tell
most. Every phase has a share of ``--minutes`` and inherits what earlier ones left; one that fails
or runs out of time does not stop the others. After each phase the log of all, ``gpu.log``, and
their outcomes with the seconds, ``gpu.json``, are written anew; the benchmarks write their JSON
beside them after each case. A run that is cut off keeps all that.

``--dry-run`` needs no GPU: it runs the phases with the kernels on the host in place of a device, on
small cases, and tells how many bytes travel. What needs a GPU fails there, as it should.
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
from .data_sheets import DATA_SHEETS
from .errors import UsageError
from .kernel_cases import default_kernel_cases

RESULTS = provenance.ROOT / "benchmarks" / "results"
LOG = "gpu.log"
REPORT = "gpu.json"
MINUTES = 9.0
CARRIED_MIB = 60.0
"""What may travel to the machine: the files of the checkout, and libraries that are built."""
_TAIL = 15
# A few processes keep a GPU and its host busy; each holds a CUDA context.
_CORES_A_TEST = 2

# The other way to multiply rows.
_WARPGROUPS = {"L2RW_CUDA_WARPGROUPS": "1"}
_OPERATOR_TESTS = ("python_tests/cuda/test_cuda_ops.py",)
_STEP_TESTS = (
    "python_tests/cuda/test_cuda_steps.py",
    "python_tests/test_no_synchronisation.py",
    "python_tests/benchmarks",
)


@dataclass(frozen=True)
class Plan:
    """What the phases run on, and which cases.

    Attributes:
        device: of the benchmarks.
        marker: of the tests of operators.
        operators: options of these tests.
        kernels: cases that decide between ways to multiply.
        rest: the other cases of ``kernels``.
        step: cases of ``step`` that run eagerly.
        compiled: those that are compiled and captured too.
        eager: methods of the former.
        methods: methods of the latter.
        options: of every benchmark.
    """

    device: str
    marker: str
    operators: tuple[str, ...]
    kernels: tuple[str, ...]
    rest: tuple[str, ...]
    step: tuple[str, ...]
    compiled: tuple[str, ...]
    eager: tuple[str, ...]
    methods: tuple[str, ...]
    options: tuple[str, ...]


_DECIDING = (
    "factored-16384",
    "dense-16384",
    "wrn28-160-160-32",
    "wrn28-320-320-16",
    "wrn28-640-640-8",
)
ON_GPU = Plan(
    device="cuda",
    marker="cuda",
    operators=(),
    kernels=_DECIDING,
    rest=tuple(name for name in default_kernel_cases("cuda") if name not in _DECIDING),
    step=("mlp-256-64", "resnet-100-100", "resnet-bn-100-100", "vit", "gpt"),
    compiled=("mlp-256-64", "vit", "gpt", "lenet"),
    eager=("plain", "plain_union", "l2rw_ext", "double_backward"),
    methods=(
        "plain_union",
        "plain_union_captured",
        "plain_union_compiled",
        "plain_union_reduce_overhead",
        "l2rw_ext",
        "l2rw_ext_cudagraphs",
        "l2rw_ext_compiled",
        "l2rw_ext_reduce_overhead",
    ),
    options=(),
)
ON_HOST = Plan(
    device="cpu",
    marker="emulated",
    operators=("-k", "float64 and matches_the_cpu"),
    kernels=("small-dense",),
    rest=("small-dense", "small-conv"),
    step=("tiny",),
    compiled=("tiny",),
    eager=("plain", "plain_union", "l2rw_ext", "double_backward"),
    methods=("plain_union", "l2rw_ext", "l2rw_ext_compiled"),
    options=("--repeats", "2", "--warmup", "1"),
)


@dataclass(frozen=True)
class Phase:
    """A command, the seconds that are its share, and whether it cannot pass without a GPU."""

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    needs_gpu: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a phase ended: ``passed``, ``failed``, ``out of time``, or ``not begun``."""

    name: str
    command: str
    status: str
    seconds: float


def device_folder(name: str) -> str:
    """The folder of a device's results: ``h200`` for "NVIDIA H200"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce")) or "gpu"


def test_workers(cores: int) -> int:
    """How many processes share the tests: one without pytest-xdist."""
    if importlib.util.find_spec("xdist") is None:
        return 1
    return max(1, cores // _CORES_A_TEST)


def architecture(capability: tuple[int, int]) -> str:
    """What nvcc builds for a compute capability: with the instructions of that one alone on 9.0."""
    number = f"{capability[0]}{capability[1]}"
    return f"{number}a" if number == "90" else number


def _build(built_for: str, prebuilt: Mapping[str, Path], target: Path | None) -> Phase:
    environment = {"L2RW_CUDA": "OFF" if "L2RW_PREBUILT_CUDA" in prebuilt or target else "ON"}
    environment |= {name: str(path) for name, path in prebuilt.items()}
    install = ["install", "--no-build-isolation", "--no-deps", "--no-index"]
    install += ["--editable", "."] if target is None else ["--target", str(target), "."]
    install += [f"-Ccmake.define.L2RW_CUDA_ARCHITECTURES={built_for}"]
    seconds = 30 if {"L2RW_PREBUILT_CPU", "L2RW_PREBUILT_CUDA"} <= prebuilt.keys() else 130
    return Phase("build", (sys.executable, "-m", "pip", *install), seconds, environment)


def phases(
    folder: Path,
    plan: Plan,
    *,
    prebuilt: Mapping[str, Path],
    cores: int,
    built_for: str = "90a",
    device: str = "",
    target: Path | None = None,
) -> list[Phase]:
    """What runs, in order: with both libraries built before, tests end within four minutes.

    Steps that are compiled end within eight.

    Args:
        folder: for the results.
        plan: on what.
        prebuilt: libraries that are installed and not built, by the variable that names them.
        cores: of the machine.
        built_for: the architecture to build for.
        device: as :func:`device_folder` names it; predictions are those for one of its kind.
        target: where a dry run installs what it builds; None to install it for all to use.
    """
    if folder.is_relative_to(provenance.ROOT):  # where every phase runs
        folder = folder.relative_to(provenance.ROOT)
    workers = test_workers(cores)
    python = (sys.executable, "-m")
    kernels_on = {"L2RW_CUDA_KERNELS": "on"}
    testing = {
        **kernels_on,
        f"L2RW_REQUIRE_{'CUDA' if plan.marker == 'cuda' else 'EMULATOR'}": "1",
        "OMP_NUM_THREADS": str(max(1, cores // workers)),
    }
    alone = {**testing, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def tests(*options: str, processes: int = workers) -> tuple[str, ...]:
        parallel = ("-n", str(processes)) if processes > 1 else ()
        return (*python, "pytest", "-q", *parallel, *options)

    def benchmark(name: str, file: str, *options: str) -> tuple[str, ...]:
        where = ("--device", plan.device, "--json", str(folder / file))
        return (*python, "benchmarks", name, *options, *where)

    step = ("--tf32", *plan.options) if plan.device == "cuda" else plan.options
    operators = tests("-m", plan.marker, *_OPERATOR_TESTS, *plan.operators)
    smallest = ("-m", plan.marker, *_OPERATOR_TESTS, "-k", "matches_the_cpu and gpu and float64")
    large = (*smallest[:-1], "test_large_tiles and (bfloat16 or float16)")
    todo = [
        _build(built_for, prebuilt, target),
        Phase("doctor", (*python, "l2rw_ext.doctor"), 15, kernels_on),
        Phase("kernels agree", (*python, "l2rw_ext.doctor", "--kernels"), 40, needs_gpu=True),
        Phase("operators", operators, 60, testing),
        Phase("operators, warpgroups", operators, 20, testing | _WARPGROUPS),
        Phase("steps", tests("-m", "cuda", *_STEP_TESTS), 60, testing),
        Phase(
            "kernels that decide",
            benchmark("kernels", "kernels-decide.json", "--case", *plan.kernels, *plan.options),
            30,
            kernels_on,
        ),
        Phase(
            "kernels that decide, warpgroups",
            benchmark("kernels", "kernels-warpgroups.json", "--case", *plan.kernels, *plan.options),
            20,
            kernels_on | _WARPGROUPS,
        ),
        Phase(
            "kernels",
            benchmark("kernels", "kernels.json", "--case", *plan.rest, *plan.options),
            60,
            kernels_on,
        ),
        Phase(
            "step",
            benchmark("step", "step.json", "--case", *plan.step, "--methods", *plan.eager, *step),
            60,
            kernels_on,
        ),
        Phase(
            "step, compiled",
            benchmark(
                *("step", "step-compiled.json", "--case", *plan.compiled),
                *("--methods", *plan.methods, *step),
            ),
            80,
            kernels_on,
        ),
        Phase(
            "memory",
            benchmark(
                *("memory", "memory.json", "--case", *plan.step),
                *("--methods", "plain_union", "l2rw_ext"),
            ),
            20,
            kernels_on,
        ),
    ]
    sheet = next((name for name in DATA_SHEETS if name in device.split("-")), None)
    if sheet is not None:
        against = (*python, "benchmarks", "roofline", "--device", sheet)
        todo.append(Phase("over predicted", (*against, "--measured", str(folder)), 10))
    for tool in ("memcheck", "racecheck"):
        # Every tensor in an allocation of its own, so that what lies beyond it belongs to none.
        sanitizer = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
        todo += [
            Phase(tool, (*sanitizer, *tests(*smallest, processes=1)), 60, alone, needs_gpu=True),
            Phase(
                f"{tool}, warpgroups",
                (*sanitizer, *tests(*large, processes=1)),
                40,
                alone | _WARPGROUPS,
                needs_gpu=True,
            ),
        ]
    return todo


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


def shown(phase: Phase) -> str:
    """The command of a phase as one would type it."""
    return shlex.join("python" if c == sys.executable else c for c in phase.command)


def run_phase(phase: Phase, limit: float, log: TextIO) -> Outcome:
    """Run one phase for at most ``limit`` seconds, with what it prints in the log."""
    command = shown(phase)
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


def run_phases(
    todo: Sequence[Phase], folder: Path, facts: dict[str, Any], minutes: float = MINUTES
) -> list[Outcome]:
    """Run all phases and write ``gpu.log`` and, after each phase, ``gpu.json``.

    A phase may run until the shares of all phases up to it are used up, or the minutes are; with
    less than a third of its share left then, it does not begin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    end = 0.0
    outcomes: list[Outcome] = []
    with (folder / LOG).open("w") as log:
        for phase in todo:
            end += phase.seconds
            left = start + min(end, 60 * minutes) - time.monotonic()
            if left < phase.seconds / 3:
                outcomes.append(Outcome(phase.name, shown(phase), "not begun", 0.0))
                continue
            print(f"{phase.name}: at most {left:.0f} s ...", flush=True)
            began = log.tell()
            outcome = run_phase(phase, left, log)
            outcomes.append(outcome)
            print(f"{phase.name}: {outcome.status} after {outcome.seconds:.1f} s", flush=True)
            if outcome.status != "passed":
                lines = (folder / LOG).read_text(errors="replace")[began:].splitlines()
                print("\n".join(f"  | {line}" for line in lines[-_TAIL:]), flush=True)
            provenance.write(folder / REPORT, {**facts, "phases": [asdict(o) for o in outcomes]})
    provenance.write(folder / REPORT, {**facts, "phases": [asdict(o) for o in outcomes]})
    return outcomes


def prebuilt_libraries(environment: Mapping[str, str]) -> dict[str, Path]:
    """The libraries that ``L2RW_PREBUILT_CPU`` and ``L2RW_PREBUILT_CUDA`` name.

    Raises:
        UsageError: there is no such file.
    """
    found = {}
    for name in ("L2RW_PREBUILT_CPU", "L2RW_PREBUILT_CUDA"):
        if environment.get(name):
            path = Path(environment[name]).resolve()
            if not path.is_file():
                raise UsageError(f"{name}={environment[name]}: there is no such file")
            found[name] = path
    return found


def check_gpu() -> str:
    """The name of the GPU.

    Raises:
        UsageError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise UsageError("this torch sees no CUDA device; --dry-run does without one")
    return torch.cuda.get_device_name()


def carried(prebuilt: Mapping[str, Path]) -> float:
    """The MiB that travel to another machine: what git does not ignore, and built libraries."""
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    listed = subprocess.run(command, cwd=provenance.ROOT, capture_output=True, text=True).stdout
    paths = {provenance.ROOT / name for name in listed.split("\0") if name}
    return (
        sum(path.stat().st_size for path in {*paths, *prebuilt.values()} if path.is_file()) / 2**20
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the phases; the exit status is 1 where one that began did not pass."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="default: benchmarks/results/<device>"
    )
    parser.add_argument(
        "--minutes", type=provenance.positive_number, default=MINUTES, help=f"default: {MINUTES:g}"
    )
    parser.add_argument(
        "--phases", nargs="+", metavar="NAME", help="these alone, such as build memcheck racecheck"
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: see above")
    args = parser.parse_args(arguments)
    try:
        prebuilt = prebuilt_libraries(os.environ)
        options: dict[str, Any] = {"prebuilt": prebuilt, "cores": os.cpu_count() or 1}
        if args.dry_run:
            name, plan = "dry run", ON_HOST
            folder = args.results or provenance.ROOT / "build" / "dry-run"
            options["target"] = folder.resolve() / "site"
            shutil.rmtree(options["target"], ignore_errors=True)  # pip replaces nothing there
        else:
            name, plan = check_gpu(), ON_GPU
            options["device"] = device_folder(name)
            folder = args.results or RESULTS / options["device"]
            options["built_for"] = architecture(torch.cuda.get_device_capability())
        folder = folder.resolve()
        todo = chosen(phases(folder, plan, **options), args.phases)
    except UsageError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    size = carried(prebuilt)
    print(f"{name}, torch {torch.__version__}; {args.minutes:g} minutes; results in {folder}")
    print(f"what would travel: {size:.1f} MiB of {CARRIED_MIB:g}", flush=True)
    for phase in todo:
        print(f"{phase.seconds:7.0f} s  {phase.name}: {shown(phase)}")
    facts = provenance.header("gpu", plan.device, [])
    facts["command"] = "make gpu" + (" ARGS=--dry-run" if args.dry_run else "")
    start = time.monotonic()
    outcomes = run_phases(todo, folder, facts, args.minutes)
    print(f"\n{time.monotonic() - start:.0f} s in all; log in {folder / LOG}")
    for outcome in outcomes:
        print(f"{outcome.seconds:7.1f} s  {outcome.name}: {outcome.status}")
    excused = {phase.name for phase in todo if phase.needs_gpu and args.dry_run}
    well = all(o.status in ("passed", "not begun") or o.name in excused for o in outcomes)
    return 0 if well and (size <= CARRIED_MIB or not args.dry_run) else 1


def chosen(todo: list[Phase], names: Sequence[str] | None) -> list[Phase]:
    """The phases that are asked for, in their order.

    Raises:
        UsageError: there is none of a name.
    """
    known = [phase.name for phase in todo]
    if unknown := [name for name in names or () if name not in known]:
        raise UsageError(f"--phases {unknown[0]}: known are {', '.join(known)}")
    return [phase for phase in todo if not names or phase.name in names]


if __name__ == "__main__":
    sys.exit(main())
