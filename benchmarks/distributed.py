"""``python -m benchmarks distributed``: a step on two ranks, and what it sends.

Two processes with one thread each and gloo between them make every step at the same time. A rank
has n training and m clean examples. Its plain step through DistributedDataParallel on both batches
is the yardstick of the reweighted one, whose clean batches are those of the rank (*sharded*) or the
same on both (*replicated*). Beside it both ranks make steps alone, plain and reweighted: the ratio
that one process has on this machine while the other core is busy. Scores, weights and gradients are
compared with the float64 oracle of the union in the same run.

Time is that of the slower rank; methods take turns. The bytes are those of one step more.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import pickle
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from l2rw_ext import Reweighter
from l2rw_ext.reference import relative_error

from . import provenance
from .cases import CASES, Batch, Case, CaseSpec, make_case
from .communication import Collectives, communication_table
from .expected import Oracle, gradient_error, oracle
from .methods import FIRST_STEPS, Outcome
from .step import error_limits
from .timing import without_collection

RANKS = 2
DEFAULT = ("mlp-256-64", "lenet", "resnet-100-10", "gpt")
TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Union:
    """The batches of all ranks, in their order, as one case, and what must come out."""

    case: Case
    truth: Oracle
    limits: dict[str, float]


@dataclass(frozen=True)
class Method:
    """A way to make a step on each rank; ``yardstick`` is the plain step that it is held to.

    Without ``wrapped`` a rank is alone. A reweighted method is checked against the union of its
    training batches and of the clean batches, which may be one.
    """

    name: str
    label: str
    wrapped: bool
    reweighted: bool
    replicated: bool = False

    @property
    def yardstick(self) -> str:
        """The plain step in the same surroundings."""
        return "plain_ddp" if self.wrapped else "plain_alone"


METHODS = {
    method.name: method
    for method in (
        Method("plain_ddp", "plain, DDP", wrapped=True, reweighted=False),
        Method("sharded", "reweighted, clean sharded", wrapped=True, reweighted=True),
        Method(
            "replicated",
            "reweighted, clean replicated",
            wrapped=True,
            reweighted=True,
            replicated=True,
        ),
        Method("plain_alone", "plain, one process", wrapped=False, reweighted=False),
        Method("alone", "reweighted, one process", wrapped=False, reweighted=True),
    )
}


def _part(batch: Batch, rank: int, size: int) -> Batch:
    x, y = batch
    return x[rank * size : (rank + 1) * size], y[rank * size : (rank + 1) * size]


def union_of_ranks(spec: CaseSpec, *, replicated: bool) -> Union:
    """A case with the examples of all ranks, its oracle, and the errors that are allowed."""
    m = spec.m if replicated else RANKS * spec.m
    case = make_case(replace(spec, n=RANKS * spec.n, m=m))
    truth = oracle(case)
    case.rho = truth.rho
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Union(case, truth, error_limits(case, truth))


class Prepared:
    """A method on one rank, with a model and data of its own."""

    def __init__(self, method: Method, spec: CaseSpec, union: Union, rank: int) -> None:
        self.method = method
        own = union.case.copy()
        self._model = own.model
        train = _part(own.train, rank, spec.n)
        clean = own.clean if method.replicated else _part(own.clean, rank, spec.m)
        model = DistributedDataParallel(own.model) if method.wrapped else own.model
        if method.reweighted:
            reweighter = Reweighter(model, own.loss, replicated_clean=method.replicated)

            def step() -> Outcome:
                found = reweighter.backward(train, clean)
                return Outcome(found.scores, found.weights, found.engine)
        else:
            x, y = (torch.cat(pair) for pair in zip(train, clean, strict=True))

            def step() -> Outcome:
                own.loss(model(x), y).mean().backward()
                return Outcome(None, None)

        self.make: Callable[[], Outcome] = step

    def step(self) -> tuple[Outcome, float]:
        """One step onto no gradients, which all ranks begin together, and its seconds here."""
        for p in self._model.parameters():
            p.grad = None
        dist.barrier()
        start = time.perf_counter()
        outcome = self.make()
        return outcome, time.perf_counter() - start

    def errors(self, outcome: Outcome, union: Union, rank: int) -> dict[str, float]:
        """Relative errors of this rank's scores and weights and of the gradient."""
        assert outcome.scores is not None
        assert outcome.weights is not None
        n = outcome.scores.numel()
        own = slice(rank * n, (rank + 1) * n)
        return {
            "scores": relative_error(outcome.scores, union.truth.scores[own]),
            "weights": relative_error(outcome.weights, union.truth.weights[own]),
            "gradient": gradient_error(self._model, union.truth.gradient),
        }


