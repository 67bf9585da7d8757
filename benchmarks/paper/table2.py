"""Table 2: BACKGROUNDFLIP on CIFAR, ResNet-32, 10 clean images a class."""

from __future__ import annotations

from .tables import FULL, SHORT, Experiment, Row, numbers

BASELINE = Row("baseline", "baseline", numbers(59.54, 2.16, 37.82, 0.69))
EARLY = Row("baseline +es", "baseline", numbers(64.96, 1.19, 39.08, 0.65), SHORT)
WEIGHTED = Row("weighted", "weighted", numbers(79.17, 1.36, 36.56, 0.44))
CONFUSED = Row("s-model +conf", "s-model", numbers(68.93, 1.09, 46.72, 1.87), transition="baseline")
EARLY_CONFUSED = Row(
    "s-model +conf +es",
    "s-model",
    numbers(79.24, 0.56, 54.50, 2.51),
    SHORT,
    transition="baseline +es",
)
BACKGROUND = Experiment(
    name="table2",
    title="BACKGROUNDFLIP",
    task="background",
    model="resnet-32",
    schedule=FULL,
    clean={"cifar10": 100, "cifar100": 1000},
    rows=(
        BASELINE,
        EARLY,
        Row("random", "random", numbers(69.51, 1.36, 36.56, 0.44)),
        WEIGHTED,
        Row("reed soft +es", "reed soft", numbers(63.47, 1.05, 38.44, 0.90), SHORT),
        Row("reed hard +es", "reed hard", numbers(65.22, 1.06, 39.03, 0.55), SHORT),
        Row("s-model", "s-model", numbers(58.60, 2.33, 37.02, 0.34)),
        CONFUSED,
        EARLY_CONFUSED,
        Row("clean only", "clean only", numbers(15.90, 3.32, 8.06, 0.76)),
        BASELINE.tuned(numbers(82.82, 0.93, 54.23, 1.75)),
        EARLY.tuned(numbers(85.19, 0.46, 55.22, 1.40)),
        WEIGHTED.tuned(numbers(85.98, 0.47, 53.99, 1.62)),
        CONFUSED.tuned(numbers(81.90, 0.85, 53.11, 1.33)),
        EARLY_CONFUSED.tuned(numbers(85.86, 0.63, 55.75, 1.26)),
        Row("ours", "ours", numbers(86.73, 0.48, 59.30, 0.60)),
    ),
)
add_arguments = BACKGROUND.add_arguments
run = BACKGROUND.run
