"""Figure 5: BACKGROUNDFLIP on CIFAR, test accuracy over the share of flipped labels."""

from __future__ import annotations

from .options import share
from .sweep import Sweep

SWEEP = Sweep(
    name="figure5",
    title="BACKGROUNDFLIP, by share of flipped labels",
    setting="level",
    option="--levels",
    kind=share,
    values=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    label="share of flipped labels",
    rows=("baseline", "baseline +es", "baseline +es +ft", "ours"),
    fixed={},
    paper="The paper: from 0% to 50%, ours loses 6 points and the baseline more than 40.",
)
add_arguments = SWEEP.add_arguments
run = SWEEP.run