def measure_here(
    spec: CaseSpec, unions: dict[bool, Union], rank: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """What this rank finds of every method: errors, seconds, engine, and bytes by kind."""
    prepared = [Prepared(m, spec, unions[m.replicated], rank) for m in METHODS.values()]
    found: dict[str, dict[str, Any]] = {p.method.name: {"seconds": []} for p in prepared}
    for p in prepared:
        for _ in range(FIRST_STEPS):
            outcome, _ = p.step()
        if p.method.wrapped and p.method.reweighted:
            union = unions[p.method.replicated]
            found[p.method.name] |= {"errors": p.errors(outcome, union, rank)}
        if p.method.reweighted:
            found[p.method.name]["engine"] = outcome.engine
        if p.method.wrapped:
            dist.barrier()
            with Collectives(RANKS) as collectives:
                p.make()
            found[p.method.name]["bytes"] = collectives.counts
    with without_collection():
        for repeat in range(repeats):
            gc.collect()
            for k in range(len(prepared)):
                p = prepared[(k + repeat) % len(prepared)]
                found[p.method.name]["seconds"].append(p.step()[1])
    return found


def _work(rank: int, folder: str, spec: CaseSpec, repeats: int) -> None:
    """A process that measures and leaves what it found in a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
    unions = pickle.loads(Path(folder, "unions").read_bytes())
    found = measure_here(spec, unions, rank, repeats)
    Path(folder, str(rank)).write_bytes(pickle.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way


def measured(spec: CaseSpec, unions: dict[bool, Union], repeats: int) -> list[dict[str, Any]]:
    """What each rank has found, by rank.

    Raises:
        ProcessRaisedException: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "unions").write_bytes(pickle.dumps(unions))
        spawn(_work, (folder, spec, repeats), nprocs=RANKS)
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(RANKS)]


def _row(method: Method, ranks: list[dict[str, Any]], limits: dict[str, float]) -> dict[str, Any]:
    """A method of all ranks: the slower one's times, the larger errors, the bytes of the first."""
    own = [rank[method.name] for rank in ranks]
    times = [max(pair) for pair in zip(*(x["seconds"] for x in own), strict=True)]
    row: dict[str, Any] = {
        "name": method.name,
        "label": method.label,
        "kind": "exact" if method.reweighted else "union",
        "status": "ok",
        "seconds": statistics.median(times),
        "seconds_min": min(times),
    }
    if "engine" in own[0]:
        row["engine"] = own[0]["engine"]
    if "bytes" in own[0]:
        row["bytes"] = own[0]["bytes"]
    if "errors" in own[0]:
        row["errors"] = {k: max(x["errors"][k] for x in own) for k in own[0]["errors"]}
        off = {k: v for k, v in row["errors"].items() if not v <= limits[k]}
        if off:
            row["status"] = "wrong"
            row["reason"] = ", ".join(
                f"{k} error {v:.1e}, allowed {limits[k]:.1e}" for k, v in off.items()
            )
    if method.name != method.yardstick:
        plain = [rank[method.yardstick]["seconds"] for rank in ranks]
        against = [max(pair) for pair in zip(*plain, strict=True)]
        row["yardstick"] = method.yardstick
        row["ratio"] = statistics.median(times) / statistics.median(against)
        pairs = [a / b for a, b in zip(times, against, strict=True)]
        low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
        row["ratio_quartiles"] = [low, high]
    return row


def run_case(spec: CaseSpec, repeats: int) -> dict[str, Any]:
    """Check and time all methods on one case; one entry of the report's ``cases``."""
    unions = {flag: union_of_ranks(spec, replicated=flag) for flag in (False, True)}
    ranks = measured(spec, unions, repeats)
    checked = [m for m in METHODS.values() if m.reweighted and m.wrapped]
    return {
        "name": spec.name,
        "title": f"{spec.title} on each of {RANKS} ranks",
        "n": spec.n,
        "m": spec.m,
        "rho": unions[False].case.rho,
        "repeats": repeats,
        "error_limits": {m.name: unions[m.replicated].limits for m in checked},
        "methods": [_row(m, ranks, unions[m.replicated].limits) for m in METHODS.values()],
    }


def table(entry: dict[str, Any]) -> Table:
    """One case as a table."""
    out = Table(title=f"{entry['title']}   ρ {entry['rho']:.2f}", title_justify="left")
    out.add_column("method", no_wrap=True)
    for name in ("ms", "ratio", "quartiles", "score error", "kB sent"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("note")
    for row in entry["methods"]:
        sent = sum(kind["sent"] for kind in row.get("bytes", {}).values())
        note = "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
        out.add_row(
            row["label"],
            f"{1e3 * row['seconds']:.2f}",
            f"{row['ratio']:.2f}" if "ratio" in row else "-",
            "{:.2f}-{:.2f}".format(*row["ratio_quartiles"]) if "ratio" in row else "",
            f"{row['errors']['scores']:.0e}" if "errors" in row else "",
            f"{sent / 1e3:,.1f}" if sent else "",
            note or row.get("engine", ""),
        )
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``distributed``."""
    parser.add_argument("--case", nargs="+", choices=list(CASES), metavar="NAME", dest="cases")
    parser.add_argument("--repeats", type=provenance.positive, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="record the results")
    parser.add_argument(
        "--computed", action="store_true", help="only compute what 8 to 512 GPUs would send"
    )
    parser.epilog = f"cases: {', '.join(CASES)}; default: {', '.join(DEFAULT)}."


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status is 1 where a reweighted step is wrong."""
    if args.computed:
        print(communication_table())
        return 0
    torch.set_num_threads(1)  # as each rank has, so that the record says so
    report = provenance.header("distributed", "cpu", sys.argv[1:])
    report |= {"ranks": RANKS, "cases": [], "complete": False}
    console = Console()
    for name in args.cases or DEFAULT:
        entry = run_case(CASES[name], args.repeats)
        report["cases"].append(entry)
        if args.json:
            provenance.write(args.json, report)
        console.print(table(entry))
    provenance.complete(args.json, report, console)
    wrong = any(r["status"] != "ok" for e in report["cases"] for r in e["methods"])
    return 1 if wrong else 0
