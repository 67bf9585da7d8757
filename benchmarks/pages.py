"""The parts of Markdown pages that are made from recorded results, between two comments.

``<!-- recorded NAME: begin -->`` and ``<!-- recorded NAME: end -->`` stand around each; what is
between them is replaced. Without a recorded result a part says so.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from . import provenance
from .communication import COLLECTIVES, communication_table
from .errors import UsageError
from .predicted import predicted_parts, prediction

PARTS = (
    "summary",
    "step",
    "step-first",
    "step-pair",
    "step-compiled",
    "step-peers",
    "step-sixteenth",
    "step-sixteenth-peers",
    "memory",
    "memory-compiled",
    "memory-checkpointed",
    "scaling",
    "distributed",
    "communication",
    "labels",
    "predicted-steps",
    "predicted-products",
)
ON_TRAINING_BATCH = (
    "The same times over a plain step on the n training examples alone, compiled steps over the "
    "compiled one:"
)
PART = re.compile(
    r"(?P<begin><!-- recorded (?P<name>[a-z-]+): begin -->\n).*?"
    r"(?P<end><!-- recorded (?P=name): end -->)",
    re.DOTALL,
)


def ratios(entry: dict[str, Any], number: str = "ratio") -> dict[str, float]:
    """The ratio, or another number, of every measured method of a case, by name."""
    return {row["name"]: row[number] for row in entry["methods"] if number in row}


def sweeps(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The entries of a scaling report by the size that grows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in report["cases"]:
        found.setdefault(entry["axis"], []).append(entry)
    return found


def growth(entries: list[dict[str, Any]]) -> dict[str, dict[float, dict[str, float]]]:
    """What a sweep found, by method and size: seconds, bytes, and both over the plain step's."""
    found: dict[str, dict[float, dict[str, float]]] = {}
    for entry in entries:
        for part, names in (
            ("step", {"seconds": "seconds", "ratio": "time"}),
            ("memory", {"later": "bytes", "ratio": "memory"}),
        ):
            for row in entry[part]["methods"]:
                at = found.setdefault(row["name"], {}).setdefault(entry["value"], {})
                at |= {to: row[name] for name, to in names.items() if name in row}
    return found


