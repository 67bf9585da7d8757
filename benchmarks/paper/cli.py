"""The command line of ``python -m benchmarks paper``: one subcommand for each experiment."""

from __future__ import annotations

import argparse
import importlib
import sys
from types import ModuleType

from .grid import TimeIsUpError

EXPERIMENTS = {
    "figure2": "MNIST 4 against 9: test error over imbalance, all methods",
    "figure2-seeds": "Figure 2 looked into: which seeds decide, and the course of the runs",
    "table1": "CIFAR, labels flipped to any class: test accuracy, WRN-28-10",
    "table2": "CIFAR, labels flipped to one class: test accuracy, ResNet-32",
    "cifar10n": "CIFAR-10 with labels by people: test accuracy, ResNet-32",
    "figure3": "weights of clean and flipped images that the model has not seen; AUROC",
    "figure4": "CIFAR, labels flipped to one class: test accuracy over the size of the clean set",
    "figure5": "CIFAR, labels flipped to one class: test accuracy over the share of flips",
    "figure6": "CIFAR: confusion matrices",
    "figure7": "CIFAR, labels flipped to one class: training curves",
    "lemma1": "does the clean loss fall at every step, where L and sigma are known",
    "theorem2": "the rate of convergence, where L and sigma are known",
}
WITHOUT_CHECKPOINTS = {"lemma1", "theorem2"}
INTERRUPTED = 130


def experiment(name: str) -> ModuleType:
    """The module of an experiment."""
    return importlib.import_module(f".{name.replace('-', '_')}", __package__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each experiment."""
    commands = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, help_text in EXPERIMENTS.items():
        module = experiment(name)
        module.add_arguments(commands.add_parser(name, help=help_text, description=module.__doc__))


def run(args: argparse.Namespace) -> int:
    """Run the experiment; after Ctrl-C or the given minutes, say how to go on."""
    module = experiment(args.experiment)
    try:
        return int(module.run(args))
    except TimeIsUpError as summary:
        print(summary)
        return 0
    except KeyboardInterrupt:
        again = "starts anew"
        if args.experiment not in WITHOUT_CHECKPOINTS:
            again = f"continues from the checkpoints in {args.out}"
        print(f"\nStopped by Ctrl-C; the same command {again}.", file=sys.stderr)
        return INTERRUPTED
