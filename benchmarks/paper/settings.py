"""What defines a run: two runs of equal settings give equal numbers on the same machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

TaskName = Literal["imbalance", "uniform", "background", "human"]


@dataclass(frozen=True)
class Settings:
    """One training run.

    Attributes:
        experiment: the experiment that it is part of.
        data: name of the data set, as ``data.load`` takes it.
        task: the corruption.
        level: how strong it is: majority images for each minority image, or the share of flips.
        labels: which of the labels by people, where the task is ``human``.
        method: name of a method.
        seed: of the initial parameters, the order of the batches, the dropout and the split.
        model: name of a model.
        steps: how many steps, already scaled.
        batch: training examples in a step.
        clean_batch: clean examples in a step; all of them where there are not more.
        lr: initial learning rate.
        momentum: of SGD, not Nesterov.
        weight_decay: L2 on matrices and kernels, as the optimizer adds it.
        decays: the steps from which on the learning rate is ten times smaller, each.
        images: training images, clean ones included; 0 means all.
        clean: clean images of all classes together, the same number of each or one more.
        validation: hyper-validation images.
        background: the class that labels flip to, where the task has one.
        clean_in_training: methods that ask for no clean images have them in their training set.
        augment: random crops and flips.
        signed: inputs in [-1, 1] instead of [0, 1].
        finetune: steps on the clean images alone at the end.
        authors: as the authors' published code does it where that departs from the paper.
        direction_decay: of the clean gradient, as the Reweighter takes it; 0 for none.
        diagnosed: at the end the hyper-validation images are weighed too.
        traced: the curve also has the clean loss, its gradient's norm and the weights by class, and
            the result the errors of the classes on all training images.
        split_seed: of the split, where it is not ``seed``.
        kept: other runs start from the state at the end, which stays on disk.
        continues: key of the kept run that this one continues, after its last step.
        transition: key of the kept run whose confusion of labels the method starts from.
        scale: what the schedule was shortened by.
        row: name of the run in its table, where that is not the method's.
    """

    experiment: str
    data: str
    task: TaskName
    level: float
    method: str
    seed: int
    model: str
    steps: int
    batch: int
    clean_batch: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    decays: tuple[int, ...] = ()
    images: int = 0
    clean: int = 10
    validation: int = 0
    background: int = 0
    clean_in_training: bool = False
    augment: bool = False
    signed: bool = False
    finetune: int = 0
    labels: str = ""
    authors: bool = False
    direction_decay: float = 0.0
    diagnosed: bool = False
    traced: bool = False
    split_seed: int | None = None
    kept: bool = False
    continues: str = ""
    transition: str = ""
    scale: float = 1.0
    row: str = ""

    @property
    def key(self) -> str:
        """The run's name among those of its experiment, fit for a file."""
        name = (self.row or self.method).replace(" +", "+").replace(" ", "-")
        level = self.labels or f"{self.level:g}"
        task = f"{self.task}{self.background}" if self.task == "background" else self.task
        clean = f"clean{self.clean}"
        split = "" if self.split_seed is None else f"-split{self.split_seed}"
        return f"{self.data}-{task}-{level}-{clean}-{self.model}-{name}-seed{self.seed}{split}"

    @property
    def split(self) -> tuple[Any, ...]:
        """What the split depends on: runs that agree here have the same images and labels."""
        noise = (self.task, self.level, self.labels, self.background, self.authors)
        return (self.data, *noise, self.images, self.clean, self.validation, self.drawn)

    @property
    def drawn(self) -> int:
        """The seed of the split."""
        return self.seed if self.split_seed is None else self.split_seed

    @property
    def total_steps(self) -> int:
        """Steps of the run, fine-tuning included."""
        return self.steps + self.finetune

    @property
    def parents(self) -> set[str]:
        """Keys of the runs that must be finished before this one begins."""
        return {self.continues, self.transition} - {""}

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it: lists for tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def difference(asked: dict[str, Any], found: object) -> str:
    """Which settings are not the same, in words; empty where all are."""
    if not isinstance(found, dict):
        return "no settings in it"
    names = [k for k in asked if k not in found or found[k] != asked[k]]
    names += [k for k in found if k not in asked]
    return ", ".join(
        f"{name} {found.get(name, 'unknown')} instead of {asked.get(name, 'unknown')}"
        for name in names
    )
