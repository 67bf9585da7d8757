"""What an experiment leaves behind: JSON, CSV, PNG and SVG of one name."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

from .files import replacing, write_json


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files."""
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def without(results: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Results less some of their fields."""
    return [{k: v for k, v in result.items() if k not in names} for result in results]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows that all have the keys of the first."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_figure(stem: Path, figure: Any) -> list[Path]:
    """Write a matplotlib figure as PNG and SVG, and close it."""
    paths = []
    for suffix in ("png", "svg"):
        path = stem.with_name(f"{stem.name}.{suffix}")
        with replacing(path) as temporary:
            figure.savefig(temporary, format=suffix, dpi=150, metadata=_METADATA[suffix])
        paths.append(path)
    pyplot().close(figure)
    return paths


_METADATA: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}}


def write_tables(stem: Path, report: dict[str, Any], rows: list[dict[str, Any]]) -> list[Path]:
    """Write the report as JSON and its rows as CSV."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("json", "csv")]
    write_json(paths[0], report)
    write_csv(paths[1], rows)
    return paths
