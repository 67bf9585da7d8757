"""Theorem 2: does the smallest mean squared clean gradient fall as 1/√T or faster?

Two problems whose constants are known: logistic regression with 40% flipped labels, and a loss with
a long tail on which training and clean gradient fade together, the slow case. The step size is
1/(Lσ²), in the middle of what makes the clean loss fall for certain.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from typing import Any

from rich.console import Console
from rich.progress import track

from .. import provenance
from ..errors import UsageError
from .convergence import descend, drawn, logistic, tail
from .files import check_writable
from .options import add_descents
from .output import Sheet, finish, pyplot

NAME = "theorem2"
SIZE = 10
FIRST = 16
NOISY, TAIL = "logistic, 40% flipped", "long tail"
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``theorem2``."""
    add_descents(parser, steps=4096)


def run_theorem2(
    seeds: int, steps: int, console: Console
) -> tuple[list[Row], dict[str, list[float]]]:
    """Descend on both problems.

    Returns:
        A row for each problem and T = 16, 32, ... up to ``steps``; and by problem the mean over
        seeds of |∇G(θ_t)|² for t from 0 to T.
    """
    problems = {NOISY: [logistic(0)] * seeds, TAIL: [tail()]}
    runs: dict[str, list[list[float]]] = {NOISY: [], TAIL: []}
    cases = [(name, problem) for name in problems for problem in problems[name]]
    for name, problem in track(cases, "Descending", console=console, transient=True):
        size = min(SIZE, len(problem.train[1]))
        order = drawn(problem, size, steps + 1, len(runs[name]))
        visits = descend(problem, order, problem.largest_step / 2)
        runs[name].append([visit.squared_gradient for visit in visits])
    means = {
        name: [sum(values) / len(values) for values in zip(*curves, strict=True)]
        for name, curves in runs.items()
    }
    lengths = [FIRST << k for k in range((steps // FIRST).bit_length())]
    rows = [
        {
            "problem": name,
            "T": length,
            "smallest_squared_gradient": smallest(values, length),
            "times_sqrt_T": smallest(values, length) * math.sqrt(length),
            "slope": slope(values, length),
        }
        for name, values in means.items()
        for length in lengths
    ]
    return rows, means


def smallest(values: list[float], length: int) -> float:
    """The left side of Eq. 15: the minimum over 0 < t < T."""
    return min(values[1:length])


def slope(values: list[float], length: int) -> float:
    """The derivative d log(minimum) / d log(T) from T/2 to T.

    Eq. 15 has -1/2; less is faster.
    """
    return math.log2(smallest(values, length) / smallest(values, length // 2))


def run(args: argparse.Namespace) -> int:
    """Descend, print the table, write numbers and figure."""
    if args.steps < FIRST:
        raise UsageError(f"--steps: a rate needs at least {FIRST} steps, got {args.steps}")
    console = Console()
    check_writable(args.out / NAME)
    rows, means = run_theorem2(args.seeds, args.steps, console)
    stem = args.out / NAME / NAME
    header = provenance.header(f"paper {NAME}", "cpu", sys.argv[1:])
    report = {**header, "seeds": args.seeds, "rows": rows}
    return finish(console, stem, table(rows, args.seeds), report, rows, picture(means))


def table(rows: list[Row], seeds: int) -> Sheet:
    """The minimum over T, its product with √T, and the slope beside the theorem's -1/2."""
    out = Sheet(
        f"Smallest mean of |∇G|² before step T, over {seeds} seeds",
        ("problem", "T", "min |∇G|²", "times √T", "slope"),
        caption="Theorem 2 says that √T times it stays below a constant, so that the slope comes "
        "to -0.5 or less. The long tail is the same for all seeds.",
    )
    for row in rows:
        out.add(
            row["problem"],
            str(row["T"]),
            f"{row['smallest_squared_gradient']:.3g}",
            f"{row['times_sqrt_T']:.3g}",
            f"{row['slope']:.2f}",
        )
    return out


def picture(means: dict[str, list[float]]) -> Any:
    """Both minima over T, each below the smallest C/√T that bounds it."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    for colour, (name, values) in zip(("tab:blue", "tab:orange"), means.items(), strict=True):
        lengths = range(2, len(values))
        minima = list(itertools.accumulate(values[1:-1], min))
        panel.plot(lengths, minima, color=colour, label=name)
        constant = max(m * math.sqrt(length) for m, length in zip(minima, lengths, strict=True))
        bound = [constant / math.sqrt(length) for length in lengths]
        panel.plot(lengths, bound, ":", color=colour, label=f"{constant:.3g}/√T")
    panel.set(xscale="log", yscale="log", xlabel="T", ylabel="smallest mean of |∇G|² before T")
    panel.legend(fontsize=8)
    return figure
