"""The recorded predictions of ``roofline``, as Markdown tables."""

from __future__ import annotations

from typing import Any

from . import provenance

PREDICTED = provenance.ROOT / "benchmarks" / "results" / "predicted"
"""Where they are, one file for each device."""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def predicted_steps(report: dict[str, Any]) -> str:
    """The plain step in milliseconds, and others over it."""
    head = [
        "case",
        "plain, union: eager, ms",
        "CUDA graph, ms",
        "l2rw_ext: eager",
        "CUDA graph",
        "double backward: eager",
        "CUDA graph",
        "bytes of l2rw_ext",
        "composed",
    ]
    rows = []
    for entry in report["steps"]:
        found = {row["name"]: row for row in entry["methods"]}
        plain, ours = found["plain_union"], found["l2rw_ext"]
        rows.append(
            [
                entry["title"],
                *(f"{1e3 * plain[mode]['seconds']:.2f}" for mode in ("eager", "captured")),
                *(
                    f"{found[name][mode]['seconds'] / plain[mode]['seconds']:.2f}"
                    for name in ("l2rw_ext", "double_backward")
                    for mode in ("eager", "captured")
                ),
                f"{ours['bytes'] / plain['bytes']:.2f}",
                f"{sum(ours['composed_bytes'].values()) / ours['bytes']:.0%}",
            ]
        )
    return _table(head, rows)


def predicted_products(report: dict[str, Any]) -> str:
    """Products that operations bound, with and without warpgroups; empty if there are none."""
    head = ["case", "precision", "GFLOP", "`mma.sync`, µs", "`wgmma`, µs"]
    rows = []
    for entry in report["kernels"]:
        found = {row["name"]: row for row in entry["candidates"]}
        if "warpgroups" in found and found["operator"]["bound"] == "operations":
            rows.append(
                [
                    f"`{entry['operator']}`, {entry['title']}",
                    entry["precision"],
                    f"{1e-9 * entry['operations']:.1f}",
                    *(f"{1e6 * row['captured']['seconds']:.0f}" for row in found.values()),
                ]
            )
    return _table(head, rows) if rows else ""


def prediction(report: dict[str, Any]) -> str:
    """Both tables."""
    return f"{predicted_steps(report)}\n\n{predicted_products(report)}".strip()


def predicted_parts() -> dict[str, str]:
    """What the pages show of the predictions for an H100, by the name of the part."""
    path = PREDICTED / "h100.json"
    if not path.exists():
        return {}
    report = provenance.read(path)
    origin = (
        f"Predicted for an {report['sheet']} by `{report['command']}` on {report['date'][:10]} at "
        f"commit `{report['commit'][:10]}`, torch {report['versions']['torch']}."
    )
    return {
        "predicted-steps": f"{predicted_steps(report)}\n\n{origin}",
        "predicted-products": predicted_products(report),
    }
