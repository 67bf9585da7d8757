"""``python -m benchmarks report``: the README's chart and tables, drawn from recorded results.

Reads ``benchmarks/results/<device>/*.json``, draws ``docs/assets/step.svg`` from ``step.json``
(``step-<device>.svg`` for a device other than the CPU) and prints Markdown tables. Says which files
were recorded with other sources than the present ones, and which before the run had ended.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from . import provenance
from .errors import UsageError
from .pages import filled, machine_of, markdown, ratios, read_reports

RESULTS = provenance.ROOT / "benchmarks" / "results"
ASSETS = provenance.ROOT / "docs" / "assets"
PAGES_DEVICE = "cpu"
"""The device whose results the README and the documentation show."""
BARS = {
    "double_backward": ("double backward (Algorithm 1)", "#c9ccd1"),
    "jvp": ("torch.func.jvp", "#8fa3bf"),
    "l2rw_ext": ("l2rw_ext", "#1f6feb"),
}


def chart(report: dict[str, Any], path: Path) -> None:
    """Time of a step over the plain union step: one group of bars for each case."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    cases = report["cases"]
    with pyplot.rc_context({"svg.hashsalt": "l2rw_ext", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(8, 0.62 * len(cases) + 1.3), layout="constrained")
        height = 0.8 / len(BARS)
        for k, (name, (label, colour)) in enumerate(BARS.items()):
            found = [
                (i, ratios(entry)[name]) for i, entry in enumerate(cases) if name in ratios(entry)
            ]
            at = [i + (k - (len(BARS) - 1) / 2) * height for i, _ in found]
            bars = axes.barh(at, [r for _, r in found], height * 0.92, color=colour, label=label)
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axes.axvline(1, color="black", linewidth=1, zorder=0.5)
        axes.set_yticks(range(len(cases)), [f"{e['title']}, ρ {e['rho']:.2f}" for e in cases])
        axes.invert_yaxis()
        axes.set_xlim(0, max(max(ratios(e).get(b, 0) for b in BARS) for e in cases) * 1.1)
        axes.set_xlabel(
            "time of a training step; 1 = a plain step on the same examples\n"
            f"{machine_of(report)}, torch {report['versions']['torch']}"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(BARS))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=160)
        pyplot.close(figure)


def describe(path: Path, report: dict[str, Any]) -> str:
    """Where a report comes from, and whether the sources have changed since."""
    age = "of the present sources" if provenance.is_current(report) else "OLDER than the sources"
    if not report.get("complete", True):
        age += ", INCOMPLETE: the run ended early"
    return (
        f"{path.name}: {report['date'][:10]}, commit {report['commit'][:10]}, {age} "
        f"({report['command']})"
    )


def chart_path(device: str) -> Path:
    """Where the chart of a device belongs."""
    return ASSETS / ("step.svg" if device == PAGES_DEVICE else f"step-{device}.svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``report``."""
    parser.add_argument(
        "--device", default=PAGES_DEVICE, help="folder below benchmarks/results, such as h200"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", help=".svg or .png; default: in docs/assets"
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
    """Draw the chart and print tables; the exit status is 1 with --check and an older file."""
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
    target = args.chart or chart_path(args.device)
    current = True
    for path in paths:
        report = provenance.read(path)
        current &= provenance.is_current(report)
        print(describe(path, report))
        shown = markdown(report)
        if shown:
            print(f"\n{shown}\n")
        if path.name == "step.json" and report["cases"]:
            chart(report, target)
            print(f"chart in {target}")
    for page in args.fill:
        try:
            page.write_text(filled(page.read_text(), read_reports(folder)))
        except OSError as error:
            raise UsageError(f"--fill: {page}: {error.strerror}") from error
        print(f"filled {page}")
    return 1 if args.check and not current else 0
