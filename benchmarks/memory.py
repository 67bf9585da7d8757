"""``python -m benchmarks memory``: peak memory of one training step, a fresh process per method.

A child process builds model and data and makes steps on another model, so that libraries, thread
pools, code pages and, for a compiled method, the compiler are loaded. It drops that model, returns
freed memory to the system and notes the resident size: the level. Then it makes steps, each after a
reset of the kernel's peak counter. The peak above the level counts everything that a step needs,
whoever allocated it: activations, gradients, caches, compiled code and what the allocator holds.
``first`` is the largest of the first steps (the package makes its plan there, and compilers run),
``later`` the largest of the following ones. On CUDA the allocator's peak is read. Ratios are over
the plain step that runs in the same way, eagerly or compiled.

glibc returns large blocks at once with the fixed thresholds that every child gets.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import provenance
from .cases import CASES, Case, CaseSpec, default_cases, draw_case_labels, make_case
from .errors import UsageError
from .methods import FIRST_STEPS, METHODS, Method, Step, chosen

# Fixed thresholds: by default glibc raises them with use, and what a process holds would depend on
# the order of its allocations.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "2",
}
STEPS = FIRST_STEPS + 2


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise UsageError(f"/proc/self/status has no {field}; memory is measured on Linux only")


class Meter:
    """Reads the level and the peak of this process, or of the CUDA allocator."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.device = device

    def level(self) -> int:
        """The bytes held now, after freed memory was given back; resets the peak."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        ctypes.CDLL(None).malloc_trim(0)
        # 5 resets VmHWM to the resident size (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")

    def peak(self) -> int:
        """The most bytes held since the last :meth:`level`."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        return _status_bytes("VmHWM")


def _clear(case: Case) -> None:
    for p in case.model.parameters():
        p.grad = None


def _warm_up(case: Case, method: Method) -> None:
    """First steps on a model of its own, which is then dropped.

    Two and two examples load what an eager step loads. A compiler must see the very shapes: it then
    finds its own code when the steps that are measured compile, and leaves nothing else behind.
    """
    own = case.copy()
    if not method.compiled:
        (x, y), (x_clean, y_clean) = case.train, case.clean
        own = dataclasses.replace(own, train=(x[:2], y[:2]), clean=(x_clean[:2], y_clean[:2]))
    step = method.prepare(own)
    for _ in range(FIRST_STEPS):
        _clear(own)
        step()
    torch.compiler.reset()


def measure_here(case: Case, method: Method, device: str) -> dict[str, int]:
    """Level and peaks of ``STEPS`` steps in this process, in bytes above the level."""
    _warm_up(case, method)
    step: Step = method.prepare(case)
    meter = Meter(device)
    level = meter.level()
    peaks = []
    for _ in range(STEPS):
        _clear(case)
        meter.level()
        step()
        peaks.append(meter.peak() - level)
    return {
        "level": level,
        "first": max(peaks[:FIRST_STEPS]),
        "later": max(peaks[FIRST_STEPS:]),
    }


def child(arguments: Sequence[str]) -> int:
    """Measure one method and print the result as JSON: what the subprocess runs."""
    spec_and_labels, method_name, device, threads = arguments
    if int(threads):
        torch.set_num_threads(int(threads))
    case = make_case(*pickle.loads(Path(spec_and_labels).read_bytes())).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result: dict[str, Any] = dict(measure_here(case, METHODS[method_name], device))
        except UsageError:
            raise
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
    print(json.dumps(result))
    return 0


def measure(
    spec_and_labels: Path, method: Method, *, device: str = "cpu", threads: int = 0
) -> dict[str, Any]:
    """Run :func:`child` in a fresh process and return what it printed."""
    command = [sys.executable, "-m", "benchmarks.memory", str(spec_and_labels), method.name, device]
    done = subprocess.run(
        [*command, str(threads)],
        capture_output=True,
        text=True,
        env={**os.environ, **ALLOCATOR},
        cwd=provenance.ROOT,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": lines[-1]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def run_case(
    spec: CaseSpec, methods: Sequence[Method], *, device: str = "cpu", threads: int = 0
) -> dict[str, Any]:
    """Measure ``methods`` on one case; the result is one entry of the report's ``cases``."""
    names = [method.name for method in methods]
    missing = dict.fromkeys(m.counterpart for m in methods if m.counterpart not in names)
    methods = [*(METHODS[name] for name in missing), *methods]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pickle"
        path.write_bytes(pickle.dumps((spec, draw_case_labels(spec))))
        for method in methods:
            row: dict[str, Any] = {"name": method.name, "label": method.label}
            if method.available:
                row |= measure(path, method, device=device, threads=threads)
            else:
                row["failed"] = f"{method.requires} is not installed"
            rows[method.name] = row
    for method in methods:
        row, plain = rows[method.name], rows[method.counterpart]
        if "later" in row and plain.get("later"):
            row["ratio"] = row["later"] / plain["later"]
            row["first_ratio"] = row["first"] / plain["first"]
    entry = {"name": spec.name, "title": spec.title, "n": spec.n, "m": spec.m}
    return {**entry, "methods": list(rows.values())}


def table(entry: dict[str, Any]) -> Table:
    """One case as a table."""
    out = Table(title=entry["title"], title_justify="left")
    out.add_column("method")
    for name in ("first MiB", "ratio", "later MiB", "ratio"):
        out.add_column(name, justify="right")
    out.add_column("")
    for row in entry["methods"]:
        measured = "ratio" in row
        out.add_row(
            row["label"],
            f"{row['first'] / 2**20:.1f}" if "first" in row else "-",
            f"{row['first_ratio']:.2f}" if measured else "-",
            f"{row['later'] / 2**20:.1f}" if "later" in row else "-",
            f"{row['ratio']:.2f}" if measured else "-",
            row.get("failed", ""),
            style="bold" if row["name"] == "l2rw_ext" else None,
        )
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``memory``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--case", nargs="+", choices=list(CASES), metavar="NAME", dest="cases")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="NAME")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:K")
    parser.add_argument("--threads", type=provenance.positive, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="record the results")
    parser.epilog = f"cases: {', '.join(CASES)}. methods: {', '.join(METHODS)}."


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status is 1 where this package's step failed."""
    provenance.check_device(args.device)
    methods = chosen(args.methods)
    report = provenance.header("memory", args.device, sys.argv[1:])
    report |= {"allocator": ALLOCATOR, "cases": [], "complete": False}
    console = Console()
    for name in args.cases or default_cases():
        with console.status(CASES[name].title):
            entry = run_case(CASES[name], methods, device=args.device, threads=args.threads)
        report["cases"].append(entry)
        if args.json:
            provenance.write(args.json, report)
        console.print(table(entry))
    provenance.complete(args.json, report, console)
    ours = [r for e in report["cases"] for r in e["methods"] if r["name"].startswith("l2rw_ext")]
    return 1 if any("failed" in r for r in ours) else 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[1:]))
