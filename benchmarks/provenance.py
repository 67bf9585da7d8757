"""What every recorded JSON says about where it comes from."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("csrc", "l2rw_ext")
CUDA_FOLDER = "csrc/cuda"
SOURCE_SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}
SETTINGS = ("L2RW_CPU_ISA", "L2RW_CUDA_WARPGROUPS")
PACKAGES = (
    "torch",
    "l2rw_ext",
    "numpy",
    "higher",
    "torchopt",
    "opacus",
    "backpack-for-pytorch",
    "dattri",
)


def source_hash(device: str, root: Path = ROOT) -> str:
    """SHA-256 over names and contents of the sources in csrc/ and l2rw_ext/.

    Numbers of a CPU do not depend on csrc/cuda/.
    """
    digest = hashlib.sha256()
    for folder in SOURCE_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if device == "cpu" and root / CUDA_FOLDER in path.parents:
                continue
            if path.suffix in SOURCE_SUFFIXES and path.is_file():
                digest.update(path.relative_to(root).as_posix().encode() + b"\0")
                digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads, memory and, where it is used, the GPU."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def machine_name(machine: dict[str, Any]) -> str:
    """The GPU of a machine, or its processor and cores."""
    return str(machine.get("gpu", f"{machine['cpu']}, {machine['cores']} cores"))


def versions() -> dict[str, str]:
    """Python and the installed packages that a benchmark can use."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path = ROOT) -> str:
    """The commit, with ``+`` where sources differ from it; ``unknown`` without git."""
    command = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*command, "status", "--porcelain", "--", *SOURCE_FOLDERS, "benchmarks/*.py"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _command(arguments: list[str]) -> str:
    """The command, with the settings in the environment that decide what is measured."""
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return shlex.join([*settings, "python", "-m", "benchmarks", *arguments])


def header(kind: str, device: str, arguments: list[str]) -> dict[str, Any]:
    """The fields that all recorded JSON shares."""
    return {
        "kind": kind,
        "schema": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": _command(arguments),
        "commit": commit(),
        "sources": source_hash(device),
        "device": device,
        "machine": machine(device),
        "versions": versions(),
    }


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a report, making its folder; one that is there is whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(path)


def complete(path: Path | None, report: dict[str, Any], console: Console) -> None:
    """Mark a report as complete; write it, and say so, if there is a path."""
    report["complete"] = True
    if path:
        write(path, report)
        console.print(f"recorded in {path}")


def read(path: Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        UsageError: the file does not exist or is no report.
    """
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(report, dict) or "kind" not in report:
        raise UsageError(f"{path} is not a report of these benchmarks")
    return report


def is_current(report: dict[str, Any]) -> bool:
    """Whether a report was recorded with the sources as they are."""
    return bool(report.get("sources") == source_hash(report.get("device", "")))


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def positive_number(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def check_device(device: str) -> None:
    """Raise a usage error for a device that this torch does not have."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: expected cpu, cuda or cuda:K")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this torch sees no CUDA device")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices")
