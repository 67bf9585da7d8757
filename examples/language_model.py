"""Fine-tune a small language model towards 48 sequences: plain, mixed in, top-k, ours, and costs.

    python examples/language_model.py

The text is Python's: pages of help(), the target, and a pool of sources and a tenth of such pages.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from pathlib import Path
from pydoc_data.topics import topics
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import Reweighter, weighing

LENGTH, WIDTH, LAYERS, BATCH, PROSE = 128, 64, 2, 32, 0.1  # PROSE is its share of the pool
ENDS = 128, 384, 528  # of validation and test sequences, and of target sets of 48 for each seed
PRETRAINING, STEPS, EVERY, LEARNING_RATES = 1500, 120, 30, (3e-3, 1e-3)
OURS = {"top-k": {"weighing": weighing.top_k(8)}, "ours": {}, "ours, every 4": {"every": 4}}
METHODS, SEEDS = ("plain", "target only", "target mixed in", *OURS), (0, 1, 2)


class LanguageModel(nn.Module):
    """Logits of the bytes that follow the first, the second, ..., shape (n, LENGTH, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(128, WIDTH))
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        block = nn.TransformerEncoderLayer(WIDTH, 4, 256, 0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, LAYERS, nn.LayerNorm(WIDTH), False)
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, text: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        x = F.embedding(text[:, :-1], self.token) + self.position
        return self.head(self.blocks(x, mask=causal, is_causal=True))


def losses(logits: Tensor, text: Tensor) -> Tensor:
    """One loss a sequence, shape (n,): the mean over its positions."""
    return F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none").mean(1)


def backward(method: str, reweighter: Reweighter, batch: Tensor, target: Tensor) -> Tensor:
    """Leave a gradient in the model, and return the weights of the batch."""
    if method in OURS:
        return reweighter.backward((batch, batch), (target, target)).weights
    mixed = torch.cat([batch, target[torch.randint(len(target), (4,))]])
    text = {"plain": batch, "target only": target}.get(method, mixed)
    losses(reweighter.model(text), text).mean().backward()
    return torch.full((BATCH,), 0 if method == "target only" else 1 / len(text))


def train(models: dict, data: list[Tensor], target: Tensor, steps: int, rate: float) -> dict:
    """Train by turns on the same batches; times, weights of prose, held-out perplexities."""
    pool, is_prose, *parts = data
    runs, log = {}, {method: ([], [], []) for method in models}
    for method, model in models.items():
        adam, options = torch.optim.Adam(model.parameters()), OURS.get(method, {})
        runs[method] = model, adam, Reweighter(model, losses, preconditioner=adam, **options)
    for k in range(steps):
        index = torch.randint(len(pool), (BATCH,))
        for method, (model, adam, reweighter) in runs.items():
            adam.param_groups[0]["lr"] = rate * min((k + 1) / 50, 1 - k / steps)
            begin = perf_counter()
            adam.zero_grad()
            weights = backward(method, reweighter, pool[index], target)
            adam.step()
            log[method][0].append(perf_counter() - begin)
            log[method][1].append(100 * float(weights[is_prose[index]].sum()))
            if (steps - 1 - k) % EVERY == 0:
                with torch.no_grad():
                    log[method][2].append([float(losses(model(t), t).mean().exp()) for t in parts])
    return log


def compare(prose: str, code: str) -> list[dict]:
    """Print a table of all runs, and return them."""
    cut = [torch.tensor(list(bytes(text, "ascii", "replace"))) for text in (prose, code)]
    text, other = (tokens.unfold(0, LENGTH + 1, LENGTH + 1) for tokens in cut)
    text = torch.cat([text.split(16)[k] for k in torch.randperm(len(text) // 16)])
    *held_out, targets, text = text.tensor_split(ENDS)
    other = other[torch.randperm(len(other))[: round(len(text) * (1 / PROSE - 1))]]
    data = [torch.cat([text, other]), torch.arange(len(text) + len(other)) < len(text), *held_out]
    start, runs = {"plain": LanguageModel()}, []
    before = train(start, data, targets, PRETRAINING, LEARNING_RATES[0])["plain"][2][-1][1]
    for seed, target in zip(SEEDS, targets.chunk(len(SEEDS)), strict=True):
        torch.manual_seed(seed)
        models = {method: deepcopy(start["plain"]) for method in METHODS}
        runs.append(train(models, data, target, STEPS, LEARNING_RATES[1]))
    print(f"test perplexity of {len(SEEDS)} seeds: mean, lowest and highest; before: {before:.2f}")
    print(f"{'':18}at the end          at the best step    prose, %    time")
    for method in METHODS:
        seconds, weight, seen = zip(*[run[method] for run in runs], strict=True)
        found = [looks[-1][1] for looks in seen], [min(looks)[1] for looks in seen]
        time = np.sum(seconds) / np.sum([run["plain"][0] for run in runs])
        ends, best = (f"{np.mean(v):<6.2f}{min(v):6.2f}{max(v):6.2f}" for v in found)
        print(f"{method:<18}{ends}  {best}{np.mean(weight):8.0f}{time:8.2f}")
    return runs


def main() -> None:
    """Read the text, in which a paragraph may stand twice, and compare."""
    torch.set_num_threads(1)  # more only wait for each other in a network so small
    torch.manual_seed(0)
    prose = dict.fromkeys(part for page in topics.values() for part in page.split("\n\n"))
    files = sorted(Path(inspect.__file__).parent.glob("*.py"))
    compare("\n\n".join(prose), "".join(path.read_text("utf-8", "replace") for path in files))


if __name__ == "__main__":
    main()
