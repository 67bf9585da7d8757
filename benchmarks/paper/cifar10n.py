"""CIFAR-10N, ResNet-32: the labels that people gave. Not an experiment of the paper."""

from __future__ import annotations

import argparse

from .human import KINDS
from .tables import FULL, Experiment, Row, add_cifar, add_rows

BASELINE = Row("baseline", "baseline")
HUMAN = Experiment(
    name="cifar10n",
    title="Labels by people",
    task="human",
    model="resnet-32",
    schedule=FULL,
    clean={"cifar10": 1000},
    rows=(
        BASELINE,
        Row("random", "random"),
        Row("reed hard", "reed hard"),
        Row("s-model", "s-model"),
        Row("s-model +conf", "s-model", transition="baseline"),
        Row("clean only", "clean only"),
        BASELINE.tuned(),
        Row("ours", "ours"),
    ),
)
run = HUMAN.run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``cifar10n``."""
    add_cifar(parser, list(HUMAN.clean))
    add_rows(parser, HUMAN, HUMAN.own)
    parser.add_argument(
        "--labels",
        choices=KINDS,
        default="worse_label",
        help="whose labels (default: worse_label, 40%% of them wrong)",
    )
    parser.set_defaults(level=0.0)
