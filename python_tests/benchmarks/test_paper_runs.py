"""The paper's runs implement its methods, survive interruptions, and refuse bad input."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich", reason="runs show their progress with rich")
pytest.importorskip("matplotlib", reason="experiments draw figures")
pytest.importorskip("scipy", reason="confidence intervals need the t distribution")

from benchmarks.__main__ import main
from benchmarks.errors import UsageError
from benchmarks.paper import data, networks, tables
from benchmarks.paper.order import Epochs
from benchmarks.paper.runs import Place, StoppedError, run
from benchmarks.paper.settings import Settings
from benchmarks.paper.statistics import mean
from benchmarks.paper.trace import Trace
from benchmarks.paper.training_methods import METHODS, Batch, Context, Statistics, make
from support.paths import ROOT

COUNTS = {"train": 400, "test": 60}


def write_idx(path: Path, values: Tensor) -> None:
    header = struct.pack(f">{1 + values.dim()}I", 0x0800 + values.dim(), *values.shape)
    path.write_bytes(gzip.compress(header + bytes(values.flatten().tolist()), 1))


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST files with few images of noise; 4s are brighter above."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("data") / "mnist"
    folder.mkdir()
    for name, count in zip(("train", "t10k"), COUNTS.values(), strict=True):
        labels = torch.tensor([4, 9]).repeat(count // 2)
        images = torch.randint(200, (count, 28, 28), generator=generator)
        images[labels == 4, :14] += 55
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels)
    return folder.parent


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(data.COUNTS, "mnist", COUNTS)
    monkeypatch.setitem(networks.MODELS, "tiny", _tiny)
    data.load.cache_clear()
    yield
    data.load.cache_clear()


def _tiny(classes: int) -> nn.Module:
    """With running statistics and dropout, which a checkpoint has to hold too."""
    return nn.Sequential(
        *(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8)),
        *(nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, classes)),
    )


def _tiny_cifar(classes: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, classes))


SETTINGS = Settings(
    experiment="test",
    data="mnist",
    task="imbalance",
    level=5,
    method="ours",
    seed=3,
    model="tiny",
    steps=12,
    batch=30,
    clean_batch=4,
    lr=0.1,
    weight_decay=1e-3,
    decays=(5, 9),
    images=120,
    clean=10,
    clean_in_training=True,
    augment=True,
    finetune=4,
)


def place(folder: Path, data_root: Path, interval: int = 1000) -> Place:
    folder.mkdir(exist_ok=True)
    return Place(folder, data_root, "cpu", interval, {"commit": "none"})


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """A result without its times."""
    return {k: v for k, v in result.items() if k not in ("seconds", "data_seconds", "origins")}


def stop_after(steps: int) -> Any:
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= steps


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_continues_bit_equal(method: str, tmp_path: Path, data_root: Path) -> None:
    settings = replace(SETTINGS, method=method)
    whole = run(settings, place(tmp_path / "whole", data_root), lambda _: None)
    where = place(tmp_path / "parts", data_root, interval=2)
    for steps in (5, 6, 3):
        with pytest.raises(StoppedError):
            run(settings, where, lambda _: None, stop_after(steps))
    assert where.checkpoint(settings).exists()
    assert numbers(run(settings, where, lambda _: None)) == numbers(whole)
    assert [path.name for path in where.folder.iterdir()] == [f"{settings.key}.json"]
    assert whole["curve"][-1]["step"] == 16
    other = run(replace(settings, seed=4), where, lambda _: None)
    assert other["parameters"] != whole["parameters"]


def test_a_traced_run_continues_bit_equal(tmp_path: Path, data_root: Path) -> None:
    settings = replace(SETTINGS, traced=True)
    whole = run(settings, place(tmp_path / "whole", data_root), lambda _: None)
    where = place(tmp_path / "parts", data_root)
    with pytest.raises(StoppedError):
        run(settings, where, lambda _: None, stop_after(7))
    assert numbers(run(settings, where, lambda _: None)) == numbers(whole)
    untraced = run(SETTINGS, place(tmp_path / "untraced", data_root), lambda _: None)
    assert untraced["parameters"] == whole["parameters"]
    assert whole["curve"][-1].keys() > untraced["curve"][-1].keys()


def test_images_may_be_drawn_by_a_seed_of_their_own(tmp_path: Path, data_root: Path) -> None:
    where = place(tmp_path, data_root)
    by_seed = {
        (seed, split): run(replace(SETTINGS, seed=seed, split_seed=split), where, lambda _: None)
        for seed, split in ((3, None), (3, 3), (3, 4), (4, 3))
    }
    assert numbers(by_seed[3, 3])["parameters"] == numbers(by_seed[3, None])["parameters"]
    data_of = {key: result["data"] for key, result in by_seed.items()}
    assert data_of[3, 3] == data_of[4, 3] != data_of[3, 4]
    assert len({result["parameters"] for result in by_seed.values()}) == 3


def test_a_trace_is_that_of_a_loop() -> None:
    model = nn.Linear(3, 2).double()
    clean = Batch(torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0]))
    trace = Trace(2)
    for weights in ([0.2, 0.0, 0.3, 0.5], [0.0, 0.0, 0.0, 0.0]):
        found = Statistics(torch.ones(4), torch.tensor(weights))
        trace.add(torch.tensor([1, 0, 0, 1]), found)
    other = Trace(2)
    other.load_state_dict(trace.state_dict())
    points = [x.take(model, clean) for x in (trace, other)]
    each = nn.functional.cross_entropy(model(clean.inputs), clean.targets, reduction="none")
    gradient = torch.autograd.grad(each.mean(), [*model.parameters()])
    expected = {
        "clean_loss": each.mean().item(),
        "clean_gradient": torch.cat([g.flatten() for g in gradient]).norm().item(),
        "hardest": (each.max() / each.sum()).item(),
        "weight_of_class_0": 0.15,
        "weight_of_class_1": 0.35,
        "weighed": 37.5,
        "without_weight": 50.0,
    }
    for point in points:
        assert point == pytest.approx(expected, rel=1e-6)
    assert trace.take(model, clean)["weight_of_class_1"] == 0
    assert model.training
    assert model.weight.grad is None


def test_a_run_leaves_torch_as_it_was(tmp_path: Path, data_root: Path) -> None:
    before = torch.get_rng_state(), torch.get_num_threads()
    run(SETTINGS, place(tmp_path, data_root), lambda _: None)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]


def test_clean_images_are_trained_on_only_where_nothing_asks_for_them(
    tmp_path: Path, data_root: Path
) -> None:
    where = place(tmp_path, data_root)
    counts = {
        method: run(replace(SETTINGS, method=method), where, lambda _: None)["counts"]
        for method in ("ours", "baseline", "ours +clean")
    }
    assert counts == {"ours": [15, 95], "baseline": [20, 100], "ours +clean": [20, 100]}


@pytest.mark.parametrize("finished", [True, False])
def test_files_of_other_settings_are_refused_and_kept(
    finished: bool, tmp_path: Path, data_root: Path
) -> None:
    where = place(tmp_path, data_root)
    if finished:
        run(SETTINGS, where, lambda _: None)
    else:
        with pytest.raises(StoppedError):
            run(SETTINGS, where, lambda _: None, stop_after(3))
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"lr 0\.1 instead of 0\.2"):
        run(replace(SETTINGS, lr=0.2), where, lambda _: None)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_checkpoint_is_refused_and_kept(tmp_path: Path, data_root: Path) -> None:
    where = place(tmp_path, data_root)
    where.checkpoint(SETTINGS).write_bytes(b"torn")
    with pytest.raises(UsageError, match=r"cannot read .*\.pt"):
        run(SETTINGS, where, lambda _: None)
    assert where.checkpoint(SETTINGS).read_bytes() == b"torn"


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path, data_root: Path) -> None:
    where = place(tmp_path, data_root)
    with pytest.raises(StoppedError):
        run(SETTINGS, where, lambda _: None, stop_after(3))
    content = torch.load(where.checkpoint(SETTINGS), weights_only=True)
    torch.save({**content, "data": "0"}, where.checkpoint(SETTINGS))
    with pytest.raises(UsageError, match="other data"):
        run(SETTINGS, where, lambda _: None)


def test_batches_go_through_epochs_and_need_no_history() -> None:
    order = Epochs(7, 3, seed=0, purpose="x")
    batches = [order[step] for step in range(14)]
    for epoch in torch.cat(batches).view(-1, 7):
        assert epoch.sort().values.tolist() == list(range(7))
    assert torch.equal(Epochs(7, 3, seed=0, purpose="x")[9], batches[9])
    assert not torch.equal(torch.cat(batches[:7]), torch.cat(batches[7:]))
    assert sorted(Epochs(2, 5, seed=0, purpose="x")[0].tolist()) in (
        [0, 0, 0, 1, 1],
        [0, 0, 1, 1, 1],
    )


TARGETS = torch.tensor([0] * 3 + [1] * 27)
FLIPPED = torch.arange(30) >= 21


def prepared(method: str) -> Any:
    out = make(method)
    out.prepare(Context(nn.Linear(2, 2), TARGETS, FLIPPED, classes=2, size=10, seed=0))
    return out


def weights(method: str, targets: list[int], losses: list[float]) -> list[float]:
    batch = Batch(torch.zeros(len(targets), 2), torch.tensor(targets))
    out: list[float] = prepared(method).weigh(0, batch, torch.tensor(losses)).tolist()
    return out


def test_hard_mining_keeps_as_many_of_the_majority_as_there_are_others() -> None:
    losses = [1.0, 5.0, 0.1, 3.0, 4.0]
    assert weights("hard mining", [1, 1, 0, 1, 0], losses) == [0, 0.25, 0.25, 0.25, 0.25]
    assert weights("hard mining", [1, 1, 1, 1, 1], losses) == [0, 1, 0, 0, 0]
    assert weights("hard mining", [0, 0, 0, 0, 0], losses) == pytest.approx([0.2] * 5)


def test_proportion_gives_each_class_the_same_weight_over_the_training_set() -> None:
    found = torch.tensor(weights("proportion", TARGETS.tolist(), [1.0] * 30))
    assert found.sum() == pytest.approx(1)
    assert found[:3].sum() == pytest.approx(0.5)


def test_weighted_goes_by_the_share_of_true_labels() -> None:
    found = torch.tensor(weights("weighted", TARGETS.tolist(), [1.0] * 30))
    assert found.sum() == pytest.approx(1)
    assert found[-1] / found[0] == pytest.approx(18 / 27)


def test_resample_draws_as_many_of_each_class() -> None:
    drawn = [prepared("resample").draw(step) for step in range(3)]
    assert torch.equal(prepared("ours +resample").draw(2), drawn[2])
    assert all((TARGETS[index] == 0).sum() == 5 for index in drawn)
    assert len(set(torch.cat(drawn).tolist())) == 18


def test_random_weights_are_of_equation_16() -> None:
    found = torch.tensor(weights("random", [0] * 1000, [1.0] * 1000))
    assert found.sum() == pytest.approx(1)
    assert (found == 0).double().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("method", "beta"), [("reed soft", 0.95), ("reed hard", 0.8)])
def test_reed_mixes_labels_with_predictions(method: str, beta: float) -> None:
    out = prepared(method)
    batch = Batch(torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))
    p = out.context.model(batch.inputs).softmax(1)
    own = p if method == "reed soft" else nn.functional.one_hot(p.argmax(1), 2)
    target = beta * nn.functional.one_hot(batch.targets, 2) + (1 - beta) * own
    torch.testing.assert_close(out.losses(batch), -(target * p.log()).sum(1))


def test_s_model_is_the_label_under_the_noise() -> None:
    out = prepared("s-model")
    batch = Batch(torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))
    p = out.context.model(batch.inputs).softmax(1)
    noise = (torch.eye(2) + 1e-3) / 1.002
    torch.testing.assert_close(
        out.losses(batch), -(p @ noise).gather(1, batch.targets[:, None])[:, 0].log()
    )


def test_confidence_intervals_are_students() -> None:
    found = mean([1.0, 2.0, 3.0, 4.0])
    assert found.value == 2.5
    assert found.half_width == pytest.approx(3.1824 * 1.29099 / 2, rel=1e-4)
    assert mean([1.0]).text == "1.00"


FIGURE2 = ["paper", "figure2", "--images", "120", "--scale", "0.001", "--seeds", "2"]


def figure2(data_root: Path, out: Path, *more: str) -> list[str]:
    return [*FIGURE2, "--ratios", "1", "5", "--data-root", str(data_root), "--out", str(out), *more]


def test_figure2_ends_in_a_table_and_files(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = figure2(data_root, tmp_path, "--methods", "baseline", "ours")
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    shown = " ".join(shown.split())
    for word in ("ours", "baseline", "1:1", "5:1", "8 steps, scale 0.001", "2 seeds"):
        assert word in shown
    folder = tmp_path / "figure2"
    report = json.loads((folder / "figure2.json").read_text())
    assert report["settings"]["steps"] == 8
    assert report["settings"]["momentum"] == 0.9
    assert len(report["runs"]) == 8
    assert {"command", "commit", "machine", "versions"} <= report.keys()
    with open(folder / "figure2.csv") as file:
        rows = list(csv.DictReader(file))
    assert {(row["method"], row["ratio"]) for row in rows} == {
        (method, ratio) for method in ("baseline", "ours") for ratio in ("1", "5")
    }
    assert (folder / "figure2.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "figure2.svg").read_text()
    runs = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    assert len(runs) == 8
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} == runs
    assert main([*arguments, "--scale", "0.002"]) == 2
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} == runs
    assert "steps 8 instead of 16" in capsys.readouterr().err


def test_runs_side_by_side_give_the_same(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    options = ["--methods", "ours", "resample", "--seeds", "1", "--ratios", "10"]
    for jobs in ("1", "2"):
        assert (
            main(
                [
                    *FIGURE2[:2],
                    *options,
                    "--scale",
                    "0.001",
                    "--jobs",
                    jobs,
                    "--out",
                    str(tmp_path / jobs),
                ]
            )
            == 0
        )
    one, two = (
        {
            p.name: numbers(json.loads(p.read_text()))
            for p in (tmp_path / j / "figure2/runs").iterdir()
        }
        for j in ("1", "2")
    )
    assert one == two
    assert len(one) == 2


def write_cifar(root: Path, count: int) -> None:
    """CIFAR-10 of noise as python pickles: ``count`` images in each batch."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        values = torch.randint(256, (count, 3072), generator=generator, dtype=torch.uint8)
        content = {b"data": values.numpy(), b"labels": [k % 10 for k in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = {b"label_names": [f"class {k}".encode() for k in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))


def test_table2_shows_the_papers_numbers_beside_the_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(data.COUNTS, "cifar10", {"train": 400, "test": 80})
    monkeypatch.setitem(networks.MODELS, "resnet-32", _tiny_cifar)
    small = replace(tables.PRESETS["paper"], validation=50)
    monkeypatch.setitem(tables.PRESETS, "paper", small)
    write_cifar(tmp_path, 80)
    arguments = ["paper", "table2", "--rows", "baseline", "baseline +es +ft", "ours"]
    arguments += ["--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--seeds", "1", "--scale", "0.0001"]) == 0
    shown = capsys.readouterr().out
    for word in ("86.73 ± 0.48", "s-model +conf +es", "not run", "scale"):
        assert word in shown
    report = json.loads((tmp_path / "out" / "table2" / "table2-cifar10-0.4.json").read_text())
    settings = {r["settings"]["row"]: r["settings"] for r in report["runs"]}
    assert [settings["ours"][k] for k in ("steps", "decays", "finetune")] == [8, [4, 6], 0]
    early = settings["baseline +es +ft"]
    assert [early[k] for k in ("steps", "decays", "finetune")] == [6, [4, 5], 1]
    assert sum(report["runs"][0]["counts"]) == 400 - 100 - 50
    assert main([*arguments, "--seeds", "6", "--scale", "0.0001"]) == 2
    assert "background" in capsys.readouterr().err


# The child's own copy of the counts, as another process knows nothing of monkeypatch.
CHILD = f"""
import sys
from benchmarks.__main__ import main
from benchmarks.paper import data
data.COUNTS["mnist"] = {COUNTS}
sys.exit(main(sys.argv[1:]))
"""


def child(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_killed_command_ends_in_the_same_numbers(tmp_path: Path, data_root: Path) -> None:
    arguments = figure2(data_root, tmp_path / "killed", "--methods", "resample", "ours")
    arguments += ["--scale", "0.01", "--seeds", "1", "--ratios", "1", "--checkpoint-every", "3"]
    folder = tmp_path / "killed" / "figure2" / "runs"
    for method in ("resample", "ours"):
        process = child(arguments)
        checkpoint = folder / f"mnist-imbalance-1-clean10-lenet-authors-{method}-seed0.pt"
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert checkpoint.exists()
    assert not (folder / "mnist-imbalance-1-clean10-lenet-authors-ours-seed0.json").exists()
    assert main(arguments) == 0
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    for path in (tmp_path / "whole" / "figure2" / "runs").iterdir():
        again = json.loads((folder / path.name).read_text())
        assert numbers(again) == numbers(json.loads(path.read_text()))
    assert {path.suffix for path in folder.iterdir()} == {".json"}


def test_killed_processes_side_by_side_end_in_the_same_numbers(
    tmp_path: Path, data_root: Path
) -> None:
    arguments = figure2(data_root, tmp_path / "killed", "--methods", "baseline", "random")
    arguments += ["--scale", "0.01", "--seeds", "1", "--ratios", "1", "--checkpoint-every", "3"]
    process = child([*arguments, "--jobs", "2"])
    folder = tmp_path / "killed" / "figure2" / "runs"
    deadline = time.monotonic() + 240
    while not list(folder.glob("*.pt")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    while main(arguments) != 0:  # its children may write until they notice
        assert time.monotonic() < deadline
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    for path in (tmp_path / "whole" / "figure2" / "runs").iterdir():
        again = json.loads((folder / path.name).read_text())
        assert numbers(again) == numbers(json.loads(path.read_text()))


@pytest.mark.cuda
def test_a_stopped_run_continues_bit_equal_on_cuda(tmp_path: Path, data_root: Path) -> None:
    settings = replace(SETTINGS, method="random")
    results = []
    for name, stops in (("whole", ()), ("parts", (5, 6))):
        folder = tmp_path / name
        folder.mkdir()
        where = Place(folder, data_root, "cuda", 1000, {})
        for steps in stops:
            with pytest.raises(StoppedError):
                run(settings, where, lambda _: None, stop_after(steps))
        results.append(numbers(run(settings, where, lambda _: None)))
    assert results[0] == results[1]


@pytest.mark.parametrize("arguments", [["figure0"], ["figure2", "--methods", "steam"]])
def test_unknown_names_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["paper", *arguments])
    assert error.value.code == 2
    assert "figure2" in capsys.readouterr().err


def test_unwritable_output_is_one_sentence_and_status_2(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    assert main(figure2(data_root, tmp_path / "file" / "below")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--out" in err
    assert (tmp_path / "file").read_text() == "kept"


def test_an_impossible_ratio_is_one_sentence_and_status_2(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*figure2(data_root, tmp_path), "--ratios", "100"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "100:1" in err


def test_figure2_of_one_ratio_tells_of_no_rise(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = figure2(data_root, tmp_path, "--methods", "ours")
    assert main([*arguments, "--ratios", "5"]) == 0
    assert "rise" not in capsys.readouterr().out
    assert main([*arguments, "--seeds-below", "1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "rise to 5:1" in shown
    assert "2 seeds (1 below 5:1)" in shown
    report = json.loads((tmp_path / "figure2" / "figure2.json").read_text())
    assert [(r["level"], r["seed"]) for r in report["runs"]] == [(1, 0), (5, 0), (5, 1)]
    with open(tmp_path / "figure2" / "figure2.csv") as file:
        assert [(row["ratio"], row["seeds"]) for row in csv.DictReader(file)] == [
            ("1", "1"),
            ("5", "2"),
        ]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_command_may_be_given_minutes(
    jobs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def arguments(out: str) -> list[str]:
        options = ["--ratios", "1", "5", "--methods", "ours", "--jobs", jobs]
        return [*FIGURE2, *options, "--out", str(tmp_path / out)]

    assert main([*arguments("parts"), "--minutes", "1e-6"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Time is up: \d+ of 32 steps are done", shown)
    folder = tmp_path / "parts" / "figure2"
    assert not (folder / "figure2.json").exists()
    if jobs == "1":  # after a step the time is up
        assert "1 of 32 steps are done, 1 of them now" in shown
        assert "at this speed 31 more calls end it" in shown
        assert [path.suffix for path in (folder / "runs").iterdir()] == [".pt"]
    for out in ("parts", "whole"):
        assert main([*arguments(out), "--minutes", "10"]) == 0
        assert "Time is up" not in capsys.readouterr().out
    found = [
        {path.name: numbers(json.loads(path.read_text())) for path in runs.iterdir()}
        for runs in (folder / "runs", tmp_path / "whole" / "figure2" / "runs")
    ]
    assert len(found[0]) == 4
    assert found[0] == found[1]


def test_figure2_seeds_crosses_images_and_runs(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["paper", "figure2-seeds", *FIGURE2[2:], "--ratio", "5", "--model", "lenet"]
    assert main([*arguments, "--data-root", str(data_root), "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Standard deviation of the means" in shown
    folder = tmp_path / "figure2-seeds"
    report = json.loads((folder / "figure2-seeds-lenet.json").read_text())
    seeds = [(r["settings"]["split_seed"], r["settings"]["seed"]) for r in report["runs"]]
    assert seeds == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({r["parameters"] for r in report["runs"]}) == 4
    assert {"clean_loss", "weighed"} <= report["runs"][0]["curve"][-1].keys()
    assert "<svg" in (folder / "figure2-seeds-lenet.svg").read_text()
    for run_of in report["runs"]:
        right = [1 - error / 100 for error in run_of["training_class_errors"]]
        correct = sum(n * share for n, share in zip(run_of["counts"], right, strict=True))
        trained = run_of["curve"][-1]["training_accuracy"]  # few images: it looks at all of them
        assert 100 * correct / sum(run_of["counts"]) == pytest.approx(trained)
    with (folder / "figure2-seeds-lenet.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [
        min((r for r in rows if r["images"] == images), key=lambda r: float(r["training_error"]))
        for images in "01"
    ]
    mean = sum(float(row["error"]) for row in kept) / 2
    assert (folder / "figure2-seeds-lenet.md").read_text().count(f"{mean:.2f} |\n")
    once = [*arguments, "--data-root", str(data_root), "--out", str(tmp_path), "--runs", "1"]
    assert main(once) == 0
    assert "Standard deviation" not in capsys.readouterr().out


def test_settings_may_be_set(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = figure2(data_root, tmp_path, "--methods", "ours", "--ratios", "5", "--seeds", "1")
    assert main([*arguments, "--set", "lr=0.01", "signed=true", "clean=6"]) == 0
    report = json.loads((tmp_path / "figure2" / "figure2.json").read_text())
    assert [report["settings"][k] for k in ("lr", "signed", "clean")] == [0.01, True, 6]
    assert report["runs"][0]["counts"] == [17, 97]
    capsys.readouterr()
    for wrong in ("lr", "lr=x", "lr=true", "signed=1", "model=0", "none=1", "clean=1.5"):
        with pytest.raises(SystemExit) as error:
            main([*arguments, "--set", wrong])
        assert error.value.code == 2
        assert "expected NAME=VALUE with a name of level, seed" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--scale", "2"], ["--jobs", "0"], ["--ratios", "x"]])
def test_bad_options_exit_with_2(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["paper", "figure2", *option])
    assert error.value.code == 2
    assert option[0] in capsys.readouterr().err
