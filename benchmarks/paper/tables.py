"""What the CIFAR experiments share: rows of runs, beside the paper's numbers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from .. import provenance
from ..errors import UsageError
from .grid import Results
from .networks import SHAPES
from .options import add_shared, head, run_grid, scaled, seeds_text, share
from .output import Sheet, finish, without
from .settings import Settings, TaskName
from .splits import BACKGROUNDS
from .statistics import Mean, grouped, mean
from .training_methods import METHODS

FINE_TUNING = 5000


@dataclass(frozen=True)
class Schedule:
    """How many steps, and where the learning rate falls."""

    steps: int
    decays: tuple[int, ...]


FULL = Schedule(80_000, (40_000, 60_000))
SHORT = Schedule(60_000, (40_000, 50_000))


@dataclass(frozen=True)
class Preset:
    """At which size the tables and their figures are run.

    Attributes:
        model: a name that ``make_model`` takes; without one, the table's.
        images: to train on, beside the clean and the hyper-validation images; 0 means the rest.
        validation: hyper-validation images.
        batch: training images in a step; clean images too.
        scale: what the paper's schedules are shortened by.
        lr: initial learning rate.
        augment: random crops and flips.
    """

    model: str
    images: int
    validation: int
    batch: int
    scale: float
    lr: float
    augment: bool


PRESETS = {
    "paper": Preset(
        model="", images=0, validation=5000, batch=100, scale=1.0, lr=0.1, augment=True
    ),
    "cpu": Preset(
        model="convnet", images=4000, validation=1000, batch=50, scale=0.05, lr=0.02, augment=False
    ),
}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: as the command line and the table have it.
        method: what is run; None where only the paper's number is shown.
        paper: test accuracy in percent and half the width of its 95% interval, by data set.
        schedule: of the run; without one, the table's.
        finetune: steps on clean images at the end.
        continues: the row that this one continues after its last step.
        transition: the row whose confusion of labels the method starts from.
    """

    name: str
    method: str | None
    paper: dict[str, tuple[float, float]] = field(default_factory=dict)
    schedule: Schedule | None = None
    finetune: int = 0
    continues: str = ""
    transition: str = ""

    def tuned(self, paper: dict[str, tuple[float, float]] | None = None) -> Row:
        """The row that trains on, with clean images."""
        return replace(
            self,
            name=f"{self.name} +ft",
            paper=paper or {},
            finetune=FINE_TUNING,
            continues=self.name,
        )


@dataclass(frozen=True)
class Experiment:
    """A table, and the runs that the figures share with it.

    Attributes:
        name: of the experiment.
        title: what stands above the table.
        task: the corruption.
        model: a name that ``make_model`` takes.
        schedule: of rows that have none of their own.
        clean: clean images of all classes together, by data set.
        rows: from top to bottom.
    """

    name: str
    title: str
    task: TaskName
    model: str
    schedule: Schedule
    clean: dict[str, int]
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """A row by its name; a method that has none is a row of its own."""
        by_name = {row.name: row for row in self.rows}
        return by_name.get(name) or Row(name, name)

    @property
    def own(self) -> list[str]:
        """Names of the rows that can be run."""
        return [row.name for row in self.rows if row.method is not None]

    @property
    def runnable(self) -> list[str]:
        """Names of the rows that can be run, and of the methods that have none."""
        return self.own + [name for name in METHODS if name not in self.own]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The options of the table."""
        add_cifar(parser, list(self.clean))
        add_level(parser)
        add_rows(parser, self, self.own)

    def grid(self, rows: Iterable[str], args: argparse.Namespace, **other: Any) -> list[Settings]:
        """One run for each seed and row, and those that they start from.

        Args:
            rows: names.
            args: the options of :func:`add_cifar`, and ``level``.
            other: settings that differ from what the options say, ``level`` among them.

        Raises:
            UsageError: there is no data root, or there are more seeds than background classes.
        """
        if args.data_root is None:
            raise UsageError(f"{args.data} needs --data-root, a folder with its files")
        asked = dict.fromkeys(start for name in rows for start in self._chain(name))
        return [
            self.settings(name, seed, args, **other) for seed in range(args.seeds) for name in asked
        ]

    def _chain(self, name: str) -> list[str]:
        """The rows that a row starts from, and it."""
        row = self.row(name)
        starts = [start for start in (row.continues, row.transition) if start]
        return [*(early for start in starts for early in self._chain(start)), name]

    def settings(self, name: str, seed: int, args: argparse.Namespace, **other: Any) -> Settings:
        """One run; see :meth:`grid`. A seed has its own split and background class."""
        row = self.row(name)
        assert row.method is not None
        preset = PRESETS[args.preset]
        scale = whole_scale(args)
        schedule = row.schedule or self.schedule
        values: dict[str, Any] = {
            "experiment": self.name,
            "row": row.name,
            "data": args.data,
            "task": self.task,
            "level": args.level,
            "labels": args.labels,
            "method": row.method,
            "seed": seed,
            "model": self._model(args),
            "steps": scaled(schedule.steps, scale),
            "decays": tuple(scaled(step, scale) for step in schedule.decays),
            "finetune": scaled(row.finetune, scale) if row.finetune else 0,
            "batch": preset.batch,
            "clean_batch": preset.batch,
            "lr": preset.lr,
            "weight_decay": 2e-4,
            "clean": args.clean or self.clean[args.data],
            "validation": preset.validation,
            "background": 0,
            "augment": preset.augment,
            "signed": True,
            "authors": args.authors,
            "scale": scale,
            "kept": any(name in (r.continues, r.transition) for r in self.rows),
        }
        if self.task == "background" and "background" not in other:
            values["background"] = _background(args.data, seed)
        found = Settings(**{**values, **other})
        if preset.images:
            found = replace(found, images=preset.images + found.clean + found.validation)
        keys = [
            self.settings(start, seed, args, **other).key if start else ""
            for start in (row.continues, row.transition)
        ]
        return replace(found, continues=keys[0], transition=keys[1])

    def how(self, args: argparse.Namespace) -> str:
        """Model, images, seeds and scale, for the titles of tables."""
        return f"{self._model(args)}, {extent(args)}"

    def _model(self, args: argparse.Namespace) -> str:
        return str(args.model or PRESETS[args.preset].model or self.model)

    def run(self, args: argparse.Namespace) -> int:
        """Train, print the table, write the numbers."""
        console = Console()
        results = run_grid(self.name, self.grid(args.rows, args), args, console)
        found = accuracies(results)
        rows = [
            {
                "row": row.name,
                "data": args.data,
                "noise": args.labels or args.level,
                "seeds": args.seeds,
                "scale": whole_scale(args),
                "accuracy": found[row.name].value if row.name in found else math.nan,
                "half_width_95": found[row.name].half_width if row.name in found else math.nan,
                "paper": row.paper.get(args.data, _UNKNOWN)[0],
                "paper_half_width_95": row.paper.get(args.data, _UNKNOWN)[1],
            }
            for row in self._shown(found)
        ]
        stem = args.out / self.name / f"{self.name}-{named(args)}-{rows[0]['noise']}"
        report = {**head(self.name, results, args), "runs": without(results, "origins")}
        return finish(console, stem, self.table(found, args), report, rows)

    def _shown(self, found: Iterable[str]) -> list[Row]:
        """The rows of the table, and those that were run beside."""
        names = {row.name for row in self.rows}
        return [*self.rows, *(self.row(name) for name in found if name not in names)]

    def table(self, found: dict[str, Mean], args: argparse.Namespace) -> Sheet:
        """All rows; those that were not run have the paper's number alone."""
        noise = args.labels or f"{args.level:.0%} flipped"
        out = Sheet(
            f"{self.title}, {noise}, {args.clean or self.clean[args.data]} clean images: test "
            f"accuracy in percent on {args.data}, {self.how(args)}",
            ("", "measured", "paper"),
        )
        for row in self._shown(found):
            measured = found[row.name].text if row.name in found else "not run"
            claim = Mean(*row.paper[args.data]).text if args.data in row.paper else "none"
            out.add(row.name, measured, claim, bold=row.name == "ours")
        return out


