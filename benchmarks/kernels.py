"""``python -m benchmarks kernels``: every operator against its composition and the roofline.

Candidates take turns in one process, and each one's result is compared with the operator's formula
in float64, on the same rounded arguments, before its time counts. ``composition`` is what runs
where no kernel does; ``layers apart`` calls the operator of one layer for each of several;
``library``, on CUDA in bfloat16, is cuBLAS or cuDNN in that dtype, followed by a dot that
torch.compile fuses into one kernel. On CUDA each is timed as it is called and replayed from a CUDA
graph, by events; memory is the allocator's peak above arguments and results. The floor is the
larger of operations and bytes over their measured ceilings.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from l2rw_ext import ops
from l2rw_ext.devices import float32_products
from l2rw_ext.ops._kernels import COMPOSED
from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.ops.formulas import FORMULAS, Arguments, Results, as_results

from . import provenance
from .ceilings import Ceilings, measure_ceilings
from .errors import UsageError
from .exact import Errors, errors, limits
from .kernel_cases import KERNEL_CASES, PRECISIONS, KernelCase, default_kernel_cases
from .operator_counts import byte_count, operation_count, results_like
from .timing import CACHES, Captured, capture, interleaved, use_device

Call = Callable[[], Any]
# What the caching allocator rounds every block to.
_BLOCK = 512
# Where the library's product is timed: torch.compile takes seconds for each shape and dtype.
_LIBRARY_PRECISION = "bf16"


@dataclass
class Candidate:
    """A way to compute a case, and what is known of it so far."""

    name: str
    call: Call
    limits: list[Errors]
    status: str = "ok"
    reason: str = ""
    errors: list[Errors] = field(default_factory=list)
    captured: Captured[Any] | None = None
    not_captured: str = ""
    times: dict[str, list[float]] = field(default_factory=dict)
    workspace: int | None = None

    @property
    def timed(self) -> bool:
        return self.status == "ok"


def has_kernel(operator: str, device: str) -> bool:
    """Whether a kernel of this package runs, and not the composition under the operator's name."""
    return not device.startswith("cuda") or operator not in COMPOSED


