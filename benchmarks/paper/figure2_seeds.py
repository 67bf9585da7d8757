"""Figure 2 looked into: which seeds decide about the error of ours, and the course of its runs."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

from rich.console import Console

from .. import provenance
from .figure2 import RATIOS, add_task, common, one
from .grid import Results
from .options import add_shared, head, run_grid
from .output import Sheet, finish, pyplot, without
from .settings import Settings

NAME = "figure2-seeds"
PANELS = {
    "error": "test error, %",
    "clean_loss": "loss of the clean images",
    "weighed": "examples with weight, %",
}
Errors = dict[tuple[int, int], float]
"""Error in percent by the seed of the images and the seed of the run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``figure2-seeds``."""
    add_shared(parser, seeds=5)
    parser.add_argument(
        "--runs",
        type=provenance.positive,
        metavar="N",
        help="runs of each draw of the images, seeds 0 to N-1 (default: as --seeds)",
    )
    parser.add_argument(
        "--ratio",
        type=provenance.positive,
        default=RATIOS[-1],
        metavar="R",
        help=f"9s for each 4 (default: {RATIOS[-1]})",
    )
    add_task(parser)


def settings(args: argparse.Namespace) -> list[Settings]:
    """Ours, for each pair of a seed of the images and a seed of parameters and batches."""
    return [
        replace(
            one(args, args.ratio, "ours", seed), experiment=NAME, traced=True, split_seed=images
        )
        for images in range(args.seeds)
        for seed in range(args.runs or args.seeds)
    ]


def run(args: argparse.Namespace) -> int:
    """Train, print the errors by both seeds, write the courses and the figure."""
    console = Console()
    results = run_grid(NAME, settings(args), args, console)
    errors = {
        (r["settings"]["split_seed"], r["settings"]["seed"]): r["test_error"] for r in results
    }
    training = {
        where: statistics.fmean(r["training_class_errors"])
        for where, r in zip(errors, results, strict=True)
    }
    rows = [
        {"images": i, "seed": s, "error": error, "training_error": training[i, s]}
        for (i, s), error in errors.items()
    ]
    shared = common(results)
    stem = args.out / NAME / f"{NAME}-{shared['model']}"
    runs = without(results, "origins", "confusion")
    report = {**head(NAME, results, args), "settings": shared, "runs": runs}
    sheet = table(errors, training, shared, args)
    return finish(console, stem, sheet, report, rows, picture(results))


def table(
    errors: Errors, training: Errors, shared: dict[str, Any], args: argparse.Namespace
) -> Sheet:
    """A row for each draw of the images, a column for each run; how far the means scatter.

    The last column is of the run that its user would keep by the training images, whose labels are
    right: the one with the smallest mean of the errors of the classes there.
    """
    draws, runs = range(args.seeds), range(args.runs or args.seeds)
    rows = []
    for i in draws:
        of_runs = [errors[i, s] for s in runs]
        kept = errors[i, min(runs, key=lambda s: training[i, s])]
        rows.append([*of_runs, statistics.fmean(of_runs), kept])
    means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    scatter = ""
    if min(len(draws), len(runs)) > 1:
        by_images = statistics.stdev(row[len(runs)] for row in rows)
        by_seed = statistics.stdev(means[: len(runs)])
        scatter = (
            f"Standard deviation of the means: {by_images:.2f} between draws of the images, "
            f"{by_seed:.2f} between parameters and batches."
        )
    columns = [*(f"run {s}" for s in runs), *(["mean", "kept"] if len(runs) > 1 else [])]
    out = Sheet(
        f"Ours, 4 against 9 on {shared['data']} at {args.ratio:g}:1, {shared['model']}, "
        f"{shared['steps']} steps, scale {args.scale:g}: test error in percent",
        ["images drawn by seed", *columns],
        caption=scatter,
    )
    for name, row in zip([*map(str, draws), "mean"], [*rows, means], strict=True):
        out.add(name, *(f"{value:.2f}" for value in row[: len(columns)]))
    return out


def picture(results: Results) -> Any:
    """The course of each run, and its last errors by class; a draw of the images has a colour."""
    figure, panels = pyplot().subplots(2, 2, figsize=(9, 6), layout="constrained")
    courses = dict(zip(PANELS, panels.flat, strict=False))
    for result in results:
        images, points = result["settings"]["split_seed"], result["curve"]
        color, label = f"C{images}", None
        if result["settings"]["seed"] == 0:
            label = f"images {images}"
        for name, axes in courses.items():
            values = [value(point, name) for point in points]
            axes.plot([point["step"] for point in points], values, color=color, linewidth=0.8)
        panels[1, 1].scatter(*result["class_errors"], color=color, s=20, label=label)
    for name, axes in courses.items():
        axes.set(xlabel="step", ylabel=PANELS[name])
    courses["error"].set_ylim(0, 15)
    courses["clean_loss"].set_yscale("log")
    panels[1, 1].set(xlabel="last error of the 4s, %", ylabel="last error of the 9s, %")
    panels[1, 1].legend(fontsize=7)
    return figure


def value(point: dict[str, float], name: str) -> float:
    """A number of a point of the curve."""
    return 100 - point["accuracy"] if name == "error" else point[name]
