"""The parts of Markdown pages that are made from recorded results, between two comments.

``<!-- recorded NAME: begin -->`` and ``<!-- recorded NAME: end -->`` stand around each; what is
between them is replaced. Without a recorded result a part says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import provenance
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


def _of_kernel(entry: dict[str, Any], mode: str) -> list[str]:
    """What a row of :func:`kernel_table` says of one way to call."""
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in entry["candidates"]}
    own: dict[str, Any] | None = rows.get("operator", {}).get(mode)
    cells = [f"{1e6 * own['seconds']:.1f}" if own else "-"]
    for other in ("composition", "library"):
        ratio = entry["ratios"].get(other, {}).get(mode)
        cells.append(f"{ratio:.2f}" if ratio else "-")
    return cells


def kernel_table(report: dict[str, Any]) -> str:
    """The operators of a report as a Markdown table, one row for each case and precision."""
    modes = ["eager"]
    if any("captured" in row for e in report["cases"] for row in e["candidates"]):
        modes.append("captured")
    head = ["case", "precision"]
    for mode in modes:
        head += [f"{mode}, µs", "composition takes", "library takes"]
    head += ["of the roofline", "of the matrix product's rate", "error", "workspace, MiB"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
    for entry in report["cases"]:
        cells = [f"`{entry['operator']}`, {entry['title']}", entry["precision"]]
        for mode in modes:
            cells += _of_kernel(entry, mode)
        own: dict[str, Any] = next(
            (row for row in entry["candidates"] if row["name"] == "operator"), {}
        )
        best = own.get(modes[-1]) or own.get("eager")
        cells += [f"{best[n]:.0%}" if best else "-" for n in ("roofline", "matrix_ceiling")]
        errors = own.get("errors")
        status = own.get("status", "failed" if "failed" in entry else "no kernel")
        error = f"{max(e['of_norm'] for e in errors):.0e}" if errors else "-"
        cells.append(error if status == "ok" else f"{status} {error}".removesuffix(" -"))
        held = own.get("workspace_bytes")
        cells.append("-" if held is None else f"{held / 2**20:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def phase_table(report: dict[str, Any]) -> str:
    """How the phases of ``make gpu`` ended."""
    lines = ["| phase | | seconds |", "|---|---|---|"]
    lines += [f"| {p['name']} | {p['status']} | {p['seconds']:.0f} |" for p in report["phases"]]
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    """The table of a report of any kind; empty for a kind without one."""
    makers = {"step": table, "memory": table, "kernels": kernel_table, "gpu": phase_table}
    maker = makers.get(report["kind"])
    return maker(report) if maker else ""


def machine_of(report: dict[str, Any]) -> str:
    """The GPU that was measured, or the processor with its threads."""
    machine = report["machine"]
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"


def origin(report: dict[str, Any]) -> str:
    """Command, machine, versions and commit of a report, as one sentence."""
    machine, versions = report["machine"], report["versions"]
    capability = "" if "gpu" in machine else f" ({machine['capability']})"
    return (
        f"Recorded by `{report['command']}` on {report['date'][:10]} at commit "
        f"`{report['commit'][:10]}`: {machine_of(report)}{capability}, torch {versions['torch']}."
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
    return {path.stem: provenance.read(path) for path in sorted(folder.glob("*.json"))}


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