def example_dots(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> of every example, in float32."""
    # Over dimensions and not over a flat view, so that memory is read in its own order.
    return (a.float() * b.float()).sum(tuple(range(1, a.dim())))


def _fused_dot() -> Callable[[Tensor, Tensor], Tensor]:
    # One compilation for each shape, with no other shape in its way.
    dynamo: Any = importlib.import_module("torch._dynamo")
    dynamo.reset()
    fused: Callable[[Tensor, Tensor], Tensor] = torch.compile(
        example_dots, fullgraph=True, dynamic=False
    )
    return fused


def library_call(
    case: KernelCase, arguments: Arguments, dot: Callable[[Tensor, Tensor], Tensor]
) -> Call | None:
    """A library's product in the dtype of the arguments and a dot; None where there is none."""
    if case.library is None:
        return None
    product, (z, g, *others) = case.library, arguments
    return lambda: dot(product(z, *others), g)


def _apart(*arguments: Any) -> Tensor:
    """The scores of several layers by one call for each."""
    first, *others = zip(*arguments, strict=True)
    u = ops.factored_correlation(*first)
    for layer in others:
        u += ops.factored_correlation(*layer)
    return u


def candidates(
    case: KernelCase, precision: str, arguments: Arguments, device: str
) -> list[Candidate]:
    """The ways to compute a case that there are on this device."""
    allowed = limits(precision, [r.dtype for r in results_like(case.operator, arguments)])
    operator = OPERATORS[case.operator]
    found = []
    if has_kernel(case.operator, device):
        found.append(Candidate("operator", partial(operator, *arguments), allowed))
        if case.operator == "factored_correlations":
            found.append(Candidate("layers apart", partial(_apart, *arguments), allowed))
    found.append(Candidate("composition", partial(operator.composition, *arguments), allowed))
    if device.startswith("cuda") and precision == _LIBRARY_PRECISION:
        library = library_call(case, arguments, _fused_dot())
        if library is not None:
            # Its product is rounded to the dtype of the arguments.
            stored = limits(precision, [arguments[0].dtype])
            found.append(Candidate("library", library, stored))
    return found


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _judge(candidate: Candidate, results: Results, expected: Results, bounds: Results) -> None:
    candidate.errors = errors(results, expected, bounds)
    off = [
        f"error {e.of_norm:.1e} of the norm and {e.of_sum:.1e} of the sum, "
        f"allowed {allowed.of_norm:.1e} and {allowed.of_sum:.1e}"
        for e, allowed in zip(candidate.errors, candidate.limits, strict=True)
        if not e.within(allowed)
    ]
    if off:
        candidate.status, candidate.reason = "wrong", "; ".join(off)


def check(candidate: Candidate, expected: Results, bounds: Results) -> None:
    """Hold a candidate to float64; a wrong one is not timed."""
    try:
        _judge(candidate, as_results(candidate.call()), expected, bounds)
    except Exception as error:
        candidate.status, candidate.reason = "failed", _reason(error)


def check_captured(candidate: Candidate, expected: Results, bounds: Results) -> None:
    """Capture a candidate; what a replay leaves in overwritten results must be right as well."""
    try:
        captured = capture(candidate.call)
    except Exception as error:
        candidate.not_captured = _reason(error)
        return
    for result in as_results(captured.result):
        result.fill_(float("nan"))
    _judge(candidate, as_results(captured.replay()), expected, bounds)
    if candidate.status == "wrong":
        candidate.reason = f"replayed from a graph: {candidate.reason}"
    candidate.captured = captured


def workspace(call: Call, device: str) -> int:
    """Bytes that a call takes above its arguments and results, by the CUDA allocator's peak.

    What stays allocated from earlier calls, such as cuBLAS's own workspace, does not count.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = as_results(call())
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    kept = sum(-(-r.nbytes // _BLOCK) * _BLOCK for r in results)
    return max(0, peak - kept)


def measure(found: list[Candidate], *, device: str, repeats: int, warmup: int, cache: str) -> None:
    """Times of all right candidates, eager and replayed, and on CUDA their workspace."""
    right = [c for c in found if c.timed]
    options: dict[str, Any] = {"repeats": repeats, "warmup": warmup, "device": device}
    modes = {"eager": {c.name: c.call for c in right}}
    replays = {c.name: c.captured.replay for c in right if c.captured is not None}
    if replays:
        modes["captured"] = replays
    for mode, calls in modes.items():
        times = interleaved(calls, cache=cache, **options)
        for c in right:
            if c.name in times:
                c.times[mode] = times[c.name]
    if device.startswith("cuda"):
        for c in right:
            c.workspace = workspace(c.call, device)


def _row(c: Candidate, floor: float, operations: int, ceiling: float) -> dict[str, Any]:
    row: dict[str, Any] = {"name": c.name, "status": c.status}
    if c.reason:
        row["reason"] = c.reason
    if c.errors:
        row["errors"] = [dataclasses.asdict(e) for e in c.errors]
        row["limits"] = [dataclasses.asdict(e) for e in c.limits]
    if c.not_captured:
        row["not_captured"] = c.not_captured
    for mode, times in c.times.items():
        seconds = statistics.median(times)
        row[mode] = {
            "seconds": seconds,
            "seconds_min": min(times),
            "roofline": floor / seconds,
            "matrix_ceiling": operations / seconds / ceiling,
        }
    if c.workspace is not None:
        row["workspace_bytes"] = c.workspace
    return row


def _ratios(found: list[Candidate]) -> dict[str, dict[str, float]]:
    """How many times faster the operator is than each other candidate, by mode."""
    times = {c.name: c.times for c in found}
    return {
        name: {
            mode: statistics.median(theirs[mode]) / statistics.median(ours)
            for mode, ours in times["operator"].items()
            if mode in theirs
        }
        for name, theirs in times.items()
        if name != "operator" and theirs and times.get("operator")
    }


def run_case(
    case: KernelCase,
    precision: str,
    ceilings: Ceilings,
    *,
    device: str = "cpu",
    repeats: int = 30,
    warmup: int = 5,
    cache: str = "warm",
) -> dict[str, Any]:
    """Check and time one case in one precision: an entry of the report's ``cases``."""
    arguments = case.draw(precision, device)
    formula = FORMULAS[case.operator]
    expected, bounds = formula.exact(arguments), formula.magnitudes(arguments)
    with float32_products(case.tf32(precision)), torch.no_grad():
        found = candidates(case, precision, arguments, device)
        for c in found:
            check(c, expected, bounds)
            if c.timed and device.startswith("cuda"):
                check_captured(c, expected, bounds)
        measure(found, device=device, repeats=repeats, warmup=warmup, cache=cache)
    operations = operation_count(case.operator, arguments)
    moved = byte_count(case.operator, arguments, results_like(case.operator, arguments))
    floor = ceilings.floor(precision, operations, moved)
    ceiling = ceilings.operations[precision]
    return {
        "name": case.name,
        "title": case.title,
        "operator": case.operator,
        "precision": precision,
        "kernel": has_kernel(case.operator, device),
        "operations": operations,
        "bytes": moved,
        "floor_seconds": floor,
        "bound": ceilings.bound(precision, operations, moved),
        "candidates": [_row(c, floor, operations, ceiling) for c in found],
        "ratios": _ratios(found),
    }


def run_safely(case: KernelCase, precision: str, *rest: Any, **options: Any) -> dict[str, Any]:
    """:func:`run_case`; where it cannot run (memory, a device in an error state) it says why."""
    try:
        return run_case(case, precision, *rest, **options)
    except RuntimeError as error:
        return {
            "name": case.name,
            "title": case.title,
            "operator": case.operator,
            "precision": precision,
            "kernel": has_kernel(case.operator, options["device"]),
            "failed": _reason(error),
            "candidates": [],
            "ratios": {},
        }


def wrong(entry: dict[str, Any]) -> bool:
    """Whether the operator, or all of a case, failed or gave a wrong result."""
    rows = entry["candidates"]
    return "failed" in entry or any(r["name"] == "operator" and r["status"] != "ok" for r in rows)


def _microseconds(row: dict[str, Any], mode: str) -> str:
    return f"{1e6 * row[mode]['seconds']:.1f}" if mode in row else "-"


def add_row(out: Table, entry: dict[str, Any]) -> None:
    """The candidates of one case as rows of a table."""
    title = f"{entry['name']} {entry['precision']}"
    if "failed" in entry:
        out.add_row(title, *["-"] * 6, entry["failed"])
    for row in entry["candidates"]:
        mode = "captured" if "captured" in row else "eager"
        times = entry["ratios"].get(row["name"], {}).get(mode)
        notes = ["" if row["status"] == "ok" else row["status"], row.get("reason", "")]
        if "not_captured" in row:
            notes.append(f"not captured: {row['not_captured']}")
        if row["name"] == "composition" and not entry["kernel"]:
            notes.append("no kernel: this is what runs")
        out.add_row(
            title,
            row["name"],
            _microseconds(row, "eager"),
            _microseconds(row, "captured"),
            f"{row[mode]['roofline']:.0%}" if mode in row else "-",
            f"{times:.2f}" if times else "",
            f"{max(e['of_norm'] for e in row['errors']):.0e}" if row.get("errors") else "-",
            "; ".join(note for note in notes if note),
        )
        title = ""


def _table() -> Table:
    out = Table()
    out.add_column("case", no_wrap=True)
    out.add_column("", no_wrap=True)
    for name in ("eager\nµs", "graph\nµs", "of\nroof", "slower\nby", "error"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("note")
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kernels``."""
    parser.add_argument(
        "--case", nargs="+", choices=list(KERNEL_CASES), metavar="NAME", dest="cases"
    )
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), dest="precisions")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:K")
    parser.add_argument("--repeats", type=provenance.positive, default=30)
    parser.add_argument("--warmup", type=provenance.positive, default=5)
    parser.add_argument("--threads", type=provenance.positive, help="default: torch's choice")
    parser.add_argument(
        "--cache",
        choices=CACHES,
        help="on CUDA: flush the L2 cache before each call (cold, the default) or leave it (warm)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="record the results")
    parser.epilog = f"cases: {', '.join(KERNEL_CASES)}."


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status is 1 where an operator's result is wrong."""
    provenance.check_device(args.device)
    cuda = args.device.startswith("cuda")
    if args.cache and not cuda:
        raise UsageError("--cache: on the CPU caches are left as they are")
    if args.threads:
        torch.set_num_threads(args.threads)
    use_device(args.device)
    cache = args.cache or ("cold" if cuda else "warm")
    chosen = [KERNEL_CASES[name] for name in args.cases or default_kernel_cases(args.device)]
    runs = [(c, p) for c in chosen for p in c.precisions if p in (args.precisions or PRECISIONS)]
    if not runs:
        raise UsageError("no case of these has one of these precisions")
    console = Console()
    ceilings = measure_ceilings(args.device, tuple(dict.fromkeys(p for _, p in runs)))
    report = provenance.header("kernels", args.device, sys.argv[1:])
    report |= {
        "cache": cache,
        "repeats": args.repeats,
        "ceilings": {"operations": ceilings.operations, "bytes": ceilings.bytes},
        "cases": [],
        "complete": False,
    }
    for name, rate in ceilings.operations.items():
        console.print(f"ceiling, {name} matrix product: {rate / 1e12:.2f} TFLOP/s")
    console.print(f"ceiling, copy: {ceilings.bytes / 1e9:.0f} GB/s; caches: {cache}")
    out = _table()
    for case, precision in runs:
        with console.status(f"{case.name} {precision}"):
            entry = run_safely(
                case,
                precision,
                ceilings,
                device=args.device,
                repeats=args.repeats,
                warmup=args.warmup,
                cache=cache,
            )
        report["cases"].append(entry)
        add_row(out, entry)
        if args.json:
            provenance.write(args.json, report)
    console.print(out)
    provenance.complete(args.json, report, console)
    return 1 if any(wrong(entry) for entry in report["cases"]) else 0
