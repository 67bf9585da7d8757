"""``python -m benchmarks step``: time of one training step, every method against the plain one.

All methods run in one process, one step of each in turn, and each method's scores, weights and
gradient are compared with the float64 oracle before its time counts: those of the last of its first
steps, which runs as all later ones do. The seconds of these first steps stand beside. Times are
medians; ratios are over a plain step on the union of both batches, and where that ran in several
ways (eagerly, compiled, from a CUDA graph), over the fastest of this run. Beside them stand those
over the plain step on the training batch alone that ran in the same way, eagerly or compiled.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from l2rw_ext.devices import float32_products
from l2rw_ext.reference import relative_error

from . import provenance
from .cases import CASES, Case, CaseSpec, default_cases, left_out, make_case
from .errors import UsageError
from .expected import Oracle, gradient_error, oracle
from .methods import FIRST_STEPS, METHODS, YARDSTICK, Method, Outcome, Step, chosen, with_plain
from .operations import operation_bound
from .timing import use_device, without_collection

# A float32 method may have twice the error of float32 double backward plus this.
ERROR_FLOOR = 1e-6
# The error is that of the worst of so many steps, on parameters with other last digits but for one.
ROUNDINGS = 4
# A plain step that a compiler rounds may have this, where single ReLUs change their sign.
ROUNDED_PLAIN = 1e-2


@dataclass
class Candidate:
    """A method on its own copy of the case, and what is known of it so far."""

    method: Method
    status: str
    reason: str = ""
    case: Case | None = None
    step: Step | None = None
    engine: str | None = None
    errors: dict[str, float] | None = None
    first: list[float] = field(default_factory=list)
    times: list[float] | None = None


def _clear(case: Case) -> None:
    for p in case.model.parameters():
        p.grad = None


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def compare(case: Case, kind: str, outcome: Outcome, truth: Oracle) -> dict[str, float]:
    """Relative errors of scores, weights and the weighted gradient in ``p.grad``.

    A plain step has only that of its own gradient; ``kind`` tells which batch it is of.
    """
    if kind == "plain":
        return {"training gradient": gradient_error(case.model, truth.training_gradient)}
    if outcome.scores is None or outcome.weights is None:
        return {"union gradient": gradient_error(case.model, truth.union_gradient)}
    return {
        "scores": relative_error(outcome.scores, truth.scores),
        "weights": relative_error(outcome.weights, truth.weights),
        "gradient": gradient_error(case.model, truth.gradient),
    }


def error_limits(case: Case, truth: Oracle) -> dict[str, float]:
    """What a float32 method may differ from the oracle: twice the error of an eager step plus 1e-6.

    Reweighted steps are held to double backward, plain ones to the eager step on their batch. In a
    deep network rounding decides the sign of some ReLUs, and with it the thousandth part of a
    gradient; so that luck decides nothing, the worst of a few roundings of the parameters counts.
    """
    limits: dict[str, float] = {}
    for name in ("double_backward", YARDSTICK, "plain"):
        for seed in range(ROUNDINGS):
            own = case.copy()
            if seed:
                _round(own, seed)
            outcome = METHODS[name].prepare(own)()
            for k, error in compare(own, METHODS[name].kind, outcome, truth).items():
                limits[k] = max(limits.get(k, 0.0), 2 * error + ERROR_FLOOR)
    return limits


def _round(case: Case, seed: int) -> None:
    """Change parameters by less than a unit in the last place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in case.model.parameters():
            noise = 2 * torch.rand(p.shape, dtype=p.dtype, generator=generator) - 1
            p.mul_(1 + torch.finfo(p.dtype).eps * noise.to(p.device))


def _nothing_compiled(method: Method) -> AbstractContextManager[Any]:
    """No compiled code is found on disk inside, so that the first steps compile all of theirs."""
    if not method.compiled:
        return nullcontext()
    fresh: AbstractContextManager[Any] = importlib.import_module(
        "torch._inductor.utils"
    ).fresh_cache()
    return fresh


