"""The charts that ``python -m benchmarks report`` draws."""

from __future__ import annotations

import base64
import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import UsageError
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
    cases = [entry for entry in report["cases"] if "left_out" not in entry]
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


def labels_chart(report: dict[str, Any], path: Path) -> None:
    """Weights and effective sample size of a run on MNIST, its least and most trusted images.

    Raises:
        UsageError: no run on MNIST is recorded.
    """
    shown = {e["name"]: e["picture"] for e in report["cases"] if "picture" in e}
    if not shown:
        raise UsageError("the chart of labels.json shows images of MNIST, which is not recorded")
    first = next(iter(shown))
    picture = shown[first]
    edges = picture["edges"]
    with _figure(path, 2, 2, size=(8, 4.9)) as (figure, ((weights, sizes), images)):
        for part, colour in (("right", "#1f6feb"), ("wrong", "#d1495b")):
            total = sum(picture[part])
            counts = [count / total for count in picture[part]]
            weights.stairs(counts, edges, fill=True, alpha=0.5, color=colour, label=f"{part} label")
        weights.axvline(1, color=INK, linewidth=1, linestyle=":")
        weights.set_xlabel("weight in the last epoch; 1 = plain training")
        weights.set_ylabel("share of the examples")
        for (name, other), colour in zip(shown.items(), ("#1f6feb", "#e69f00"), strict=False):
            values = other["effective_sample_sizes"]
            steps = len(values) // report["epochs"]
            means = [sum(values[k : k + steps]) / steps for k in range(0, len(values), steps)]
            sizes.plot(range(1, len(means) + 1), means, ".-", color=colour, label=name)
        sizes.set_xlabel("epoch")
        sizes.xaxis.get_major_locator().set_params(integer=True)
        sizes.set_ylabel("effective sample size of a step")
        sizes.set_ylim(bottom=0)
        for panel in (weights, sizes):
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False)
        for panel, part in zip(images, ("least", "most"), strict=True):
            _tiles(panel, picture[part])
            panel.set_title(f"{part} trusted, with the given label (red: it is wrong)", fontsize=9)
        figure.supxlabel(f"{first}, seed 0, {_origin(report)}", fontsize=8)


def _tiles(panel: Any, images: list[dict[str, Any]], columns: int = 6) -> None:
    """Digits of 28 x 28 pixels in rows, each with its given label in the corner."""
    for k, image in enumerate(images):
        left, top = 30 * (k % columns), 30 * (k // columns)
        pixels = base64.b64decode(image["pixels"])
        rows = [list(pixels[at : at + 28]) for at in range(0, 784, 28)]
        panel.imshow(rows, cmap="gray_r", extent=(left, left + 28, top + 28, top), vmin=0, vmax=255)
        colour = "#d1495b" if image["wrong"] else "#1f6feb"
        panel.text(left + 1, top + 1, image["given"], color=colour, va="top", weight="bold")
    panel.set_xlim(-1, 30 * columns)
    panel.set_ylim(30 * -(-len(images) // columns), -1)
    panel.set_aspect("equal")
    panel.axis("off")


CHARTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "step": step_chart,
    "scaling": scaling_chart,
    "labels": labels_chart,
}
"""By the name of the recorded file, without its ending."""
