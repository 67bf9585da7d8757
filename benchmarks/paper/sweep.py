"""BACKGROUNDFLIP on CIFAR over one setting: what Figures 4 and 5 share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from .grid import Results
from .options import head, run_grid
from .output import Sheet, error_bars, finish, pyplot, without
from .settings import Settings
from .statistics import Mean, grouped, mean
from .table2 import BACKGROUND
from .tables import add_cifar, add_rows, named, whole_scale

Cells = dict[tuple[str, float], Mean]


@dataclass(frozen=True)
class Sweep:
    """Accuracy of some rows of Table 2 over one setting; the runs are those of ``table2``.

    Attributes:
        name: of the experiment.
        title: what stands above the table.
        setting: name of the field of :class:`Settings`.
        option: of the command line, for its values.
        kind: argparse type of a value.
        values: the default.
        label: of the axis.
        rows: the default.
        fixed: other settings that differ from the table's.
        paper: what the paper says.
        log: whether the axis is logarithmic.
    """

    name: str
    title: str
    setting: str
    option: str
    kind: Callable[[str], float]
    values: tuple[float, ...]
    label: str
    rows: tuple[str, ...]
    fixed: dict[str, Any]
    paper: str
    log: bool = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The options of the experiment."""
        add_cifar(parser, list(BACKGROUND.clean), seeds=1, clean=self.setting != "clean")
        add_rows(parser, BACKGROUND, list(self.rows))
        parser.set_defaults(level=0.4)
        parser.add_argument(
            self.option,
            dest="values",
            nargs="+",
            type=self.kind,
            default=list(self.values),
            metavar="X",
            help=f"{self.label} (default: {' '.join(f'{value:g}' for value in self.values)})",
        )

    def grid(self, args: argparse.Namespace) -> list[Settings]:
        """One run for each value, seed and row, and those that they start from."""
        return [
            settings
            for value in args.values
            for settings in BACKGROUND.grid(args.rows, args, **self.fixed, **{self.setting: value})
        ]

    def run(self, args: argparse.Namespace) -> int:
        """Train, print the table, write numbers and figure."""
        console = Console()
        results = run_grid(self.name, self.grid(args), args, console)
        cells = self.summary(results)
        rows = [
            {
                "row": row,
                self.setting: value,
                "data": args.data,
                "seeds": args.seeds,
                "scale": whole_scale(args),
                "accuracy": accuracy.value,
                "half_width_95": accuracy.half_width,
            }
            for (row, value), accuracy in cells.items()
        ]
        stem = args.out / self.name / f"{self.name}-{named(args)}"
        runs = without(results, "origins", "curve", "confusion")
        report = {**head(self.name, results, args), "runs": runs}
        return finish(console, stem, self.table(cells, args), report, rows, self.picture(cells))

    def summary(self, results: Results) -> Cells:
        """Test accuracy by row and value, over the seeds."""
        groups = grouped(results, lambda r: (r["settings"]["row"], r["settings"][self.setting]))
        return {
            where: mean([100 - r["test_error"] for r in group]) for where, group in groups.items()
        }

    def table(self, cells: Cells, args: argparse.Namespace) -> Sheet:
        """Accuracy, a row for each method and a column for each value."""
        values = sorted({value for _, value in cells})
        out = Sheet(
            f"{self.title}: test accuracy in percent on {args.data}, {BACKGROUND.how(args)}",
            ["", *(f"{value:g}" for value in values)],
            caption=self.paper,
        )
        for row in dict.fromkeys(row for row, _ in cells):
            texts = [cells[row, value].text for value in values]
            out.add(row, *texts, bold=row == "ours")
        return out

    def picture(self, cells: Cells) -> Any:
        """Accuracy over the setting, with confidence intervals."""
        figure, axes = pyplot().subplots(figsize=(6, 4), layout="constrained")
        error_bars(axes, cells, dict.fromkeys(row for row, _ in cells))
        if self.log:
            axes.set_xscale("log")
        axes.set_xlabel(self.label)
        axes.set_ylabel("test accuracy, %")
        axes.legend()
        return figure
