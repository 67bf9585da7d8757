"""What Tables 1 and 2 share: rows of CIFAR runs, beside the paper's numbers."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ..errors import UsageError
from .grid import Results
from .options import add_shared, run_grid, scaled
from .output import write_tables
from .settings import Settings, TaskName
from .splits import BACKGROUNDS
from .statistics import Mean, mean

FINE_TUNING = 5000
VALIDATION = 5000


@dataclass(frozen=True)
class Schedule:
    """How many steps, and where the learning rate falls."""

    steps: int
    decays: tuple[int, ...]


FULL = Schedule(80_000, (40_000, 60_000))
SHORT = Schedule(60_000, (40_000, 50_000))


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: as the command line and the table have it.
        method: what is run; None where only the paper's number is shown.
        paper: test accuracy in percent and half the width of its 95% interval, by data set.
        schedule: of the run; without one, the table's.
        finetune: steps on clean images at the end.
    """

    name: str
    method: str | None
    paper: dict[str, tuple[float, float]]
    schedule: Schedule | None = None
    finetune: int = 0


@dataclass(frozen=True)
class Experiment:
    """One of the two tables.

    Attributes:
        name: of the experiment.
        title: what stands above the table.
        task: the corruption.
        model: a name that ``make_model`` takes.
        schedule: of rows that have none of their own.
        clean: clean images a class, by data set.
        rows: from top to bottom.
    """

    name: str
    title: str
    task: TaskName
    model: str
    schedule: Schedule
    clean: dict[str, int]
    rows: tuple[Row, ...]

    @property
    def runnable(self) -> list[str]:
        """Names of the rows that can be run."""
        return [row.name for row in self.rows if row.method is not None]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The options of the table."""
        add_shared(parser, seeds=5)
        parser.add_argument(
            "--data", choices=list(self.clean), default="cifar10", help="default: cifar10"
        )
        parser.add_argument(
            "--level", type=float, default=0.4, help="share of flipped labels (default: 0.4)"
        )
        parser.add_argument(
            "--rows",
            nargs="+",
            choices=self.runnable,
            default=self.runnable,
            metavar="ROW",
            help=f"of {', '.join(self.runnable)} (default: all)",
        )

    def settings(self, args: argparse.Namespace) -> list[Settings]:
        """One run for each seed and row; a seed has its own split and background class."""
        if args.data_root is None:
            raise UsageError(f"{args.data} needs --data-root, a folder with its files")
        backgrounds = BACKGROUNDS[args.data]
        if self.task == "background" and args.seeds > len(backgrounds):
            raise UsageError(f"--seeds: the paper has {len(backgrounds)} background classes")
        rows = {row.name: row for row in self.rows}
        return [
            self._settings(rows[name], seed, args)
            for seed in range(args.seeds)
            for name in args.rows
        ]

    def _settings(self, row: Row, seed: int, args: argparse.Namespace) -> Settings:
        assert row.method is not None
        schedule = row.schedule or self.schedule
        background = BACKGROUNDS[args.data][seed] if self.task == "background" else 0
        return Settings(
            experiment=self.name,
            row=row.name,
            data=args.data,
            task=self.task,
            level=args.level,
            method=row.method,
            seed=seed,
            model=self.model,
            steps=scaled(schedule.steps, args.scale),
            decays=tuple(scaled(step, args.scale) for step in schedule.decays),
            finetune=scaled(row.finetune, args.scale) if row.finetune else 0,
            batch=100,
            clean_batch=100,
            lr=0.1,
            weight_decay=2e-4,
            clean=self.clean[args.data],
            validation=VALIDATION,
            background=background,
            augment=True,
            signed=True,
            scale=args.scale,
        )

    def run(self, args: argparse.Namespace) -> int:
        """Train, print the table, write the numbers."""
        console = Console()
        results, report = run_grid(self.name, self.settings(args), args, console)
        found = accuracies(results)
        console.print(self.table(found, args))
        rows = [
            {
                "row": row.name,
                "data": args.data,
                "seeds": args.seeds,
                "scale": args.scale,
                "accuracy": found[row.name].value if row.name in found else math.nan,
                "half_width_95": found[row.name].half_width if row.name in found else math.nan,
                "paper": row.paper[args.data][0],
                "paper_half_width_95": row.paper[args.data][1],
            }
            for row in self.rows
        ]
        runs = [{k: v for k, v in result.items() if k != "origin"} for result in results]
        stem = args.out / self.name / f"{self.name}-{args.data}"
        written = write_tables(stem, {**report, "runs": runs}, rows)
        console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
        return 0

    def table(self, found: dict[str, Mean], args: argparse.Namespace) -> Table:
        """All rows; those that were not run have the paper's number alone."""
        out = Table(
            title=f"{self.title}, {args.level:.0%} flipped: test accuracy in percent on "
            f"{args.data}, {args.seeds} seeds, scale {args.scale:g}",
            title_justify="left",
        )
        out.add_column("")
        out.add_column("measured", justify="right", no_wrap=True)
        out.add_column("paper", justify="right", no_wrap=True)
        for row in self.rows:
            measured = found[row.name].text if row.name in found else "not run"
            claim = Mean(*row.paper[args.data]).text
            out.add_row(row.name, measured, claim, style="bold" if row.name == "ours" else None)
        return out


def accuracies(results: Results) -> dict[str, Mean]:
    """Test accuracy after the last step, by row, over the seeds."""
    groups: dict[str, list[float]] = {}
    for result in results:
        groups.setdefault(result["settings"]["row"], []).append(100 - result["test_error"])
    return {row: mean(values) for row, values in groups.items()}


def numbers(
    cifar10: float, half_width10: float, cifar100: float, half_width100: float
) -> dict[str, tuple[float, float]]:
    """The paper's numbers of a row, by data set."""
    return {"cifar10": (cifar10, half_width10), "cifar100": (cifar100, half_width100)}
