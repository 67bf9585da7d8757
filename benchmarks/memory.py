"""``python -m benchmarks memory``: peak memory of one training step, a fresh process per method.

A child process builds model and data and makes one step of two examples, so that libraries, thread
pools and code pages are loaded. It drops the gradients, returns freed memory to the system and
notes the resident size: the level. Then it makes steps, each after a reset of the kernel's peak
counter. The peak above the level counts everything that a step needs: activations, gradients,
caches and what the allocator holds. ``first`` is the first step of that shape (the package makes
its plan there), ``later`` the largest of the following ones. On CUDA the allocator's peak is read.

glibc returns large blocks at once with the fixed thresholds that every child gets.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
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
from .methods import METHODS, YARDSTICK, Method, Step, chosen

# Fixed thresholds: by default glibc raises them with use, and what a process holds would depend on
# the order of its allocations.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "2",
}
STEPS = 3


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
    """A step of two and two examples on a model of its own, which is then dropped."""
    x, y = case.train
    x_clean, y_clean = case.clean
    small = dataclasses.replace(case.copy(), train=(x[:2], y[:2]), clean=(x_clean[:2], y_clean[:2]))
    method.prepare(small)()


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
    return {"level": level, "first": peaks[0], "later": max(peaks[1:])}


def child(arguments: Sequence[str]) -> int:
    """Measure one method and print the result as JSON: what the subprocess runs."""
    case_name, method_name, device, threads, labels = arguments
    if int(threads):
        torch.set_num_threads(int(threads))
    case = make_case(CASES[case_name], labels=torch.load(labels)).to(device)
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
    case_name: str, method: Method, labels: Path, *, device: str = "cpu", threads: int = 0
) -> dict[str, Any]:
    """Run :func:`child` in a fresh process and return what it printed."""
    command = [sys.executable, "-m", "benchmarks.memory", case_name, method.name, device]
    done = subprocess.run(
        [*command, str(threads), str(labels)],
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
    if not any(method.name == YARDSTICK for method in methods):
        methods = [METHODS[YARDSTICK], *methods]
    labels = draw_case_labels(spec)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.pt"
        torch.save(labels, path)
        for method in methods:
            row: dict[str, Any] = {"name": method.name, "label": method.label}
            if method.available:
                row |= measure(spec.name, method, path, device=device, threads=threads)
            else:
                row["failed"] = f"{method.requires} is not installed"
            rows.append(row)
    yardstick = next(row for row in rows if row["name"] == YARDSTICK)
    for row in rows:
        if "later" in row and yardstick.get("later"):
            row["ratio"] = row["later"] / yardstick["later"]
            row["first_ratio"] = row["first"] / yardstick["first"]
    return {"name": spec.name, "title": spec.title, "n": spec.n, "m": spec.m, "methods": rows}


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
            f"{row['first'] / 2**20:.1f}" if measured else "-",
            f"{row['first_ratio']:.2f}" if measured else "-",
            f"{row['later'] / 2**20:.1f}" if measured else "-",
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
    report["complete"] = True
    if args.json:
        provenance.write(args.json, report)
        console.print(f"recorded in {args.json}")
    ours = [r for e in report["cases"] for r in e["methods"] if r["name"] == "l2rw_ext"]
    return 1 if any("failed" in r for r in ours) else 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[1:]))
