"""Lemma 1: does the clean loss fall at every step, under the lemma's condition on the step size?

Logistic regression with 40% flipped labels, where L and σ are known. The condition is taken as the
paper states it, and as Cauchy-Schwarz gives it; batches are drawn at random, or repeat one example.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

from rich.console import Console
from rich.progress import track

from .. import provenance
from .convergence import copies, descend, drawn, logistic
from .files import check_writable
from .options import add_descents
from .output import Sheet, finish, pyplot

NAME = "lemma1"
SIZES = (1, 10, 100)
STATED, PROVED = "2n/(Lσ²)", "2/(Lσ²)"
BATCHES = {"random": drawn, "repeated": copies}
ROUNDING = 1e-12
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lemma1``."""
    add_descents(parser, steps=300)


def run_lemma1(
    seeds: int, steps: int, console: Console
) -> tuple[list[Row], dict[str, list[float]]]:
    """Descend under each condition, batch size and kind of batch.

    Returns:
        A row for each of these, with how often the clean loss rose over all seeds; and the clean
        loss of seed 0 over the steps, by condition, batch size and kind of batch.
    """
    rows, curves = [], {}
    cases = list(itertools.product((STATED, PROVED), SIZES, BATCHES))
    for condition, size, batches in track(cases, "Descending", console=console, transient=True):
        runs = [_descent(condition, size, batches, seed, steps) for seed in range(seeds)]
        changes = [b - a for run in runs for a, b in itertools.pairwise(run)]
        rises = [change for change in changes if change > ROUNDING]
        rows.append(
            {
                "step_size": condition,
                "n": size,
                "batches": batches,
                "seeds": seeds,
                "steps": len(changes),
                "rises": len(rises),
                "largest_rise": max(rises, default=0.0),
                "largest_last_loss": max(run[-1] for run in runs),
            }
        )
        curves[f"{condition}, n = {size}, {batches}"] = runs[0]
    return rows, curves


def _descent(condition: str, size: int, batches: str, seed: int, steps: int) -> list[float]:
    """The clean loss before each step, and after the last."""
    problem = logistic(seed)
    step_size = problem.largest_step * {STATED: size, PROVED: 1}[condition]
    order = BATCHES[batches](problem, size, steps + 1, seed)
    return [visit.clean_loss for visit in descend(problem, order, step_size)]


def run(args: argparse.Namespace) -> int:
    """Descend, print the table, write numbers and figure."""
    console = Console()
    check_writable(args.out / NAME)
    rows, curves = run_lemma1(args.seeds, args.steps, console)
    stem = args.out / NAME / NAME
    header = provenance.header(f"paper {NAME}", "cpu", sys.argv[1:])
    report = {**header, "rows": rows, "clean_losses_of_seed_0": curves}
    return finish(console, stem, table(rows), report, rows, picture(curves))


def table(rows: list[Row]) -> Sheet:
    """Rises of the clean loss beside the paper's claim, which is none."""
    out = Sheet(
        f"Steps at which the clean loss rises, {rows[0]['seeds']} seeds",
        ("α", "batches", "n", "rises", "largest", "last loss"),
        caption="Lemma 1 says none for α ≤ 2n/(Lσ²), whatever the batches; Cauchy-Schwarz gives "
        "2/(Lσ²). A repeated batch is one example n times. The loss begins at 0.693.",
        names=2,
    )
    for row in rows:
        out.add(
            row["step_size"],
            row["batches"],
            str(row["n"]),
            f"{row['rises']} of {row['steps']}",
            f"{row['largest_rise']:.2g}",
            f"{row['largest_last_loss']:.3f}",
            bold=bool(row["rises"]),
        )
    return out


def picture(curves: dict[str, list[float]]) -> Any:
    """The clean loss of seed 0 over the steps, one panel for each condition."""
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for panel, condition in zip(panels, (STATED, PROVED), strict=True):
        for name, losses in curves.items():
            if name.startswith(condition):
                style = "-" if name.endswith("random") else "--"
                label = name.removeprefix(f"{condition}, ")
                panel.plot(range(1, len(losses) + 1), losses, style, label=label, linewidth=1)
        panel.set(title=f"α = {condition}", xlabel="step", xscale="log", yscale="log")
        panel.legend(fontsize=8)
    panels[0].set_ylabel("clean loss G, seed 0")
    return figure
