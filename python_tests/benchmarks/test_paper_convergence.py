"""Experiments on Lemma 1 and Theorem 2 use constants that hold, and write what they found."""

from __future__ import annotations

import csv
import itertools
import json
from argparse import ArgumentParser
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="experiments print tables with rich")
pytest.importorskip("matplotlib", reason="experiments draw figures")

from benchmarks.errors import UsageError
from benchmarks.paper import lemma1, theorem2
from benchmarks.paper.convergence import Problem, copies, descend, drawn, logistic, tail

PROBLEMS = {"logistic": logistic(3), "tail": tail()}


def gradients(problem: Problem, examples: tuple[Tensor, Tensor], theta: Tensor) -> Tensor:
    """The gradient of each example's loss, one at a time, shape (n, d)."""
    rows = []
    for x, y in zip(*examples, strict=True):
        leaf = theta.clone().requires_grad_()
        rows.append(
            torch.autograd.grad(problem.loss_fn((x @ leaf).view(1, 1), y.view(1)).sum(), leaf)[0]
        )
    return torch.stack(rows)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_constants_hold(name: str) -> None:
    problem = PROBLEMS[name]
    generator = torch.Generator().manual_seed(0)
    width = problem.clean[0].shape[1]
    some = tuple(part[-50:] for part in problem.train)
    assert len(some) == 2
    norms, quotients = [], []
    for scale in (0.01, 0.1, 1.0, 10.0):
        a, b = (
            torch.rand(width, generator=generator, dtype=torch.float64) * scale for _ in range(2)
        )
        if name == "logistic":
            a, b = a - scale / 2, b - scale / 2
        norms.append(gradients(problem, some, a).norm(dim=1).max())
        change = gradients(problem, problem.clean, a) - gradients(problem, problem.clean, b)
        quotients.append(change.mean(0).norm() / (a - b).norm())
    assert max(norms) <= problem.bound
    assert max(quotients) <= problem.smoothness
    # Neither constant is generous: both are nearly met where the losses are steepest.
    at_zero = torch.zeros(width, dtype=torch.float64)
    assert gradients(problem, some, at_zero).norm(dim=1).max() >= 0.4 * problem.bound
    assert max(quotients) >= 0.1 * problem.smoothness


def test_a_step_is_the_one_of_the_lemma() -> None:
    problem = PROBLEMS["logistic"]
    batches = list(drawn(problem, 7, 4, seed=1))
    visits = list(descend(problem, iter(batches), 3.0))
    theta = torch.zeros(problem.clean[0].shape[1], dtype=torch.float64)
    for index, visit in zip(batches, visits, strict=True):
        clean = gradients(problem, problem.clean, theta).mean(0)
        outputs = (problem.clean[0] @ theta).view(-1, 1)
        assert visit.clean_loss == pytest.approx(
            float(problem.loss_fn(outputs, problem.clean[1]).mean()), rel=1e-12
        )
        assert visit.squared_gradient == pytest.approx(float(clean.square().sum()), rel=1e-12)
        each = gradients(problem, (problem.train[0][index], problem.train[1][index]), theta)
        a = (each @ clean).clamp(min=0)
        theta = theta - 3.0 / 7 * a @ each


def test_batches_of_copies_are_of_clean_examples() -> None:
    problem = PROBLEMS["logistic"]
    for index in copies(problem, 5, 20, seed=0):
        assert index.shape == (5,)
        assert len(index.unique()) == 1
        x, y = (part[index[0]] for part in problem.train)
        assert ((problem.clean[0] == x).all(1) & (problem.clean[1] == y)).any()


@pytest.mark.parametrize("size", [1, 10, 100])
@pytest.mark.parametrize("batches", lemma1.BATCHES)
def test_the_clean_loss_never_rises_within_the_proved_bound(size: int, batches: str) -> None:
    for seed in range(2):
        problem = logistic(seed, size=200)
        order = lemma1.BATCHES[batches](problem, size, 60, seed)
        values = [visit.clean_loss for visit in descend(problem, order, problem.largest_step)]
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(values))
        assert values[-1] < values[0]


def test_equal_examples_break_the_stated_bound() -> None:
    problem = logistic(0)
    order = copies(problem, 100, 30, 0)
    values = [visit.clean_loss for visit in descend(problem, order, 100 * problem.largest_step)]
    assert max(b - a for a, b in itertools.pairwise(values)) > 1


def test_the_long_tail_falls_at_its_rate() -> None:
    problem = tail(0.25)
    order = drawn(problem, 1, 1025, 0)
    values = [v.squared_gradient for v in descend(problem, order, problem.largest_step / 2)]
    assert theorem2.slope(values, 1024) == pytest.approx(-2.5 / 4.75, abs=0.01)


def run(module: ModuleType, out: Path, *arguments: str) -> int:
    parser = ArgumentParser()
    module.add_arguments(parser)
    return int(module.run(parser.parse_args([*arguments, "--out", str(out)])))


def test_lemma1_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lemma1, tmp_path, "--seeds", "1", "--steps", "12") == 0
    assert "Steps at which the clean loss rises" in capsys.readouterr().out
    folder = tmp_path / "lemma1"
    assert sorted(p.name for p in folder.iterdir()) == [
        f"lemma1.{suffix}" for suffix in ("csv", "json", "md", "png", "svg")
    ]
    with open(folder / "lemma1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        assert row["steps"] == "12"
        if row["step_size"] == lemma1.PROVED or row["n"] == "1":
            assert row["rises"] == "0"
    assert json.loads((folder / "lemma1.json").read_text())["commit"]


def test_theorem2_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(theorem2, tmp_path, "--seeds", "2", "--steps", "40") == 0
    assert "slope" in capsys.readouterr().out
    report = json.loads((tmp_path / "theorem2" / "theorem2.json").read_text())
    assert [(row["problem"], row["T"]) for row in report["rows"]] == [
        (name, length) for name in (theorem2.NOISY, theorem2.TAIL) for length in (16, 32)
    ]


def test_too_few_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 16"):
        run(theorem2, tmp_path, "--steps", "15")


@pytest.mark.parametrize("module", [lemma1, theorem2])
def test_an_unwritable_output_is_refused(module: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        run(module, tmp_path / "file")
