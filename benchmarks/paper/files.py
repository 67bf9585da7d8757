"""Checkpoints and results on disk: written whole or not at all, and read with suspicion."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from .settings import Settings, difference
from .splits import sha256

FINAL = ".final.pt"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of ``path`` when the body ends without an error.

    Raises:
        UsageError: writing does not work.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save tells of a full disk by a RuntimeError.
        raise UsageError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, key: str) -> None:
    """Remove what a killed process was writing of this run."""
    for suffix in (".pt", FINAL, ".json"):
        for path in folder.glob(f".{glob.escape(key)}{suffix}.*"):
            path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Make the folder.

    Raises:
        UsageError: that, or writing a file there, does not work.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--out: cannot write to {folder}: {error.strerror}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process can lock the folder meanwhile; a killed process leaves no lock behind.

    Raises:
        UsageError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"--out: another command is writing to {folder}") from error
        except OSError as error:
            raise UsageError(f"--out: cannot lock {folder}: {error.strerror}") from error
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def read_result(path: Path, settings: Settings) -> dict[str, Any] | None:
    """The result of a finished run; None where there is none.

    Raises:
        UsageError: it cannot be read, or is of other settings.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}; remove it to run again") from error
    return _checked(path, content, settings)


def read_checkpoint(path: Path, settings: Settings) -> dict[str, Any] | None:
    """The checkpoint of an interrupted run; None where there is none.

    Raises:
        UsageError: it cannot be read, or is of other settings.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:
        # Damaged files raise whatever the unpickler or the archive reader trips over.
        raise UsageError(f"cannot read {path}; remove it to run from the start") from error
    return _checked(path, content, settings)


def read_final_state(path: Path, data: str, parameters: str) -> dict[str, Any]:
    """What a finished run has left for others to start from.

    Args:
        path: of the file.
        data: digest of the split that it must be of.
        parameters: digest of the parameters that the run ended with.

    Raises:
        UsageError: it is missing, cannot be read, or is of another run or other data.
    """
    result = path.with_name(path.name.removesuffix(FINAL) + ".json")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"cannot read {path}; remove {result} to run that again") from error
    if not isinstance(content, dict) or content.get("data") != data:
        raise UsageError(f"{path} is of other data; give another --out or remove it")
    if sha256(content["model"].values()) != parameters:
        raise UsageError(f"{path} is not what {result} tells of; remove both to run that again")
    return content


def _checked(path: Path, content: object, settings: Settings) -> dict[str, Any]:
    found = content.get("settings") if isinstance(content, dict) else None
    other = difference(settings.as_dict(), found)
    if other or not isinstance(content, dict):
        raise UsageError(f"{path} is of other settings ({other}); give another --out or remove it")
    return content
