"""Figure 3: weights of clean and flipped images that the model has never seen."""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import replace
from typing import Any

from rich.console import Console

from ..errors import UsageError
from .diagnosis import Columns, auroc
from .figure6 import TABLES, add_tasks
from .grid import Results
from .options import add_shared, head, run_grid, scaled, seeds_text
from .output import Sheet, finish, pyplot, without
from .settings import Settings
from .splits import BACKGROUNDS
from .statistics import Mean, grouped, mean
from .tables import PRESETS, add_level

NAME = "figure3"
STEPS = 8000
SMALL = ("digits", "mnist", "fashion-mnist")
FEW_VALIDATION = 500
CLEAN = {"uniform": 1000, "background": 100}
FEW_CLEAN = {"uniform": 200, "background": 100}
TITLES = {"mixed": "batches of all classes", "single": "batches of one true class"}
KINDS = tuple(TITLES)
MEASURES = ("auroc_of_u", "auroc_of_w", "flipped_without_weight", "clean_without_weight")
Cells = dict[tuple[str, str], dict[str, Mean]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``figure3``."""
    add_shared(parser, seeds=5)
    parser.add_argument(
        "--data",
        choices=[*SMALL, *BACKGROUNDS],
        help="default: mnist; without --data-root, digits",
    )
    add_level(parser)
    add_tasks(parser)
    parser.add_argument(
        "--whole",
        action="store_true",
        help="weigh at the end of all steps; the paper does after half of them",
    )


def settings(args: argparse.Namespace) -> list[Settings]:
    """One run for each corruption and seed; afterwards the hyper-validation images are weighed.

    Models are trained for half of their steps without falling learning rate, as the paper says of
    this figure, or for all of them. CIFAR has the schedule and model of its table, MNIST and
    Fashion-MNIST those of Figure 2.
    """
    data = args.data or ("digits" if args.data_root is None else "mnist")
    build = _small if data in SMALL else _cifar
    tasks = dict.fromkeys(args.tasks)
    runs = [build(data, task, seed, args) for seed in range(args.seeds) for task in tasks]
    if args.whole:
        return runs
    return [replace(run, steps=max(1, run.steps // 2), decays=(), row="ours half") for run in runs]


def _small(data: str, task: Any, seed: int, args: argparse.Namespace) -> Settings:
    few = data == "digits"
    return Settings(
        experiment=NAME,
        data=data,
        task=task,
        level=args.level,
        method="ours",
        seed=seed,
        model="lenet",
        steps=scaled(STEPS, args.scale),
        batch=100,
        clean_batch=100,
        lr=1e-3,
        clean=(FEW_CLEAN if few else CLEAN)[task],
        validation=FEW_VALIDATION if few else PRESETS["paper"].validation,
        background=BACKGROUNDS["cifar10"][seed % 5] if task == "background" else 0,
        diagnosed=True,
        scale=args.scale,
    )


def _cifar(data: str, task: str, seed: int, args: argparse.Namespace) -> Settings:
    plain = {"data": data, "model": None, "clean": None, "authors": False, "labels": ""}
    plain["preset"] = "paper"
    found = TABLES[task].settings("ours", seed, argparse.Namespace(**{**vars(args), **plain}))
    return replace(found, experiment=NAME, diagnosed=True)


def run(args: argparse.Namespace) -> int:
    """Train, weigh, print the table, write numbers and figure."""
    console = Console()
    if not args.level:
        raise UsageError("--level: without flipped labels there is nothing to find")
    results = run_grid(NAME, settings(args), args, console)
    data = results[0]["settings"]["data"]
    cells = summary(results)
    rows = [
        {
            "data": data,
            "task": task,
            "batches": kind,
            "seeds": args.seeds,
            "scale": args.scale,
            **{name: found.value for name, found in measured.items()},
            **{f"{name}_half_width_95": found.half_width for name, found in measured.items()},
        }
        for (task, kind), measured in cells.items()
    ]
    runs = without(results, "origins", "diagnosis", "curve", "confusion")
    for run, result in zip(runs, results, strict=True):
        run["measured"] = {kind: measures(images(result, kind)) for kind in KINDS}
    stem = args.out / NAME / f"{NAME}-{data}{'-whole' if args.whole else ''}"
    report = {**head(NAME, results, args), "runs": runs}
    return finish(console, stem, table(cells, data, args), report, rows, picture(results))


def images(result: dict[str, Any], kind: str) -> Columns:
    """The weighed images; where batches hold one class, those of the background are left out."""
    columns: Columns = result["diagnosis"][kind]
    settings = result["settings"]
    if kind == "mixed" or settings["task"] != "background":
        return columns
    kept = [c != settings["background"] for c in columns["class"]]
    return {name: list(itertools.compress(values, kept)) for name, values in columns.items()}


def measures(columns: Columns) -> dict[str, float]:
    """AUROC of finding flipped labels within a batch, mean over batches; shares without weight."""
    flipped = [bool(wrong) for wrong in columns["flipped"]]
    batches = grouped(range(len(flipped)), lambda k: columns["batch"][k])

    def within(name: str) -> float:
        found = [
            auroc([columns[name][k] for k in where], [flipped[k] for k in where])
            for where in batches.values()
        ]
        return _mean([value for value in found if not math.isnan(value)])

    def without_weight(wrong: bool) -> float:
        weights = [w for w, f in zip(columns["weight"], flipped, strict=True) if f is wrong]
        return _mean([float(w == 0) for w in weights])

    values = (within("score"), within("weight"), without_weight(True), without_weight(False))
    return dict(zip(MEASURES, values, strict=True))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def summary(results: Results) -> Cells:
    """The measures by corruption and kind of batch, over the seeds."""
    found = [(r["settings"]["task"], k, measures(images(r, k))) for r in results for k in KINDS]
    groups = grouped(found, lambda one: one[:2])
    return {
        where: {name: mean([one[name] for _, _, one in group]) for name in MEASURES}
        for where, group in groups.items()
    }


def table(cells: Cells, data: str, args: argparse.Namespace) -> Sheet:
    """How well flipped labels are found; the paper shows histograms and no numbers."""
    out = Sheet(
        f"Finding flipped labels of unseen images, {data}, {args.level:.0%} flipped, "
        f"{'all' if args.whole else 'half'} of the steps, {seeds_text(args)}, scale {args.scale:g}",
        ("flips", "batches", "AUROC of u", "AUROC of w", "flipped: w = 0", "clean: w = 0"),
        caption="Batches are mixed, or hold one true class and what of it flipped.",
        names=2,
    )
    for (task, kind), found in cells.items():
        out.add(task, kind, *(text(found[name]) for name in MEASURES))
    return out


def text(found: Mean) -> str:
    """Three decimals."""
    if math.isnan(found.half_width):
        return f"{found.value:.3f}"
    return f"{found.value:.3f} ± {found.half_width:.3f}"


def picture(results: Results) -> Any:
    """Histograms of the weights of clean and flipped images, over all seeds."""
    tasks = list(dict.fromkeys(result["settings"]["task"] for result in results))
    figure, panels = pyplot().subplots(
        len(tasks), len(KINDS), figsize=(9, 3 * len(tasks)), layout="constrained", squeeze=False
    )
    for line, task in zip(panels, tasks, strict=True):
        chosen = [result for result in results if result["settings"]["task"] == task]
        for panel, kind in zip(line, KINDS, strict=True):
            found = [images(result, kind) for result in chosen]
            largest = max(max(columns["weight"]) for columns in found)
            for wrong, label in ((0, "clean"), (1, "flipped")):
                weights = [
                    w
                    for columns in found
                    for w, f in zip(columns["weight"], columns["flipped"], strict=True)
                    if f == wrong
                ]
                share = [100 / max(1, len(weights))] * len(weights)
                bins = {"bins": 40, "range": (0, largest)}
                panel.hist(weights, **bins, weights=share, alpha=0.6, label=label)
            panel.set(title=f"{task} flips, {TITLES[kind]}", yscale="log")
            panel.set(xlabel="weight times batch size", ylabel="share of images, %")
            panel.legend()
    return figure
