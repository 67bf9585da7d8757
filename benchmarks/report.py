"""``python -m benchmarks report``: charts and tables of the pages, drawn from recorded results.

Reads ``benchmarks/results/<device>/*.json``, draws ``docs/assets/step.svg`` from ``step.json`` and
``scaling.svg`` from ``scaling.json`` (``step-<device>.svg`` and so on for a device other than the
CPU) and prints Markdown tables. Says which files were recorded with other sources than the present
ones, and which before the run had ended.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import charts, provenance
from .errors import UsageError
from .pages import filled, markdown, read_reports

RESULTS = provenance.ROOT / "benchmarks" / "results"
ASSETS = provenance.ROOT / "docs" / "assets"
PAGES_DEVICE = "cpu"
"""The device whose results the README and the documentation show."""


def describe(path: Path, report: dict[str, Any]) -> str:
    """Where a report comes from, and whether the sources have changed since."""
    age = "of the present sources" if provenance.is_current(report) else "OLDER than the sources"
    if not report.get("complete", True):
        age += ", INCOMPLETE: the run ended early"
    return (
        f"{path.name}: {report['date'][:10]}, commit {report['commit'][:10]}, {age} "
        f"({report['command']})"
    )


def chart_path(folder: Path, name: str, device: str) -> Path:
    """Where the chart of a device's ``name.json`` belongs."""
    return folder / (f"{name}.svg" if device == PAGES_DEVICE else f"{name}-{device}.svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``report``."""
    parser.add_argument(
        "--device", default=PAGES_DEVICE, help="folder below benchmarks/results, such as h200"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument(
        "--charts", type=Path, metavar="FOLDER", help="where charts go; default: docs/assets"
    )
    parser.add_argument(
        "--fill",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="Markdown pages in which to replace what stands between <!-- recorded --> comments",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 where a file is older")


def run(args: argparse.Namespace) -> int:
    """Draw charts and print tables; the exit status is 1 with --check and an older file."""
    if args.fill and args.device != PAGES_DEVICE:
        raise UsageError(
            f"--fill: the pages show the results of {PAGES_DEVICE}, not of {args.device}"
        )
    folder = args.results / args.device
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise UsageError(
            f"no recorded results in {folder}; run make bench, or make gpu on a machine with a GPU"
        )
    current = True
    for path in paths:
        report = provenance.read(path)
        current &= provenance.is_current(report)
        print(describe(path, report))
        shown = markdown(report)
        if shown:
            print(f"\n{shown}\n")
        if path.stem in charts.CHARTS and report["cases"]:
            target = chart_path(args.charts or ASSETS, path.stem, args.device)
            charts.CHARTS[path.stem](report, target)
            print(f"chart in {target}")
    for page in args.fill:
        try:
            page.write_text(filled(page.read_text(), read_reports(folder)))
        except OSError as error:
            raise UsageError(f"--fill: {page}: {error.strerror}") from error
        print(f"filled {page}")
    return 1 if args.check and not current else 0
