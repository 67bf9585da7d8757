"""Table 1: UNIFORMFLIP on CIFAR, WRN-28-10, 1,000 clean images."""

from __future__ import annotations

import math

from .tables import SHORT, Experiment, Row, numbers

BASELINE = Row("baseline", "baseline", numbers(67.97, 0.62, 50.66, 0.24))
RANDOM = Row("random", "random", numbers(86.06, 0.32, 58.01, 0.37))
UNIFORM = Experiment(
    name="table1",
    title="UNIFORMFLIP",
    task="uniform",
    model="wrn-28-10",
    schedule=SHORT,
    clean={"cifar10": 1000, "cifar100": 1000},
    rows=(
        BASELINE,
        Row("reed hard", "reed hard", numbers(69.66, 1.21, 51.34, 0.17)),
        Row("s-model", "s-model", numbers(70.64, 3.09, 49.10, 0.58)),
        Row("mentornet, quoted", None, numbers(76.6, math.nan, 56.9, math.nan)),
        RANDOM,
        Row("clean only", "clean only", numbers(46.64, 3.90, 9.94, 0.82)),
        BASELINE.tuned(numbers(78.66, 0.44, 54.52, 0.40)),
        Row("mentornet +ft, quoted", None, numbers(78.0, math.nan, 59.0, math.nan)),
        RANDOM.tuned(numbers(86.55, 0.24, 58.54, 0.52)),
        Row("ours", "ours", numbers(86.92, 0.19, 61.34, 2.06)),
    ),
)
add_arguments = UNIFORM.add_arguments
run = UNIFORM.run
