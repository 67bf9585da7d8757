"""Figure 7: training curves of a ResNet-32 on CIFAR under BACKGROUNDFLIP."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .grid import Results
from .options import run_grid
from .output import pyplot, without, write_figure, write_tables
from .statistics import Mean, mean
from .table2 import BACKGROUND
from .tables import add_cifar, add_level, add_rows

NAME = "figure7"
ROWS = ["baseline", "s-model", "ours"]
KINDS = {"accuracy": "-", "training_accuracy": ":"}
Curves = dict[str, dict[int, dict[str, Mean]]]
"""By row and step: accuracy on held-out images and on training images, over the seeds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``figure7``."""
    add_cifar(parser, list(BACKGROUND.clean), seeds=1)
    add_level(parser)
    add_rows(parser, BACKGROUND, ROWS)


def run(args: argparse.Namespace) -> int:
    """Train, print best and last accuracy, write curves and figure."""
    console = Console()
    results, report = run_grid(NAME, BACKGROUND.grid(args.rows, args), args, console)
    curves = summary(results)
    console.print(table(curves, args))
    rows = [
        {
            "row": row,
            "step": step,
            **{kind: point[kind].value for kind in KINDS},
            **{f"{kind}_half_width_95": point[kind].half_width for kind in KINDS},
        }
        for row, points in curves.items()
        for step, point in points.items()
    ]
    stem = args.out / NAME / f"{NAME}-{args.data}"
    runs = without(results, "origin", "confusion")
    written = write_tables(stem, {**report, "runs": runs}, rows)
    written += picture(stem, curves, results)
    console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
    return 0


def summary(results: Results) -> Curves:
    """Means over the seeds at each step that was looked at."""
    groups: dict[str, dict[int, list[dict[str, float]]]] = {}
    for result in results:
        points = groups.setdefault(result["settings"]["row"], {})
        for point in result["curve"]:
            points.setdefault(point["step"], []).append(point)
    return {
        row: {
            step: {kind: mean([point[kind] for point in found]) for kind in KINDS}
            for step, found in points.items()
        }
        for row, points in groups.items()
    }


def table(curves: Curves, args: argparse.Namespace) -> Table:
    """The best accuracy of each row on held-out images, and the last: the gap is overfitting."""
    out = Table(
        title=f"Accuracy in percent on {args.data} while training, {args.level:.0%} flipped, "
        f"{args.seeds} seeds, scale {args.scale:g}",
        title_justify="left",
    )
    for name in ("", "held out: best", "at step", "held out: last", "training labels: last"):
        out.add_column(name, justify="right" if name else "left")
    for row, points in curves.items():
        best = max(points, key=lambda step: points[step]["accuracy"].value)
        last = points[max(points)]
        texts = [points[best]["accuracy"].text, str(best)]
        texts += [last[kind].text for kind in KINDS]
        out.add_row(row, *texts, style="bold" if row == "ours" else None)
    return out


def picture(stem: Path, curves: Curves, results: Results) -> list[Path]:
    """Solid lines for held-out images, by true labels; dotted ones for training labels."""
    figure, axes = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for number, (row, points) in enumerate(curves.items()):
        for kind, line in KINDS.items():
            label = row if kind == "accuracy" else None
            values = [point[kind].value for point in points.values()]
            axes.plot(list(points), values, line, color=f"C{number}", label=label)
    for decay in results[0]["settings"]["decays"]:
        axes.axvline(decay, color="0.8", linewidth=0.8)
    axes.set_xlabel("step; the learning rate falls at the grey lines")
    axes.set_ylabel("accuracy, %; dotted: of training labels")
    axes.legend()
    return write_figure(stem, figure)
