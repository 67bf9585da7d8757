"""Figure 7: training curves of a ResNet-32 on CIFAR under BACKGROUNDFLIP."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from .grid import Results
from .options import head, run_grid
from .output import Sheet, finish, pyplot, without
from .statistics import Mean, grouped, mean
from .table2 import BACKGROUND
from .tables import add_cifar, add_level, add_rows, extent, named

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
    results = run_grid(NAME, BACKGROUND.grid(args.rows, args), args, console)
    curves = summary(results)
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
    stem = args.out / NAME / f"{NAME}-{named(args)}"
    runs = without(results, "origins", "confusion")
    report = {**head(NAME, results, args), "runs": runs}
    return finish(console, stem, table(curves, args), report, rows, picture(curves, results))


def summary(results: Results) -> Curves:
    """Means over the seeds at each step that was looked at."""
    out: Curves = {}
    for row, group in grouped(results, lambda result: str(result["settings"]["row"])).items():
        points = [point for result in group for point in result["curve"]]
        out[row] = {
            step: {kind: mean([point[kind] for point in found]) for kind in KINDS}
            for step, found in grouped(points, lambda point: int(point["step"])).items()
        }
    return out


def table(curves: Curves, args: argparse.Namespace) -> Sheet:
    """The best accuracy of each row on held-out images, and the last: the gap is overfitting."""
    out = Sheet(
        f"Accuracy in percent on {args.data} while training, {args.level:.0%} flipped, "
        f"{extent(args)}",
        ("", "held out: best", "at step", "held out: last", "training labels: last"),
    )
    for row, points in curves.items():
        best = max(points, key=lambda step: points[step]["accuracy"].value)
        last = points[max(points)]
        texts = [points[best]["accuracy"].text, str(best)]
        texts += [last[kind].text for kind in KINDS]
        out.add(row, *texts, bold=row == "ours")
    return out


def picture(curves: Curves, results: Results) -> Any:
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
    return figure
