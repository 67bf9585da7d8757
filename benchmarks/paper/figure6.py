"""Figure 6: confusion matrices on CIFAR under UNIFORMFLIP and BACKGROUNDFLIP."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .grid import Results
from .options import head, run_grid
from .output import Sheet, finish, pyplot, without
from .splits import BACKGROUNDS
from .table1 import UNIFORM
from .table2 import BACKGROUND
from .tables import add_cifar, add_level, extent, named

NAME = "figure6"
ROWS = ("baseline", "ours")
TABLES = {"uniform": UNIFORM, "background": BACKGROUND}
Matrices = dict[tuple[str, str], Tensor]
"""By corruption and row: the share of each true class (rows) that is taken for each (columns)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``figure6``."""
    add_cifar(parser, ["cifar10", "cifar100"], seeds=1)
    add_level(parser)
    add_tasks(parser)


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Which corruptions."""
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TABLES),
        default=list(TABLES),
        metavar="TASK",
        help=f"of {', '.join(TABLES)} (default: both)",
    )


def run(args: argparse.Namespace) -> int:
    """Train, print the shares on the diagonal, write matrices and figure."""
    console = Console()
    matrices: Matrices = {}
    found: Results = []
    for task in dict.fromkeys(args.tasks):
        other = {"background": BACKGROUNDS[args.data][0]} if task == "background" else {}
        results = run_grid(NAME, TABLES[task].grid(ROWS, args, **other), args, console)
        matrices |= {(task, row): shares(results, row) for row in ROWS}
        found += results
    classes = found[0]["classes"]
    rows = [
        {
            "task": task,
            "row": row,
            "true": classes[true],
            "taken_for": classes[taken],
            "share": cell,
        }
        for (task, row), matrix in matrices.items()
        for true, cells in enumerate(matrix.tolist())
        for taken, cell in enumerate(cells)
    ]
    stem = args.out / NAME / f"{NAME}-{named(args)}"
    report = {**head(NAME, found, args), "runs": without(found, "origins", "curve")}
    sheet = table(matrices, args)
    return finish(console, stem, sheet, report, rows, picture(matrices, classes))


def shares(results: Results, row: str) -> Tensor:
    """The confusion matrix over the test images of all seeds of a row, each row summing to one."""
    found = [torch.tensor(r["confusion"]) for r in results if r["settings"]["row"] == row]
    counts = torch.stack(found).sum(0).double()
    return counts / counts.sum(1, keepdim=True)


def table(matrices: Matrices, args: argparse.Namespace) -> Sheet:
    """How much lies on the diagonal, and the largest cell beside it."""
    out = Sheet(
        f"Confusion on {args.data}, {args.level:.0%} flipped, {extent(args)}",
        ("flips", "", "right, %", "largest confusion, %"),
        names=2,
    )
    for (task, row), matrix in matrices.items():
        right = matrix.diagonal()
        wrong = matrix - right.diag()
        numbers = (f"{100 * right.mean():.2f}", f"{100 * wrong.max():.2f}")
        out.add(task, row, *numbers, bold=row == "ours")
    return out


def picture(matrices: Matrices, classes: list[str]) -> Any:
    """One panel for each corruption and row."""
    tasks = list(dict.fromkeys(task for task, _ in matrices))
    size = (4.2 * len(ROWS), 3.8 * len(tasks))
    figure, panels = pyplot().subplots(
        len(tasks), len(ROWS), figsize=size, layout="constrained", squeeze=False
    )
    for line, task in zip(panels, tasks, strict=True):
        for panel, row in zip(line, ROWS, strict=True):
            image = panel.imshow(matrices[task, row].numpy(), vmin=0, vmax=1, cmap="Blues")
            panel.set(title=f"{row}, {task} flips", xlabel="taken for", ylabel="true class")
            if len(classes) <= 10:
                panel.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
                panel.set_yticks(range(len(classes)), classes, fontsize=7)
    figure.colorbar(image, ax=panels, shrink=0.6)
    return figure
