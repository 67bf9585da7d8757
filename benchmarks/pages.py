"""The parts of Markdown pages that are made from recorded results, between two comments.

``<!-- recorded NAME: begin -->`` and ``<!-- recorded NAME: end -->`` stand around each; what is
between them is replaced. Without a recorded result a part says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import record
from .errors import UsageError

PARTS = ("summary", "step", "step-pair", "memory", "memory-checkpointed")
PART = re.compile(
    r"(?P<begin><!-- recorded (?P<name>[a-z-]+): begin -->\n).*?"
    r"(?P<end><!-- recorded (?P=name): end -->)",
    re.DOTALL,
)


def ratios(entry: dict[str, Any]) -> dict[str, float]:
    """The ratio of every measured method of a case, by name."""
    return {row["name"]: row["ratio"] for row in entry["methods"] if "ratio" in row}


def table(report: dict[str, Any]) -> str:
    """The ratios of a report as a Markdown table, one row for each case."""
    labels = {row["name"]: row["label"] for entry in report["cases"] for row in entry["methods"]}
    shown = {
        n: label for n, label in labels.items() if any(n in ratios(e) for e in report["cases"])
    }
    has_rho = report["kind"] == "step"
    head = ["case", *(["ρ", "operation count"] if has_rho else []), *shown.values()]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
    for entry in report["cases"]:
        cells = [entry["title"]]
        if has_rho:
            cells += [f"{entry['rho']:.2f}", f"{entry['operation_bound']:.2f}"]
        found = ratios(entry)
        cells += [f"{found[name]:.2f}" if name in found else "-" for name in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def origin(report: dict[str, Any]) -> str:
    """Command, machine, versions and commit of a report, as one sentence."""
    machine, versions = report["machine"], report["versions"]
    return (
        f"Recorded by `{report['command']}` on {report['date'][:10]} at commit "
        f"`{report['commit'][:10]}`: {machine['cpu']}, {machine['threads']} threads "
        f"({machine['capability']}), torch {versions['torch']}."
    )


def summary(report: dict[str, Any]) -> str:
    """The range of the ratios of the chart's methods over all cases."""
    ranges = []
    for name, label in (
        ("l2rw_ext", "`l2rw_ext`"),
        ("jvp", "`torch.func.jvp`"),
        ("double_backward", "double backward"),
    ):
        found = [ratios(entry)[name] for entry in report["cases"] if name in ratios(entry)]
        if found:
            ranges.append(f"{label} {min(found):.2f} to {max(found):.2f}")
    return (
        "Time of a training step, in plain steps on the same examples (training and clean batch "
        f"together): {', '.join(ranges)}. {origin(report)}"
    )


def parts(reports: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What stands between the comments, by name; ``reports`` by file name without its ending."""
    found = dict.fromkeys(PARTS, "Not recorded yet: `make bench` does.")
    for name, report in reports.items():
        if report["kind"] in ("step", "memory"):
            found[name] = f"{table(report)}\n\n{origin(report)}"
    if "step" in reports:
        found["summary"] = summary(reports["step"])
    return found


def read_reports(folder: Path) -> dict[str, dict[str, Any]]:
    """The recorded reports of a folder, by file name without its ending."""
    return {path.stem: record.read(path) for path in sorted(folder.glob("*.json"))}


def filled(text: str, reports: dict[str, dict[str, Any]]) -> str:
    """A page's text with its parts as they follow from the reports.

    Raises:
        UsageError: a part has an unknown name.
    """
    known = parts(reports)

    def replace(match: re.Match[str]) -> str:
        if match["name"] not in known:
            raise UsageError(f"no recorded part is named {match['name']!r}")
        return f"{match['begin']}{known[match['name']]}\n{match['end']}"

    return PART.sub(replace, text)