def scaling_table(report: dict[str, Any]) -> str:
    """Time and memory over the plain step's, one row for each method and size that grows."""
    lines = ["| grows | method | time over plain | memory over plain |", "|---|---|---|---|"]
    for axis, entries in sweeps(report).items():
        rows = [row for entry in entries for row in entry["step"]["methods"]]
        labels = {row["name"]: row["label"] for row in rows if row["kind"] != "union"}
        sizes = ", ".join(f"{entry['value']:g}" for entry in entries)
        found = growth(entries)
        for name, label in labels.items():
            cells = [
                ", ".join(f"{v[part]:.2f}" if part in v else "-" for v in found[name].values())
                for part in ("time", "memory")
            ]
            lines.append(f"| {axis}: {sizes} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(report: dict[str, Any], number: str = "ratio") -> str:
    """The ratios of a report, or another number, as a Markdown table with one row for each case."""
    labels = {row["name"]: row["label"] for entry in report["cases"] for row in entry["methods"]}
    measured = {name for entry in report["cases"] for name in ratios(entry, number)}
    shown = {name: label for name, label in labels.items() if name in measured}
    has_rho = report["kind"] == "step" and number in ("ratio", "ratio_n")
    head = ["case", *(["ρ", "operation count"] if has_rho else []), *shown.values()]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
    for entry in report["cases"]:
        cells = [entry["title"]]
        if "left_out" in entry:
            cells[0] += f", left out: {entry['left_out']}"
            cells += ["-"] * (len(head) - 1 - len(shown))
        elif has_rho:
            examples = 1 if number == "ratio" else (entry["n"] + entry["m"]) / entry["n"]
            cells += [f"{entry['rho']:.2f}", f"{entry['operation_bound'] * examples:.2f}"]
        found = ratios(entry, number)
        cells += [f"{found[name]:.2f}" if name in found else "-" for name in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def step_tables(report: dict[str, Any]) -> str:
    """The ratios of a report over a plain step on both batches, then over one on n examples alone.

    Reports that were recorded without the latter have the first table only.
    """
    found = table(report)
    if not any(ratios(entry, "ratio_n") for entry in report["cases"]):
        return found
    return f"{found}\n\n{ON_TRAINING_BATCH}\n\n{table(report, 'ratio_n')}"


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


def distributed_table(report: dict[str, Any]) -> str:
    """The ratios on several ranks and on one, and kilobytes sent by each kind of collective."""
    lines = [
        "| case | step | over plain | kB sent: " + " | ".join(COLLECTIVES) + " |",
        "|---|---|---|" + "---|" * len(COLLECTIVES),
    ]
    for entry in report["cases"]:
        for row in entry["methods"]:
            sent = row.get("bytes")
            cells = [entry["title"], row["label"], f"{row['ratio']:.2f}" if "ratio" in row else "-"]
            for kind in COLLECTIVES:
                if sent is None:
                    cells.append("-")
                else:
                    cells.append(f"{sent[kind]['sent'] / 1e3:,.1f}" if kind in sent else "0")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def labels_table(report: dict[str, Any]) -> str:
    """How well wrong labels were found: mean and standard deviation over seeds."""
    lines = ["| data | method | AUROC | precision | recall |", "|---|---|---|---|---|"]
    for entry in report["cases"]:
        for k, method in enumerate(entry["runs"][0]["methods"]):
            cells = ["" if k else entry["title"], method]
            for number in ("auroc", "precision", "recall"):
                values = [run["methods"][method][number] for run in entry["runs"]]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def phase_table(report: dict[str, Any]) -> str:
    """How the phases of ``make gpu`` ended."""
    lines = ["| phase | | seconds |", "|---|---|---|"]
    lines += [f"| {p['name']} | {p['status']} | {p['seconds']:.0f} |" for p in report["phases"]]
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    """The table of a report of any kind; empty for a kind without one."""
    makers = {
        "step": step_tables,
        "memory": table,
        "scaling": scaling_table,
        "kernels": kernel_table,
        "distributed": distributed_table,
        "labels": labels_table,
        "gpu": phase_table,
        "roofline": prediction,
    }
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
        ("l2rw_ext_compiled", "compiled"),
        ("jvp", "`torch.func.jvp`"),
        ("double_backward", "double backward"),
    ):
        found = [ratios(entry)[name] for entry in report["cases"] if name in ratios(entry)]
        if found:
            ranges.append(f"{label} {min(found):.2f} to {max(found):.2f}")
    rows = [row for entry in report["cases"] for row in entry["methods"]]
    compiled = {row["name"] for row in rows if row["kind"] == "union"} - {"plain_union"}
    faster = ", eager or compiled, whichever is faster" if compiled else ""
    return (
        "Time of a training step, in plain steps on the same examples (training and clean batch "
        f"together{faster}): {', '.join(ranges)}. {origin(report)}"
    )


def parts(reports: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What stands between the comments, by name; ``reports`` by file name without its ending."""
    found = dict.fromkeys(PARTS, "Not recorded yet: `make bench` does.")
    for name, report in reports.items():
        if report["kind"] == "step":
            found[name] = f"{step_tables(report)}\n\n{origin(report)}"
        elif report["kind"] == "memory":
            found[name] = f"{table(report)}\n\n{origin(report)}"
    found["communication"] = communication_table()
    found |= predicted_parts()
    if "distributed" in reports:
        report = reports["distributed"]
        found["distributed"] = f"{distributed_table(report)}\n\n{origin(report)}"
    if "labels" in reports:
        report = reports["labels"]
        found["labels"] = f"{labels_table(report)}\n\n{origin(report)}"
    if "step" in reports:
        found["summary"] = summary(reports["step"])
        if any(ratios(entry, "first_seconds") for entry in reports["step"]["cases"]):
            found["step-first"] = table(reports["step"], "first_seconds")
    if "scaling" in reports:
        report = reports["scaling"]
        chart = "![Time and memory of a step as its sizes grow](assets/scaling.svg)"
        found["scaling"] = f"{chart}\n\n{scaling_table(report)}\n\n{origin(report)}"
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