_UNKNOWN = (math.nan, math.nan)


def whole_scale(args: argparse.Namespace) -> float:
    """What the paper's schedules are shortened by, by the preset and by ``--scale``."""
    return float(args.scale * PRESETS[args.preset].scale)


def extent(args: argparse.Namespace) -> str:
    """Images, seeds and scale, for the titles of tables."""
    preset = PRESETS[args.preset]
    images = f"{preset.images} training images, " if preset.images else ""
    authors = ", as the authors' code" if args.authors else ""
    return f"{images}{seeds_text(args)}, scale {whole_scale(args):g}{authors}"


def named(args: argparse.Namespace) -> str:
    """The data, and the preset and the clean images where they are not the paper's, for files."""
    preset = "" if args.preset == "paper" else f"-{args.preset}"
    clean = f"-clean{args.clean}" if args.clean else ""
    return f"{args.data}{preset}{clean}"


def _background(data: str, seed: int) -> int:
    if seed >= len(BACKGROUNDS[data]):
        raise UsageError(f"--seeds: the paper has {len(BACKGROUNDS[data])} background classes")
    return BACKGROUNDS[data][seed]


def add_cifar(
    parser: argparse.ArgumentParser, data: Sequence[str], *, seeds: int = 5, clean: bool = True
) -> None:
    """The options of every experiment with the runs of the tables."""
    add_shared(parser, seeds=seeds)
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="paper",
        help="the paper's experiment (default), or cpu: a small net on 4,000 images, minutes a run",
    )
    parser.add_argument("--data", choices=data, default=data[0], help=f"default: {data[0]}")
    parser.add_argument(
        "--model",
        choices=[name for name, shape in SHAPES.items() if shape == (3, 32, 32)],
        help="default: wrn-28-10 for uniform flips, else resnet-32; convnet with --preset cpu",
    )
    if clean:
        parser.add_argument(
            "--clean",
            type=provenance.positive,
            metavar="N",
            help="clean images of all classes together (default: the paper's)",
        )
    else:
        parser.set_defaults(clean=None)
    parser.add_argument(
        "--authors",
        action="store_true",
        help="as the authors' published code departs from the paper: uniform flips draw from all "
        "classes but the last, the clean loss has the weight decay in it",
    )
    parser.set_defaults(labels="")


def add_level(parser: argparse.ArgumentParser) -> None:
    """How many labels flip."""
    parser.add_argument(
        "--level",
        type=share,
        default=0.4,
        metavar="P",
        help="share of flipped labels (default: 0.4)",
    )


def add_rows(parser: argparse.ArgumentParser, table: Experiment, default: list[str]) -> None:
    """Which rows to run."""
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=table.runnable,
        default=default,
        metavar="ROW",
        help=f"of {', '.join(table.runnable)} (default: {', '.join(default)})",
    )


def accuracies(results: Results) -> dict[str, Mean]:
    """Test accuracy after the last step, by row, over the seeds."""
    groups = grouped(results, lambda result: str(result["settings"]["row"]))
    return {row: mean([100 - r["test_error"] for r in group]) for row, group in groups.items()}


def numbers(
    cifar10: float, half_width10: float, cifar100: float, half_width100: float
) -> dict[str, tuple[float, float]]:
    """The paper's numbers of a row, by data set."""
    return {"cifar10": (cifar10, half_width10), "cifar100": (cifar100, half_width100)}
