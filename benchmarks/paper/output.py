"""What an experiment leaves behind: its table on the terminal, and files of one name."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import provenance
from .files import replacing, write_json
from .statistics import Mean


@dataclass
class Sheet:
    """A table for the terminal and for Markdown.

    Attributes:
        title: what stands above it.
        columns: their heads.
        caption: what stands below it.
        names: how many columns, from the first, hold words and no numbers.
        rows: texts, and whether they are bold.
    """

    title: str
    columns: Sequence[str]
    caption: str = ""
    names: int = 1
    rows: list[tuple[tuple[str, ...], bool]] = field(default_factory=list)

    def add(self, *cells: str, bold: bool = False) -> None:
        """One row more."""
        self.rows.append((cells, bold))

    def rich(self) -> Table:
        """For the terminal."""
        out = Table(
            title=self.title,
            caption=self.caption or None,
            title_justify="left",
            caption_justify="left",
        )
        for number, name in enumerate(self.columns):
            words = number < self.names
            out.add_column(name, justify="left" if words else "right", no_wrap=words)
        for cells, bold in self.rows:
            out.add_row(*cells, style="bold" if bold else None)
        return out

    def markdown(self) -> str:
        """For a page, with a blank line between title, table and caption."""
        rules = ["---" if number < self.names else "---:" for number in range(len(self.columns))]
        lines = [tuple(self.columns), tuple(rules)]
        lines += [
            tuple(f"**{cell}**" if bold and cell else cell for cell in cells)
            for cells, bold in self.rows
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (f"{self.title}.", table, self.caption) if part)


def origin(report: dict[str, Any]) -> str:
    """Command and date of a report, commits and machines of its runs."""
    where = report.get("machines_of_runs", [provenance.machine_name(report["machine"])])
    commits = report.get("commits_of_runs", [report["commit"]])
    data = ""
    if "data_of_runs" in report:
        files, share = ", ".join(report["data_of_runs"]), report["share_of_time_for_data"]
        data = f" Data: {files}; drawing batches took {share:.1%} of the time."
    return (
        f"Recorded by `{report['command']}` on {report['date'][:10]} at commit "
        f"{', '.join(f'`{commit[:10]}`' for commit in commits)}: {'; '.join(where)}, torch "
        f"{report['versions']['torch']}.{data}"
    )


def finish(
    console: Console,
    stem: Path,
    sheet: Sheet,
    report: dict[str, Any],
    rows: list[dict[str, Any]],
    figure: Any = None,
) -> int:
    """Show the table; write it as Markdown, the report as JSON, its rows as CSV, and the figure.

    Args:
        console: to show it on.
        stem: of the names of the files.
        sheet: the table.
        report: with the fields of ``provenance.header``.
        rows: numbers of the table, all with the keys of the first.
        figure: of matplotlib, written as PNG and SVG, and closed.

    Returns:
        0, the exit status.
    """
    console.print(sheet.rich())
    suffixes = ["json", "csv", "md"] + (["png", "svg"] if figure is not None else [])
    paths = {suffix: stem.with_name(f"{stem.name}.{suffix}") for suffix in suffixes}
    write_json(paths["json"], report)
    write_csv(paths["csv"], rows)
    with replacing(paths["md"]) as temporary:
        temporary.write_text(f"{sheet.markdown()}\n\n{origin(report)}\n")
    if figure is not None:
        for suffix, metadata in _METADATA.items():
            with replacing(paths[suffix]) as temporary:
                figure.savefig(temporary, format=suffix, dpi=150, metadata=metadata)
        pyplot().close(figure)
    console.print(f"Written: {', '.join(map(str, paths.values()))}", soft_wrap=True)
    return 0


_METADATA: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}}


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files."""
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def error_bars(axes: Any, cells: dict[tuple[str, float], Mean], names: Iterable[str]) -> None:
    """A line for each name with its confidence intervals; that of "ours" is bold."""
    for name in names:
        points = sorted((x, found) for (other, x), found in cells.items() if other == name)
        axes.errorbar(
            [x for x, _ in points],
            [found.value for _, found in points],
            yerr=[found.half_width for _, found in points],
            marker="o",
            capsize=3,
            linewidth=2.5 if name == "ours" else 1.2,
            label=name,
        )


def without(results: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Results less some of their fields."""
    return [{k: v for k, v in result.items() if k not in names} for result in results]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows that all have the keys of the first."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