def first_steps(candidate: Candidate, case: Case, device: str) -> Outcome:
    """Make a method ready and run its first steps, noting the seconds of each; the last outcome."""
    start = time.perf_counter()
    candidate.step = candidate.method.prepare(case)
    for _ in range(FIRST_STEPS):
        _clear(case)
        outcome = candidate.step()
        _synchronize(device)
        now = time.perf_counter()
        candidate.first.append(now - start)
        start = now
    return outcome


def prepare(
    case: Case, method: Method, truth: Oracle, limits: dict[str, float], device: str
) -> Candidate:
    """Make a method ready and hold it to the oracle; a wrong one is not timed.

    A plain step that only rounds more is timed, for else ours would lack the faster yardstick.
    """
    if not method.available:
        return Candidate(method, "not installed", f"{method.requires} is not installed")
    own = case.copy()
    candidate = Candidate(method, "ok", case=own)
    with _nothing_compiled(method):
        try:
            outcome = first_steps(candidate, own, device)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return Candidate(method, "failed", reason)
    candidate.engine = outcome.engine
    candidate.errors = compare(own, method.kind, outcome, truth)
    off = {k: v for k, v in candidate.errors.items() if not v <= limits[k]}
    plain = method.kind in ("plain", "union")
    if method.kind == "approximate" or (
        off and plain and max(candidate.errors.values()) <= ROUNDED_PLAIN
    ):
        candidate.status = "approximate"
    elif off:
        candidate.status = "wrong"
        candidate.reason = ", ".join(
            f"{k} error {v:.1e}, allowed {limits[k]:.1e}" for k, v in off.items()
        )
    return candidate


def time_interleaved(
    candidates: Sequence[Candidate], repeats: int, warmup: int, device: str
) -> None:
    """One step of each method in turn, starting one further each round, medians later."""
    timed = [c for c in candidates if c.status in ("ok", "approximate")]
    for c in timed:
        c.times = []
    with without_collection():
        for repeat in range(-warmup, repeats):
            gc.collect()
            for k in range(len(timed)):
                c = timed[(k + repeat) % len(timed)]
                if c.case is None or c.step is None or c.times is None:
                    continue
                _clear(c.case)
                _synchronize(device)
                start = time.perf_counter()
                c.step()
                _synchronize(device)
                elapsed = time.perf_counter() - start
                if repeat >= 0:
                    c.times.append(elapsed)


def fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    """The yardstick: of the plain steps on the union that were timed, the one of least median."""
    timed = [c for c in candidates if c.method.kind == "union" and c.times]
    return min(timed, key=lambda c: statistics.median(c.times or [])) if timed else None


