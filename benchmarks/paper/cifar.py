"""CIFAR-10 and CIFAR-100, as python pickles or as an archive of class folders."""

from __future__ import annotations

import gzip
import importlib
import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .images import Images
from .pickles import read_pickle

SIDE = 32


@dataclass(frozen=True)
class Layout:
    """Where a CIFAR keeps its things.

    Attributes:
        folder: of the pickles, also inside their archive.
        files: pickles of the training and the test part.
        labels: key of the labels in a pickle.
        names: the pickle of class names, and the key in it.
        archives: patterns of archive names below the data root.
        classes: how many there are.
    """

    folder: str
    files: dict[str, tuple[str, ...]]
    labels: str
    names: tuple[str, str]
    archives: tuple[str, ...]
    classes: int


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)},
        "labels",
        ("batches.meta", "label_names"),
        ("cifar-10-*.tar*", "cifar10*.tar*"),
        10,
    ),
    "cifar100": Layout(
        "cifar-100-python",
        {"train": ("train",), "test": ("test",)},
        "fine_labels",
        ("meta", "fine_label_names"),
        ("cifar-100-*.tar*", "cifar100*.tar*"),
        100,
    ),
}


def read_cifar(name: str, part: str, root: Path) -> Images:
    """Training or test part of a CIFAR.

    Looked for, in this order: the folder of pickles; an archive (``.tar``, ``.tar.gz``) of that
    folder; an archive of images as ``.../train/<class>/<file>``. There, classes are numbered in the
    order of their names, and images go by class and, in it, by file name.

    Raises:
        UsageError: none is there, or what is there is broken or incomplete.
    """
    layout = LAYOUTS[name]
    folder = root / layout.folder
    if folder.is_dir():
        wanted = (*layout.files[part], layout.names[0])
        return _from_pickles(layout, part, {f: _read(folder / f) for f in wanted}, str(folder))
    archives = sorted(path for pattern in layout.archives for path in root.glob(pattern))
    if not archives:
        raise UsageError(
            f"--data-root: {folder} does not exist, nor does {root / layout.archives[0]} or "
            f"{layout.archives[1]}"
        )
    archive = archives[0]
    pickles, pictures = _unpack(layout, part, archive)
    if pickles:
        return _from_pickles(layout, part, pickles, str(archive))
    return _from_pictures(layout, part, pictures, archive)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data-root: cannot read {path}: {error.strerror}") from error


def _unpack(
    layout: Layout, part: str, archive: Path
) -> tuple[dict[str, bytes], dict[tuple[str, str], bytes]]:
    """The pickles by name, and the encoded images of a part by class and file name."""
    wanted = {*layout.files[part], layout.names[0]}
    pickles, pictures = {}, {}
    opened: Any = gzip.open if archive.suffix == ".gz" else open
    try:
        with opened(archive, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as members:
            for member in members:
                path = PurePosixPath(member.name)
                is_pickle = path.parent.name == layout.folder and path.name in wanted
                is_picture = len(path.parts) >= 3 and path.parts[-3] == part
                if not member.isfile() or not (is_pickle or is_picture):
                    continue
                packed = members.extractfile(member)
                content = b"" if packed is None else packed.read()
                if is_pickle:
                    pickles[path.name] = content
                else:
                    pictures[path.parent.name, path.name] = content
            left = True
            while left:  # to the end, where gzip looks at the checksum
                left = bool(file.read(2**20))
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UsageError(f"--data-root: cannot read {archive}: {error}") from error
    return pickles, pictures


def _from_pickles(layout: Layout, part: str, files: dict[str, bytes], source: str) -> Images:
    inputs, targets = [], []
    for file in layout.files[part]:
        name = f"{source}/{file}"
        batch = _pickle(files, file, source)
        data = torch.as_tensor(batch.get("data", ()))
        labels = torch.as_tensor(batch.get(layout.labels, ()), dtype=torch.int64)
        pixels = 3 * SIDE * SIDE
        if data.dtype != torch.uint8 or data.shape != (len(labels), pixels):
            raise UsageError(
                f"--data-root: {name} has data of {data.dtype} and shape {tuple(data.shape)} for "
                f"{len(labels)} {layout.labels}, expected bytes of shape (N, {pixels})"
            )
        inputs.append(data.view(-1, 3, SIDE, SIDE))
        targets.append(labels)
    names = _pickle(files, layout.names[0], source).get(layout.names[1], ())
    classes = tuple(n.decode("latin1") if isinstance(n, bytes) else str(n) for n in names)
    if len(classes) != layout.classes:
        raise UsageError(
            f"--data-root: {source}/{layout.names[0]} names {len(classes)} classes, expected "
            f"{layout.classes}"
        )
    return Images(torch.cat(inputs), torch.cat(targets), classes, Path(source).name)


def _pickle(files: dict[str, bytes], file: str, source: str) -> dict[str, Any]:
    if file not in files:
        raise UsageError(f"--data-root: {source} has no {file}")
    return read_pickle(files[file], f"{source}/{file}")


def _from_pictures(
    layout: Layout, part: str, pictures: dict[tuple[str, str], bytes], archive: Path
) -> Images:
    classes = sorted({folder for folder, _ in pictures}, key=_numbers_by_value)
    if len(classes) != layout.classes:
        raise UsageError(
            f"--data-root: {archive} has {len(classes)} class folders in {part}, expected "
            f"{layout.classes}"
        )
    order = sorted(pictures, key=lambda name: (classes.index(name[0]), _numbers_by_value(name[1])))
    decoded = [_decode(pictures[name], "/".join((part, *name)), archive) for name in order]
    targets = torch.tensor([classes.index(folder) for folder, _ in order])
    inputs = torch.stack(decoded).permute(0, 3, 1, 2).contiguous()
    return Images(inputs, targets, tuple(classes), archive.name)


def _numbers_by_value(name: str) -> tuple[int, str]:
    stem = name.split(".", 1)[0]
    return (int(stem) if stem.isdecimal() else -1, name)


def _decode(content: bytes, name: str, archive: Path) -> Tensor:
    """One image, uint8, shape (32, 32, 3)."""
    try:
        image: Any = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise UsageError(f"install pillow to read the images in {archive}") from error
    try:
        with image.open(io.BytesIO(content)) as picture:
            size, pixels = picture.size, bytearray(picture.convert("RGB").tobytes())
    except Exception as error:
        # Decoders raise errors of many types for a damaged image.
        raise UsageError(f"--data-root: {name} in {archive} is not an image: {error}") from error
    if size != (SIDE, SIDE):
        raise UsageError(
            f"--data-root: {name} in {archive} has {size[0]}x{size[1]} pixels, expected "
            f"{SIDE}x{SIDE}"
        )
    return torch.frombuffer(pixels, dtype=torch.uint8).view(SIDE, SIDE, 3)
