"""Figure 4: BACKGROUNDFLIP to label 3 on CIFAR, test accuracy over the size of the clean set."""

from __future__ import annotations

from .. import provenance
from .sweep import Sweep

SWEEP = Sweep(
    name="figure4",
    title="40% flipped to label 3, by number of clean images",
    setting="clean",
    option="--sizes",
    kind=provenance.positive,
    values=(15, 50, 100, 500, 1000, 2000),
    label="clean images, all classes together",
    rows=("baseline +ft", "baseline +es +ft", "ours"),
    fixed={"background": 3},
    paper="The paper: ours loses 2 points with 15 clean images, and gains nothing above 100; fine-"
    "tuning needs about 1,000 to catch up.",
    log=True,
)
add_arguments = SWEEP.add_arguments
run = SWEEP.run
