"""``python -m benchmarks scaling``: time and memory of a step as batches, model or sequences grow.

At each size the chosen methods take turns as in ``python -m benchmarks step``, every answer held to
the oracle first, and the peak of memory is read as in ``python -m benchmarks memory``. The question
is whether their ratio to the plain step stays flat. n, m/n, depth and width are those of a
multilayer perceptron, length is the number of tokens of a small GPT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import memory, provenance, step
from .architectures import GPT, MLP
from .cases import CaseSpec
from .methods import METHODS, chosen
from .pages import growth
from .timing import use_device

DEFAULT_METHODS = ["plain_union", "l2rw_ext"]
_FEATURES, _CLASSES, _WORDS = 784, 10, 256


def _mlp(*, n: int = 128, m: int = 32, depth: int = 4, width: int = 512) -> CaseSpec:
    widths = (_FEATURES, *[width] * (depth - 1), _CLASSES)
    title = f"MLP of {depth} layers, width {width}, {n}+{m}"
    return CaseSpec("mlp", title, partial(MLP, *widths), (_FEATURES,), _CLASSES, n, m)


def _gpt(length: int) -> CaseSpec:
    return CaseSpec(
        "gpt",
        f"GPT of width 128, 2 layers, {length} tokens, 16+8",
        partial(GPT, _WORDS, length, 128, 2),
        (length,),
        _WORDS,
        16,
        8,
        attention=True,
        tokens=True,
    )


@dataclass(frozen=True)
class Sweep:
    """A size that grows, and the case at each of its values."""

    axis: str
    values: tuple[float, ...]
    case: Callable[[Any], CaseSpec]


SWEEPS = {
    "n": Sweep("n, with m = n/4", (32, 64, 128, 256, 512), lambda n: _mlp(n=n, m=n // 4)),
    "share": Sweep(
        "m/n, with n = 128", (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1), lambda r: _mlp(m=int(128 * r))
    ),
    "depth": Sweep("layers", (2, 4, 8, 16, 32), lambda depth: _mlp(depth=depth)),
    "width": Sweep("width", (128, 256, 512, 1024, 2048), lambda width: _mlp(width=width)),
    "length": Sweep("tokens", (16, 32, 64, 128, 256), _gpt),
}


def table(axis: str, entries: Sequence[dict[str, Any]]) -> Table:
    """One sweep as a table: milliseconds and MiB, each over the plain step's."""
    out = Table(title=axis, title_justify="left")
    out.add_column("method", no_wrap=True)
    for name in ("at", "ms", "ratio", "MiB", "ratio"):
        out.add_column(name, justify="right", no_wrap=True)
    labels = {row["name"]: row["label"] for entry in entries for row in entry["step"]["methods"]}
    for name, sizes in growth(list(entries)).items():
        for value, found in sizes.items():
            out.add_row(
                labels.get(name, name),
                f"{value:g}",
                f"{1e3 * found['seconds']:.2f}" if "seconds" in found else "-",
                f"{found['time']:.2f}" if "time" in found else "-",
                f"{found['bytes'] / 2**20:.1f}" if "bytes" in found else "-",
                f"{found['memory']:.2f}" if "memory" in found else "-",
            )
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``scaling``."""
    parser.add_argument("--sweep", nargs="+", choices=list(SWEEPS), dest="sweeps")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), metavar="NAME", default=DEFAULT_METHODS
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:K")
    parser.add_argument("--repeats", type=provenance.positive, default=15)
    parser.add_argument("--threads", type=provenance.positive, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="the two smallest sizes, to see that it works"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="record the results")
    parser.epilog = f"methods: {', '.join(METHODS)}."


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status is 1 where a step of this package is wrong or fails."""
    provenance.check_device(args.device)
    use_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    methods = chosen(args.methods)
    report = provenance.header("scaling", args.device, sys.argv[1:])
    report |= {"allocator": memory.ALLOCATOR, "cases": [], "complete": False}
    console = Console()
    for name in args.sweeps or SWEEPS:
        sweep = SWEEPS[name]
        entries: list[dict[str, Any]] = []
        for value in sweep.values[: 2 if args.quick else None]:
            spec = sweep.case(value)
            with console.status(spec.title):
                timed = step.run_case(spec, methods, repeats=args.repeats, device=args.device)
                held = memory.run_case(spec, methods, device=args.device, threads=args.threads)
            entries.append({"axis": sweep.axis, "value": value, "step": timed, "memory": held})
            report["cases"].append(entries[-1])
            if args.json:
                provenance.write(args.json, report)
        console.print(table(sweep.axis, entries))
    provenance.complete(args.json, report, console)
    ours = [
        row
        for entry in report["cases"]
        for part in ("step", "memory")
        for row in entry[part]["methods"]
        if row["name"].startswith("l2rw_ext")
    ]
    return 1 if any("failed" in r or r.get("status", "ok") != "ok" for r in ours) else 0