def _over(c: Candidate, other: Candidate | None) -> tuple[float, list[float]] | None:
    """The ratio of two medians, and the quartiles of the ratios of single rounds."""
    if not c.times or other is None or not other.times:
        return None
    pairs = [a / b for a, b in zip(c.times, other.times, strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
    return statistics.median(c.times) / statistics.median(other.times), [low, high]


def _row(
    c: Candidate, yardstick: Candidate | None, on_training_batch: Candidate | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": c.method.name,
        "label": c.method.label,
        "kind": c.method.kind,
        "status": c.status,
    }
    if c.reason:
        row["reason"] = c.reason
    if c.engine:
        row["engine"] = c.engine
    if c.errors:
        row["errors"] = c.errors
    if c.first:
        row["first_seconds"] = sum(c.first)
        row["first_steps"] = c.first
    if c.times:
        row["seconds"] = statistics.median(c.times)
        row["seconds_min"] = min(c.times)
    for name, other in (("ratio", yardstick), ("ratio_n", on_training_batch)):
        found = _over(c, other)
        if found is not None:
            row[name], row[f"{name}_quartiles"] = found
    return row


def run_case(
    spec: CaseSpec,
    methods: Sequence[Method],
    *,
    repeats: int = 15,
    warmup: int = 2,
    device: str = "cpu",
) -> dict[str, Any]:
    """Check and time ``methods`` on one case; the result is one entry of the report's ``cases``."""
    about = {"name": spec.name, "title": spec.title, "n": spec.n, "m": spec.m}
    reason = left_out(spec, device)
    if reason is not None:
        return {**about, "left_out": reason, "methods": []}
    case = make_case(spec)
    truth = oracle(case)
    case.rho = truth.rho
    bound = operation_bound(case)
    case = case.to(device)
    if not any(method.name == YARDSTICK for method in methods):
        methods = [METHODS[YARDSTICK], *methods]
    # One function of ours is compiled for case after case, and Dynamo counts its graphs.
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limits = error_limits(case, truth)
        candidates = [prepare(case, method, truth, limits, device) for method in methods]
        time_interleaved(candidates, repeats, warmup, device)
    yardstick = fastest(candidates)
    by_name = {c.method.name: c for c in candidates}
    return {
        **about,
        "rho": case.rho,
        "operation_bound": bound,
        "repeats": repeats,
        "error_limits": limits,
        "yardstick": yardstick.method.name if yardstick else None,
        "methods": [
            _row(c, yardstick, by_name.get(c.method.on_training_batch or "")) for c in candidates
        ],
    }


def table(entry: dict[str, Any]) -> Table | str:
    """One case as a table, or why it was left out."""
    if "left_out" in entry:
        return f"{entry['title']}, left out: {entry['left_out']}"
    out = Table(
        title=f"{entry['title']}   ρ {entry['rho']:.2f}, "
        f"operation count allows {entry['operation_bound']:.2f}",
        title_justify="left",
    )
    out.add_column("method", no_wrap=True)
    for name in ("ms", "/ n+m", "quartiles", "/ n", "score error", "first s"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("note")
    for row in entry["methods"]:
        errors = row.get("errors")
        notes = [row.get("engine", ""), "" if row["status"] == "ok" else row["status"]]
        out.add_row(
            row["label"],
            f"{1e3 * row['seconds']:.2f}" if "seconds" in row else "-",
            f"{row['ratio']:.2f}" if "ratio" in row else "-",
            "{:.2f}-{:.2f}".format(*row["ratio_quartiles"]) if "ratio" in row else "",
            f"{row['ratio_n']:.2f}" if "ratio_n" in row else "-",
            f"{errors['scores']:.0e}" if errors and "scores" in errors else "",
            f"{row['first_seconds']:.1f}" if "first_seconds" in row else "",
            ": ".join(part for part in (*notes, row.get("reason", "")) if part),
            style="bold" if row["name"] == "l2rw_ext" else None,
        )
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``step``."""
    parser.add_argument("--case", nargs="+", choices=list(CASES), metavar="NAME", dest="cases")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="NAME")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:K")
    parser.add_argument("--repeats", type=provenance.positive, default=15)
    parser.add_argument("--warmup", type=provenance.positive, default=2)
    parser.add_argument("--threads", type=provenance.positive, help="default: torch's choice")
    parser.add_argument(
        "--tf32",
        action="store_true",
        help="on CUDA: products and convolutions of float32 may be rounded to TF32",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="record the results")
    parser.epilog = f"cases: {', '.join(CASES)}. methods: {', '.join(METHODS)}."


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status is 1 where this package's own result is wrong."""
    provenance.check_device(args.device)
    if args.tf32 and not args.device.startswith("cuda"):
        raise UsageError("--tf32: there is no TF32 on the CPU")
    use_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    methods = with_plain(chosen(args.methods))
    report = provenance.header("step", args.device, sys.argv[1:])
    report |= {"tf32": args.tf32, "cases": [], "complete": False}
    console = Console()
    names = args.cases or default_cases()
    with (
        float32_products(args.tf32),
        Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), transient=True
        ) as progress,
    ):
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=CASES[name].title)
            entry = run_case(
                CASES[name],
                methods,
                repeats=args.repeats,
                warmup=args.warmup,
                device=args.device,
            )
            report["cases"].append(entry)
            if args.json:
                provenance.write(args.json, report)
            progress.console.print(table(entry))
            progress.advance(task)
    provenance.complete(args.json, report, console)
    ours = [r for e in report["cases"] for r in e["methods"] if r["name"].startswith("l2rw_ext")]
    return 1 if any(r["status"] != "ok" for r in ours) else 0
