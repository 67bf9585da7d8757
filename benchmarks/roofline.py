"""``python -m benchmarks roofline``: what a GPU should take, before one is measured.

Predicts every case of ``kernels`` and the steps that ``make gpu`` measures from counted operations,
bytes and launches and the figures of a data sheet; nothing is timed. With ``--measured`` the
results in a folder are held against the predictions that are recorded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import provenance
from .cases import CASES
from .data_sheets import DATA_SHEETS, EAGER_LAUNCH, GRAPH_LAUNCH, GRAPH_NODE
from .errors import UsageError
from .gpu import ON_GPU
from .kernel_cases import KERNEL_CASES, default_kernel_cases
from .methods import METHODS, YARDSTICK
from .pages import read_reports
from .predicted import PREDICTED
from .predictions import STEP_METHODS, predict_kernel, predict_step

_STEPS = tuple(dict.fromkeys((*ON_GPU.step, *ON_GPU.compiled)))
_WARPGROUPS = "L2RW_CUDA_WARPGROUPS=1"

Measured = tuple[float | None, str]
"""Seconds, or why there are none."""


def measured_kernels(reports: list[dict[str, Any]]) -> dict[tuple[str, str, str], Measured]:
    """What was measured of kernels in CUDA graphs, by case, precision and candidate."""
    found: dict[tuple[str, str, str], Measured] = {}
    for report in reports:
        if report["kind"] != "kernels":
            continue
        warpgroups = _WARPGROUPS in report["command"].split()
        for entry in report["cases"]:
            failed = (None, entry.get("failed", ""))
            names = {"operator": "warpgroups" if warpgroups else "operator"}
            if not warpgroups:
                names["composition"] = "composition"
            rows = {row["name"]: row for row in entry["candidates"]}
            for name, predicted in names.items():
                row = rows.get(name)
                found[entry["name"], entry["precision"], predicted] = (
                    failed if row is None else _seconds(row.get("captured", {}), row)
                )
    return found


def measured_steps(reports: list[dict[str, Any]]) -> dict[tuple[str, str], Measured]:
    """What was measured of steps whose products ran in TF32, by case and method."""
    return {
        (entry["name"], row["name"]): _seconds(row, row)
        for report in reports
        if report["kind"] == "step" and report.get("tf32")
        for entry in report["cases"]
        for row in entry["methods"]
    }


def _seconds(times: dict[str, Any], row: dict[str, Any]) -> Measured:
    if "seconds" in times:
        return times["seconds"], ""
    return None, row.get("reason") or row.get("not_captured") or row["status"]


def _against(predicted: float, measured: Measured) -> tuple[str, str, str]:
    """Cells: what was measured, that over what was predicted, and why there is nothing."""
    seconds, reason = measured
    if seconds is None:
        return "-", "-", reason
    return f"{1e3 * seconds:.3f}", f"{seconds / predicted:.2f}", ""


_NOTHING: Measured = (None, "not measured")


def _ways(predicted: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """The methods of ``step`` that a predicted one stands for: name, mode and seconds."""
    for name, method in METHODS.items():
        if name.startswith(predicted["name"]):
            mode = "eager" if method.counterpart == YARDSTICK else "captured"
            yield name, mode, predicted[mode]["seconds"]


def _table(title: str, *numbers: str, note: bool = False) -> Table:
    out = Table(title=title, title_justify="left")
    out.add_column("case", no_wrap=True)
    out.add_column("", no_wrap=True)
    for name in numbers:
        out.add_column(name, justify="right", no_wrap=True)
    if note:
        out.add_column("note")
    return out


def tables(report: dict[str, Any]) -> list[Table]:
    """Kernels and steps with what was counted and predicted."""
    kernels = _table("kernels", "GFLOP", "MB", "floor\nms", "bound by", "launches", "graph\nms")
    for entry in report["kernels"]:
        counted = (
            f"{1e-9 * entry['operations']:.3f}",
            f"{1e-6 * entry['bytes']:.2f}",
            f"{1e3 * entry['floor_seconds']:.4f}",
        )
        title = f"{entry['name']} {entry['precision']}"
        for row in entry["candidates"] or [{"name": "not predicted", "bound": entry["bound"]}]:
            own = (str(row["launches"]), _milliseconds(row)) if "launches" in row else ("-", "-")
            kernels.add_row(title, row["name"], *counted, row["bound"], *own)
    steps = _table("steps", "GFLOP", "GB", "launches", "bound by", "eager\nms", "graph\nms")
    for entry in report["steps"]:
        for row in entry["methods"]:
            steps.add_row(
                entry["title"],
                row["label"],
                f"{1e-9 * row['operations']:.2f}",
                f"{1e-9 * row['bytes']:.3f}",
                str(row["launches"]),
                row["bound"],
                _milliseconds(row, "eager"),
                _milliseconds(row),
            )
    return [kernels, steps]


def _milliseconds(row: dict[str, Any], mode: str = "captured") -> str:
    return f"{1e3 * row[mode]['seconds']:.4f}"


def comparison(report: dict[str, Any], measured: list[dict[str, Any]]) -> list[Table]:
    """The predictions of a report with what was measured beside them."""
    numbers = ("predicted\nms", "measured\nms", "over\npredicted")
    kernels, steps = (_table(t, *numbers, note=True) for t in ("kernels, CUDA graph", "steps"))
    of_kernels, of_steps = measured_kernels(measured), measured_steps(measured)
    for entry in report["kernels"]:
        title = f"{entry['name']} {entry['precision']}"
        for row in entry["candidates"]:
            seconds = row["captured"]["seconds"]
            case = (entry["name"], entry["precision"], row["name"])
            cells = _against(seconds, of_kernels.get(case, _NOTHING))
            kernels.add_row(title, row["name"], f"{1e3 * seconds:.4f}", *cells)
    for entry in report["steps"]:
        for predicted in entry["methods"]:
            for name, mode, seconds in _ways(predicted):
                step = (entry["name"], name)
                if step not in of_steps and name != predicted["name"]:
                    continue
                cells = _against(seconds, of_steps.get(step, _NOTHING))
                label = f"{METHODS[name].label} ({mode})"
                steps.add_row(entry["title"], label, f"{1e3 * seconds:.4f}", *cells)
    return [kernels, steps]


def predictions(device: str, kernels: list[str], steps: list[str]) -> dict[str, Any]:
    """A report of the predictions for a device."""
    sheet = DATA_SHEETS[device]
    report = provenance.header("roofline", device, sys.argv[1:])
    return report | {
        "sheet": sheet.title,
        "ceilings": {"operations": sheet.library.operations, "bytes": sheet.library.bytes},
        "own_ceilings": sheet.own.operations,
        "launch_seconds": {
            "eager": EAGER_LAUNCH,
            "graph": GRAPH_LAUNCH,
            "graph_node": GRAPH_NODE,
        },
        "kernels": [
            predict_kernel(KERNEL_CASES[name], precision, sheet)
            for name in kernels
            for precision in KERNEL_CASES[name].precisions
        ],
        "steps": [predict_step(CASES[name], sheet, STEP_METHODS) for name in steps],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``roofline``."""
    parser.add_argument(
        "--device", choices=list(DATA_SHEETS), required=True, help="whose data sheet is taken"
    )
    parser.add_argument(
        "--case", nargs="+", choices=[*KERNEL_CASES, *CASES], metavar="NAME", dest="cases"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", type=Path, metavar="FILE", help="record the predictions")
    output.add_argument(
        "--measured",
        type=Path,
        metavar="FOLDER",
        help="hold the results in a folder against the recorded predictions",
    )
    parser.epilog = f"cases: {', '.join(KERNEL_CASES)}, {', '.join(CASES)}."


def run(args: argparse.Namespace) -> int:
    """Predict, or compare with what was measured."""
    console = Console()
    if args.measured:
        predicted = provenance.read(PREDICTED / f"{args.device}.json")
        measured = [r for r in read_reports(args.measured).values() if _on_cuda(r)]
        if not measured:
            raise UsageError(f"--measured: there are no results of a GPU in {args.measured}")
        for table in comparison(predicted, measured):
            console.print(table)
        return 0
    kernels = [name for name in args.cases or default_kernel_cases("cuda") if name in KERNEL_CASES]
    steps = [name for name in args.cases or _STEPS if name in CASES]
    with console.status(f"counting for {DATA_SHEETS[args.device].title}"):
        report = predictions(args.device, kernels, steps)
    for table in tables(report):
        console.print(table)
    provenance.complete(args.json, report, console)
    return 0


def _on_cuda(report: dict[str, Any]) -> bool:
    return str(report.get("device", "")).startswith("cuda")
