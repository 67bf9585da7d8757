"""Figure 2: 4 against 9 on MNIST, test error over how rare the 4s are."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from rich.console import Console

from .. import provenance
from .grid import Results
from .options import add_methods, add_shared, head, run_grid, scaled, seeds_text, setting
from .output import Sheet, error_bars, finish, pyplot
from .settings import Settings
from .statistics import Mean, grouped, mean
from .training_methods import METHODS

NAME = "figure2"
COMPARED = ["proportion", "resample", "hard mining", "random", "baseline", "ours"]
RATIOS = (1, 50, 100, 200)
STEPS = 8000
IMAGES, FEW_IMAGES = 5000, 400
FEW_RATIOS = (1, 10, 20)
PAPER = {"ours": "about 2"}
PAPER_OTHERS = "far more"
Cells = dict[tuple[str, float], tuple[Mean, Mean]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``figure2``."""
    add_shared(parser, seeds=5)
    parser.add_argument(
        "--seeds-below",
        type=provenance.positive,
        metavar="N",
        help="seeds 0 to N-1 at all ratios but the largest (default: as --seeds)",
    )
    add_methods(parser, COMPARED)
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=provenance.positive,
        metavar="R",
        help="9s for each 4 (default: 1 50 100 200; without --data-root 1 10 20)",
    )
    add_task(parser)


def add_task(parser: argparse.ArgumentParser) -> None:
    """How many images, which net, and any other setting."""
    parser.add_argument(
        "--images",
        type=provenance.positive,
        metavar="N",
        help="training images, clean ones included (default: 5000; without --data-root 400)",
    )
    parser.add_argument(
        "--model",
        choices=("lenet-authors", "lenet-wide", "lenet"),
        help="the net of the authors' code (default), the same as PyTorch initializes it, or a "
        "smaller one (default without --data-root)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        type=setting,
        default=[],
        metavar="NAME=VALUE",
        help="other settings of all runs, such as lr=0.01, signed=true or clean=20; give each its "
        "own --out",
    )


def settings(args: argparse.Namespace) -> list[Settings]:
    """One run for each ratio, seed and method."""
    ratios = args.ratios or (FEW_RATIOS if args.data_root is None else RATIOS)
    return [
        one(args, ratio, method, seed)
        for seed in range(max(seeds(args, True), seeds(args, False)))
        for ratio in ratios
        if seed < seeds(args, ratio == max(ratios))
        for method in args.methods
    ]


def one(args: argparse.Namespace, ratio: float, method: str, seed: int) -> Settings:
    """A run: the paper's schedule, and the momentum of the authors' code.

    The ten clean images are split off the training images for the methods that ask for them; the
    others train on them too, as the paper says that its method has no more data.
    """
    small = args.data_root is None
    found = Settings(
        experiment=NAME,
        data="digits" if small else "mnist",
        task="imbalance",
        level=ratio,
        method=method,
        seed=seed,
        model=args.model or ("lenet" if small else "lenet-authors"),
        steps=scaled(STEPS, args.scale),
        batch=100,
        clean_batch=10,
        lr=1e-3,
        images=args.images or (FEW_IMAGES if small else IMAGES),
        clean=10,
        clean_in_training=True,
        scale=args.scale,
    )
    return replace(found, **dict(args.set))


def run(args: argparse.Namespace) -> int:
    """Train, print the table, write numbers and figure."""
    console = Console()
    results = run_grid(NAME, settings(args), args, console)
    cells = summary(results)
    stem = args.out / NAME / NAME
    ratios = sorted({ratio for _, ratio in cells})
    rows = [
        {
            "data": results[0]["settings"]["data"],
            "method": method,
            "ratio": ratio,
            "seeds": seeds(args, ratio == ratios[-1]),
            "scale": args.scale,
            "error": error.value,
            "half_width_95": error.half_width,
            "error_of_4s": rare.value,
        }
        for (method, ratio), (error, rare) in cells.items()
    ]
    runs = [
        {
            **{k: r["settings"][k] for k in ("method", "level", "seed")},
            **{k: r[k] for k in ("test_error", "class_errors", "counts", "seconds")},
        }
        for r in results
    ]
    shared = common(results)
    report = {**head(NAME, results, args), "settings": shared, "runs": runs}
    return finish(console, stem, table(cells, shared, args), report, rows, picture(cells))


def seeds(args: argparse.Namespace, largest: bool) -> int:
    """How many at a ratio, which is the largest or not."""
    return int(args.seeds if largest else args.seeds_below or args.seeds)


def common(results: Results) -> dict[str, Any]:
    """The settings that all runs share."""
    first = results[0]["settings"]
    return {k: v for k, v in first.items() if all(r["settings"][k] == v for r in results)}


def summary(results: Results) -> Cells:
    """Error of all test images and of the 4s, by method and ratio, over the seeds."""
    groups = grouped(results, lambda r: (r["settings"]["method"], r["settings"]["level"]))
    return {
        where: (
            mean([r["test_error"] for r in group]),
            mean([r["class_errors"][0] for r in group]),
        )
        for where, group in groups.items()
    }


def table(cells: Cells, shared: dict[str, Any], args: argparse.Namespace) -> Sheet:
    """Errors by method and ratio, and by how much they rise, beside what the paper says."""
    methods = [m for m in METHODS if any(m == method for method, _ in cells)]
    ratios = sorted({ratio for _, ratio in cells})
    heads = [f"{ratio:g}:1" for ratio in ratios]
    rises = len(ratios) > 1
    few = "" if seeds(args, False) == args.seeds else f" ({args.seeds_below} below {heads[-1]})"
    out = Sheet(
        f"4 against 9 on {shared['data']}, {shared['model']}, {shared['images']} images, "
        f"{shared['steps']} steps, scale {args.scale:g}: test error in percent, {seeds_text(args)}"
        f"{few if rises else ''} ± 95% confidence",
        ["", *heads, *([f"rise to {heads[-1]}", "in the paper"] if rises else [])],
    )
    for method in methods:
        errors = [cells[method, ratio][0] for ratio in ratios]
        texts = [error.text for error in errors]
        if rises:
            rise = f"{errors[-1].value - errors[0].value:.2f}"
            texts += [rise, PAPER.get(method, PAPER_OTHERS)]
        out.add(method, *texts, bold=method == "ours")
    return out


def picture(cells: Cells) -> Any:
    """Error over ratio, with confidence intervals."""
    figure, axes = pyplot().subplots(figsize=(6, 4), layout="constrained")
    found = {where: error for where, (error, _) in cells.items()}
    error_bars(axes, found, [method for method in METHODS if any(method == m for m, _ in found)])
    axes.set_xlabel("9s for each 4 in the training set")
    axes.set_ylabel("test error, %")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure
