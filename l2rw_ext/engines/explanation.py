"""What ``explain()`` returns: which engine runs and why, and what each layer costs."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from l2rw_ext.task.task import Task

from .plan import Plan

_TEXT = (0, 1, 2, 4, 7)
"""The columns of the table of layers that are no numbers."""


@dataclass(frozen=True)
class LayerExplanation:
    """One parameter use, as ``explain()`` shows it."""

    name: str
    operation: str
    shape: tuple[int, ...]
    form: str
    positions: int
    multiply_adds: float
    kept_bytes: float
    alternatives: dict[str, float]
    """Estimated seconds of each form, on the machine of docs/kernels.md."""
    direction: str = ""
    """How the direction comes from the other ranks of a merged step: "reduced"; "gathered", for z'
    and g'; "reduced at the end", if parameters are shared or derived."""
    sent_bytes: float = 0.0
    """What a rank sends for it; a shared parameter counts once, at its first use."""


@dataclass(frozen=True)
class Explanation:
    """Which engine runs and why; printable, tables in a notebook, a dict by :meth:`as_dict`."""

    engine: str
    reason: str
    n: int
    m: int
    passes: str
    cost: float
    """Expected multiply-adds over those of a plain step on both batches."""
    memory: str
    """What is kept between scores and weighted gradient."""
    layers: tuple[LayerExplanation, ...] = ()
    proof: str = ""
    """How the engine's numbers were compared with plain autograd's."""
    options: tuple[str, ...] = ()
    """One sentence for each option that changes the weights."""

    @classmethod
    def layerwise(cls, task: Task, plan: Plan, *, low_memory: bool) -> Explanation:
        """The explanation of a layer-wise plan, followed with or without ``low_memory``."""
        layers = []
        plain = paid = 0.0
        for use in plan.uses:
            cost = use.costs[use.form]
            forward = use.costs["dense"].score if "dense" in use.costs else 0.0
            plain += 3 * forward
            paid += 2 * forward + cost.score + cost.weighted + low_memory * forward
            layers.append(
                LayerExplanation(
                    use.name,
                    use.operation,
                    use.shape,
                    use.form + (" (joint)" if use.joint else ""),
                    0 if use.rows is None else use.rows.positions,
                    cost.score + cost.weighted,
                    0.0 if low_memory else cost.kept_bytes,
                    {form: c.seconds for form, c in use.costs.items()},
                    use.sent if plan.messages else "",
                    sum(message.bytes for message in use.messages),
                )
            )
        passes = (
            "one merged forward and backward over [train; clean]"
            if plan.merged
            else f"two passes ({plan.why_separate})"
        )
        if plan.messages:
            passes += f", in which {plan.messages[0].ranks} ranks exchange the direction"
        reason = "every parameter use has a rule and no example reaches another's loss"
        if not plan.certain:
            reason += f"; each step is probed, since {plan.reason}"
        kept = sum(layer.kept_bytes for layer in layers) / 2**20
        memory = "the graph, for a second backward" if low_memory else f"{kept:.2f} MiB"
        if low_memory and task.low_memory == "auto":
            memory += " (low_memory='auto': the model checkpoints)"
        ratio = paid / plain if plain else 1.0
        return cls("layerwise", reason, task.n, task.m, passes, ratio, memory, layers=tuple(layers))

    @classmethod
    def of_graph(
        cls, engine: str, task: Task, reason: str, passes: str, forwards: float, *, given: bool
    ) -> Explanation:
        """The explanation of an engine that keeps autograd's graph of the training forward.

        ``passes`` are those after the clean batch's, which are left out if the direction is
        ``given``. ``forwards`` is the cost for one training example, in forwards of one example. A
        plain step costs 3 forwards, and so does a clean example.
        """
        n, m = task.n, task.m
        passes = passes if given else f"a clean forward and backward, {passes}"
        cost = (forwards * n + 3 * m) / (3 * (n + m))
        return cls(engine, reason, n, m, passes, cost, "the graph of the training forward")

    @property
    def kept_bytes(self) -> float:
        """Bytes kept between scores and weighted gradient."""
        return sum(layer.kept_bytes for layer in self.layers)

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends of the direction in a merged step, by ring algorithms."""
        return sum(layer.sent_bytes for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """The explanation as plain data."""
        return asdict(self) | {"kept_bytes": self.kept_bytes, "sent_bytes": self.sent_bytes}

    def _facts(self) -> Iterator[tuple[str, str]]:
        """What is said of the step as a whole: a word, and a sentence."""
        yield "engine", self.engine
        yield "why", self.reason
        yield "batch", f"{self.n} training and {self.m} clean examples; {self.passes}"
        yield "cost", f"{self.cost:.2f} times the multiply-adds of a plain step on both batches"
        yield "memory", f"kept between scores and weighted gradient: {self.memory}"
        if self.sent_bytes:
            yield "sent", f"{self.sent_bytes / 2**20:.2f} MiB of the direction by each rank"
        if self.proof:
            yield "proof", self.proof
        for option in self.options:
            yield "option", option

    def _table(self) -> list[list[str]]:
        """A header and a row for each layer."""
        header = ["parameters", "operation", "input", "T", "form", "Mmul-add", "kept MiB"]
        rows = [
            [
                layer.name,
                layer.operation,
                "x".join(map(str, layer.shape)),
                str(layer.positions or "?"),
                layer.form,
                f"{layer.multiply_adds / 1e6:.1f}",
                f"{layer.kept_bytes / 2**20:.2f}",
            ]
            for layer in self.layers
        ]
        if self.sent_bytes:
            header += ["direction", "sent MiB"]
            for row, layer in zip(rows, self.layers, strict=True):
                row += [layer.direction, f"{layer.sent_bytes / 2**20:.2f}"]
        return [header, *rows]

    def _lines(self) -> Iterator[str]:
        for word, sentence in self._facts():
            yield f"{word + ':':8}{sentence}"
        if not self.layers:
            return
        yield ""
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            yield "  ".join(
                cell.ljust(width) if i in _TEXT else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        """The same as tables, for a notebook."""
        facts = "".join(_row(["th", "td"], fact) for fact in self._facts())
        parts = [f"<table>{facts}</table>"]
        if self.layers:
            header, *rows = self._table()
            cells = "".join(_row(["td"] * len(header), row) for row in rows)
            parts.append(f"<table>{_row(['th'] * len(header), header)}{cells}</table>")
        return "".join(parts)


def _row(tags: list[str], cells: Iterable[str]) -> str:
    """A row of an HTML table, with numbers to the right, as in the printed one."""
    made = []
    for i, (tag, cell) in enumerate(zip(tags, cells, strict=True)):
        side = "left" if i in _TEXT else "right"
        made.append(f"<{tag} style='text-align: {side}'>{html.escape(cell)}</{tag}>")
    return f"<tr>{''.join(made)}</tr>"
