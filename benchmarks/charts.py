"""The charts that ``python -m benchmarks report`` draws."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .pages import growth, machine_of, ratios, sweeps

BARS = {
    "double_backward": ("double backward (Algorithm 1)", "#b5bac1"),
    "jvp": ("torch.func.jvp", "#7f93af"),
    "l2rw_ext": ("l2rw_ext", "#1f6feb"),
    "l2rw_ext_compiled": ("l2rw_ext, compiled", "#1a9e96"),
}
# Pages are white or nearly black, and the charts have no background: this grey is read on both.
INK = "#7d848c"
STYLE = {
    "svg.hashsalt": "l2rw_ext",
    "font.size": 9,
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}


@contextlib.contextmanager
def _figure(path: Path, *shape: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes; the file, .svg or .png, is the same whenever it is drawn."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=160)
        pyplot.close(figure)


def _origin(report: dict[str, Any]) -> str:
    return f"{machine_of(report)}, torch {report['versions']['torch']}"


def step_chart(report: dict[str, Any], path: Path) -> None:
    """Time of a step over the plain union step: one group of bars for each case."""
    cases = report["cases"]
    shown = {n: bar for n, bar in BARS.items() if any(n in ratios(entry) for entry in cases)}
    height = 0.8 / len(shown)
    with _figure(path, size=(8, 0.62 * len(cases) + 1.3)) as (_, ((axes,),)):
        for k, (name, (label, colour)) in enumerate(shown.items()):
            found = [
                (i, ratios(entry)[name]) for i, entry in enumerate(cases) if name in ratios(entry)
            ]
            at = [i + (k - (len(shown) - 1) / 2) * height for i, _ in found]
            bars = axes.barh(at, [r for _, r in found], height * 0.92, color=colour, label=label)
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axes.axvline(1, color=INK, linewidth=1, zorder=0.5)
        axes.set_yticks(range(len(cases)), [f"{e['title']}, ρ {e['rho']:.2f}" for e in cases])
        axes.invert_yaxis()
        axes.set_xlim(0, max(max(ratios(e).get(b, 0) for b in shown) for e in cases) * 1.1)
        axes.set_xlabel(
            f"time of a training step; 1 = a plain step on the same examples\n{_origin(report)}"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(shown))


def scaling_chart(report: dict[str, Any], path: Path) -> None:
    """Time, memory and both over the plain step's, one column for each size that grows."""
    found = sweeps(report)
    rows = [row for entry in report["cases"] for row in entry["step"]["methods"]]
    labels = {row["name"]: row["label"] for row in rows}
    plain = {row["name"] for row in rows if row["kind"] == "union"}
    with _figure(path, 3, len(found), size=(2.5 * len(found) + 1, 7)) as (figure, axes):
        for (axis, entries), (time, memory, ratio) in zip(found.items(), axes.T, strict=True):
            numbers = growth(entries)
            for k, (name, label) in enumerate(labels.items()):
                sizes, style = numbers.get(name, {}), {"color": f"C{k}", "marker": "."}
                time.loglog(*_points(sizes, "seconds"), label=label, **style)
                memory.loglog(*_points(sizes, "bytes"), **style)
                if name not in plain:
                    ratio.semilogx(*_points(sizes, "time"), **style)
                    ratio.semilogx(*_points(sizes, "memory"), linestyle="--", **style)
            ratio.axhline(1, color=INK, linewidth=1, zorder=0.5)
            ratio.set_ylim(bottom=0)
            ratio.set_xlabel(axis)
            at = [entry["value"] for entry in entries]
            for panel in (time, memory, ratio):
                panel.set_xticks(at, [f"{value:g}" for value in at])
                panel.set_xticks([], minor=True)
                panel.spines[["top", "right"]].set_visible(False)
        for panel, label in zip(
            axes[:, 0],
            ("time of a step, s", "peak memory, bytes", "over the plain step\n(dashed: memory)"),
            strict=True,
        ):
            panel.set_ylabel(label)
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(),
            frameon=False,
            loc="outside upper left",
            ncols=len(labels),
        )
        figure.supxlabel(_origin(report), fontsize=9)


def _points(sizes: dict[float, dict[str, float]], part: str) -> tuple[list[float], list[float]]:
    at = [size for size, numbers in sizes.items() if part in numbers]
    return at, [sizes[size][part] for size in at]


CHARTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "step": step_chart,
    "scaling": scaling_chart,
}
"""By the name of the recorded file, without its ending."""
