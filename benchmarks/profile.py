"""``python -m benchmarks profile``: where the time of a reweighted step goes.

Four views of the same step. Unprofiled times of a full step and of one on 2+1 examples, where
arithmetic is next to nothing: what the package adds there is what Python, dispatch and bookkeeping
cost in every step, an upper bound of the Python overhead. cProfile, whose own cost inflates Python
by about two, split into this package, torch's Python, and compiled code. And the package's
functions by time, called ones included. Last, the operations of both steps by torch's profiler.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import math
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import l2rw_ext

from . import provenance
from .cases import CASES, Case, make_case
from .methods import METHODS, YARDSTICK, Step
from .step import Candidate, time_interleaved

INTERCEPTION = "__torch_function__"


class FunctionTime(NamedTuple):
    """One function of the package in the profile, per step."""

    where: str
    calls: float
    own: float
    cumulative: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """Seconds per step under cProfile, by owner, and the package's functions."""

    package: float
    torch: float
    compiled: float
    intercepted: float
    functions: list[FunctionTime]


def step_times(case: Case, repeats: int) -> tuple[float, float]:
    """Seconds of this package's step and of the plain union step, interleaved.

    The shortest of all repeats: the difference of two steps of a millisecond would drown in what
    else the machine does.
    """
    candidates = []
    for name in ("l2rw_ext", YARDSTICK):
        own = case.copy()
        candidates.append(Candidate(METHODS[name], "ok", "", own, METHODS[name].prepare(own)))
    time_interleaved(candidates, repeats, 3, "cpu")
    ours, plain = (min(c.times or [math.nan]) for c in candidates)
    return ours, plain


def smallest(case: Case) -> Case:
    """The same model on two training examples and one clean example."""
    (x, y), (x_clean, y_clean) = case.train, case.clean
    spec = dataclasses.replace(case.spec, n=2, m=1)
    return dataclasses.replace(
        case.copy(), spec=spec, train=(x[:2], y[:2]), clean=(x_clean[:1], y_clean[:1])
    )


def warm(case: Case, method: str) -> tuple[Step, Callable[[], None]]:
    """A step after its first ones, and what clears the gradients before the next."""
    own = case.copy()
    step = METHODS[method].prepare(own)

    def clear() -> None:
        for p in own.model.parameters():
            p.grad = None

    for _ in range(3):
        clear()
        step()
    return step, clear


def profile(case: Case, repeats: int) -> Profile:
    """The profile of ``repeats`` steps after warming up, divided by ``repeats``."""
    step, clear = warm(case, "l2rw_ext")
    profiler = cProfile.Profile()
    for _ in range(repeats):
        clear()
        profiler.enable()
        step()
        profiler.disable()
    stats: Any = pstats.Stats(profiler)
    package_root = str(Path(l2rw_ext.__file__).parent)
    torch_root = str(Path(torch.__file__).parent)
    shares = {"package": 0.0, "torch": 0.0, "compiled": 0.0}
    functions = []
    intercepted = 0.0
    for (path, line, name), (_, calls, own_time, cumulative, _) in stats.stats.items():
        if path.startswith(package_root):
            shares["package"] += own_time
            where = f"{Path(path).relative_to(package_root)}:{line} {name}"
            functions.append(
                FunctionTime(where, calls / repeats, own_time / repeats, cumulative / repeats)
            )
            if name == INTERCEPTION:
                intercepted += calls / repeats
        elif path.startswith(torch_root):
            shares["torch"] += own_time
        else:
            shares["compiled"] += own_time
    functions.sort(key=lambda f: -f.cumulative)
    return Profile(
        shares["package"] / repeats,
        shares["torch"] / repeats,
        shares["compiled"] / repeats,
        intercepted,
        functions,
    )


def operations(case: Case, method: str, repeats: int) -> dict[str, float]:
    """Seconds of a step by operation, without those that it calls."""
    step, clear = warm(case, method)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(repeats):
            clear()
            step()
    return {e.key: 1e-6 * e.self_cpu_time_total / repeats for e in found.key_averages()}


def operations_table(case: Case, repeats: int, top: int) -> Table:
    """The operations of this package's step that take longest, beside those of the plain step."""
    ours, plain = (operations(case, name, repeats) for name in ("l2rw_ext", YARDSTICK))
    out = Table()
    out.add_column("operation", no_wrap=True)
    for name in ("plain union ms", "l2rw_ext ms"):
        out.add_column(name, justify="right", no_wrap=True)
    names = sorted(ours | plain, key=lambda k: -max(ours.get(k, 0.0), plain.get(k, 0.0)))
    for name in names[:top]:
        out.add_row(name, *(f"{1e3 * step.get(name, 0.0):.2f}" for step in (plain, ours)))
    out.add_row("all", *(f"{1e3 * sum(step.values()):.2f}" for step in (plain, ours)))
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``profile``."""
    parser.add_argument("--case", choices=list(CASES), default="lenet", metavar="NAME")
    parser.add_argument("--repeats", type=provenance.positive, default=30)
    parser.add_argument(
        "--top", type=provenance.positive, default=20, help="functions and operations to list"
    )
    parser.add_argument("--threads", type=provenance.positive, help="default: torch's choice")
    parser.epilog = f"cases: {', '.join(CASES)}."


def run(args: argparse.Namespace) -> int:
    """Print the four views."""
    if args.threads:
        torch.set_num_threads(args.threads)
    case = make_case(CASES[args.case])
    ours, plain = step_times(case, args.repeats)
    small_ours, small_plain = step_times(smallest(case), args.repeats)
    found = profile(case, args.repeats)
    added = small_ours - small_plain
    console = Console()
    console.print(f"[bold]{case.spec.title}[/bold], shortest step, without profiler")
    console.print(f"  l2rw_ext {1e3 * ours:.2f} ms, plain union {1e3 * plain:.2f} ms")
    console.print(
        f"  on 2+1 examples {1e3 * small_ours:.2f} and {1e3 * small_plain:.2f} ms: "
        f"the package adds {1e3 * added:.2f} ms, {added / ours:.0%} of the full step, "
        f"{1e6 * added / max(1.0, found.intercepted):.0f} µs for each of "
        f"{found.intercepted:.0f} intercepted calls"
    )
    total = found.package + found.torch + found.compiled
    console.print(
        f"under cProfile {1e3 * total:.2f} ms: l2rw_ext's Python {found.package / total:.0%}, "
        f"torch's Python {found.torch / total:.0%}, compiled {found.compiled / total:.0%}"
    )
    out = Table()
    out.add_column("function of l2rw_ext", no_wrap=True)
    for name in ("calls", "own µs", "total µs"):
        out.add_column(name, justify="right")
    for f in found.functions[: args.top]:
        out.add_row(f.where, f"{f.calls:.0f}", f"{1e6 * f.own:.0f}", f"{1e6 * f.cumulative:.0f}")
    console.print(out)
    console.print(operations_table(case, args.repeats, args.top))
    return 0
