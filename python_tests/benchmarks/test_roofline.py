"""What a GPU should take is counted right, recorded, and held against what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="the benchmarks print with rich")

from benchmarks import provenance, roofline
from benchmarks.__main__ import main
from benchmarks.cases import CASES, make_case
from benchmarks.counting import COMPOSED, Counted, OperationCounter
from benchmarks.data_sheets import DATA_SHEETS, EAGER_LAUNCH, GRAPH_LAUNCH, GRAPH_NODE
from benchmarks.kernel_cases import KERNEL_CASES
from benchmarks.operations import union_operations
from benchmarks.operator_counts import (
    byte_count,
    operation_count,
    results_like,
    uses_tensor_cores,
)
from benchmarks.predicted import prediction
from benchmarks.predictions import predict, predict_kernel, predict_step
from benchmarks.profile import warm
from l2rw_ext import ops
from l2rw_ext.ops._operator import OPERATORS
from support.paths import ROOT

H100, A100 = DATA_SHEETS["h100"], DATA_SHEETS["a100"]


def count(function: Any, *arguments: Any, tf32: bool = True) -> list[Counted]:
    with torch.no_grad(), OperationCounter(tf32=tf32) as counter:
        function(*arguments)
    return counter.counted


@pytest.mark.parametrize("device", DATA_SHEETS)
def test_our_kernels_reach_no_more_than_the_data_sheet(device: str) -> None:
    sheet = DATA_SHEETS[device]
    assert sheet.own.bytes == sheet.library.bytes
    for precision, rate in sheet.own.operations.items():
        assert 0 < rate <= sheet.library.operations[precision]


@pytest.mark.parametrize(
    ("dtype", "tf32", "precision"),
    [
        (torch.float32, True, "tf32"),
        (torch.float32, False, "fp32"),
        (torch.bfloat16, True, "bf16"),
        (torch.float64, True, "fp64"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_dense_product(dtype: torch.dtype, tf32: bool, precision: str, device: str) -> None:
    a, b = (torch.empty(shape, dtype=dtype, device=device) for shape in ((8, 16), (16, 4)))
    moved = (8 * 16 + 16 * 4 + 8 * 4) * dtype.itemsize
    expected = Counted("mm", 2 * 8 * 16 * 4, moved, precision)
    assert count(torch.matmul, a, b, tf32=tf32) == [expected]


def test_an_operation_bound_by_memory() -> None:
    x = torch.ones(100, 10)
    assert count(torch.relu, x) == [Counted("relu", 0, 2 * 4 * 1000, "tf32")]
    assert count(x.add_, 1) == [Counted("add_", 0, 2 * 4 * 1000, "tf32")]
    # The row that is added to each is read once.
    assert count(torch.add, x, torch.ones(10).expand(100, 10))[0].moved == 4 * 2010


def test_views_and_allocations_are_free() -> None:
    x = torch.ones(4, 6)

    def nothing() -> None:
        x.t().reshape(2, 3, 4).select(0, 1).split(1)
        x.detach().unsqueeze_(0)
        x.new_empty(3)
        torch.empty_like(x)

    assert count(nothing) == []
    assert len(count(x.t().reshape, -1)) == 1


def test_a_model_counted_by_hand() -> None:
    model, x = nn.Linear(4, 3, bias=False), torch.ones(5, 4)
    with OperationCounter(tf32=True) as counter:
        torch.autograd.backward([model(x).sum()])
    product = 2 * 5 * 4 * 3
    assert counter.counted == [
        Counted("mm", product, 4 * (20 + 12 + 15), "tf32"),
        Counted("sum", 0, 4 * (15 + 1), "tf32"),
        Counted("ones_like", 0, 4 * (1 + 1), "tf32"),
        # The gradient of the sum is one number, broadcast.
        Counted("mm", product, 4 * (1 + 20 + 12), "tf32"),
    ]


@pytest.mark.parametrize("name", ["tiny", "mlp-100-10"])
def test_products_of_a_plain_step_are_those_of_the_operation_count(name: str) -> None:
    spec = CASES[name]
    labels = torch.zeros(spec.n).long(), torch.zeros(spec.m).long(), 0.5
    case = make_case(spec, labels)
    step, clear = warm(case, "plain_union")
    clear()
    with OperationCounter(tf32=True) as counter:
        step()
    assert sum(c.operations for c in counter.counted) == 2 * union_operations(case)


def test_a_kernel_of_ours_is_counted_as_by_the_kernel_benchmark() -> None:
    case = KERNEL_CASES["small-dense"]
    arguments = case.draw("bf16", "cpu")
    (found,) = count(ops.dense_correlation, *arguments)
    moved = byte_count(case.operator, arguments, results_like(case.operator, arguments))
    assert found[:5] == (case.operator, operation_count(case.operator, arguments), moved, "bf16", 1)


def test_an_operator_without_a_kernel_is_its_composition() -> None:
    arguments = KERNEL_CASES["small-linear-weighted"].draw("fp32", "cpu")
    found = count(ops.linear_weighted_gradient, *arguments)
    assert "mm" in [c.name for c in found]
    assert {c.part_of for c in found} == {"linear_weighted_gradient"}
    assert not any(c.own for c in found)
    whole = count(OPERATORS["linear_weighted_gradient"].composition, *arguments)
    assert [c._replace(part_of="") for c in found] == whole


def test_which_operators_are_composed() -> None:
    sources = (path.read_text() for path in (ROOT / "csrc" / "cuda" / "ops").glob("*.cu"))
    kernels = {name for text in sources for name in re.findall(r'm\.impl\("(\w+)"', text)}
    assert set(OPERATORS) - kernels == set(COMPOSED)


def test_ordinary_arithmetic() -> None:
    for name, expected in (
        ("resnet32-64-64-8", True),
        ("depthwise-144-28", False),
        ("grouped-128-28-weighted", False),
        ("factored-mlp", True),
        ("weighted-sum", False),
    ):
        case = KERNEL_CASES[name]
        assert uses_tensor_cores(case.operator, case.draw("bf16", "meta")) is expected, name


def test_the_longer_of_operations_and_bytes() -> None:
    product = Counted("mm", 989_000_000, 0, "bf16")
    copy = Counted("copy_", 0, 3_350_000, "fp32")
    found = predict([product, copy, copy], H100, H100.own)
    assert found["bound"] == "launches"
    assert found["captured"]["seconds"] == pytest.approx(GRAPH_LAUNCH + 3 * (1e-6 + GRAPH_NODE))
    assert found["eager"]["seconds"] == pytest.approx(3 * EAGER_LAUNCH)
    large = predict([product._replace(operations=989 * 10**9), copy], H100, H100.own)
    assert large["bound"] == "operations"
    assert large["eager"]["seconds"] == pytest.approx(1e-3 + 1e-6 + 2 * GRAPH_NODE)


def test_a_kernel_has_the_rates_of_its_instruction() -> None:
    case = KERNEL_CASES["dense-16384"]
    operations = 16384 * 4096 * (2 * 4096 + 3)
    overhead = GRAPH_LAUNCH + 2 * GRAPH_NODE
    for sheet, rates in ((H100, {"operator": 0.6 * 989, "warpgroups": 989}), (A100, {"": 312})):
        entry = predict_kernel(case, "bf16", sheet)
        assert entry["floor_seconds"] == pytest.approx(operations / (1e12 * max(rates.values())))
        seconds = [row["captured"]["seconds"] for row in entry["candidates"]]
        expected = [operations / (1e12 * rate) + overhead for rate in rates.values()]
        assert seconds == pytest.approx(expected)
    assert [row["name"] for row in entry["candidates"]] == ["operator"]
    assert not predict_kernel(KERNEL_CASES["linear-weighted"], "bf16", H100)["candidates"]


def test_a_step_says_which_bytes_are_of_compositions() -> None:
    entry = predict_step(CASES["tiny"], H100, ["plain_union", "l2rw_ext"])
    plain, ours = entry["methods"]
    assert 0 < plain["launches"] < ours["launches"]
    assert plain["composed_bytes"] == {}
    assert set(ours["composed_bytes"]) == {"linear_weighted_gradient"}


def kernel(name: str, *candidates: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "precision": "fp32", "candidates": [*candidates], "ratios": {}, **more}


def write(path: Path, kind: str, **more: Any) -> None:
    report = {"kind": kind, "device": "cuda", "command": f"python -m benchmarks {kind}", **more}
    provenance.write(path, report)


def test_predictions_are_recorded_and_held_against_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(roofline, "PREDICTED", tmp_path)
    cases = ["normalize", "dense-16384", "weighted-sum", "batch-norm", "tiny"]
    command = ["roofline", "--device", "h100"]
    assert main([*command, "--case", *cases, "--json", str(tmp_path / "h100.json")]) == 0
    report = json.loads((tmp_path / "h100.json").read_text())
    assert (report["kind"], report["complete"], report["sheet"]) == ("roofline", True, H100.title)
    assert provenance.is_current(report)
    precisions = {(entry["name"], entry["precision"]) for entry in report["kernels"]}
    assert ("dense-16384", "tf32") in precisions
    out = capsys.readouterr().out
    assert "double backward" in out
    assert "weighted-sum bf16" in out

    predicted = {(e["name"], e["precision"]): e["candidates"] for e in report["kernels"]}
    seconds = predicted["normalize", "fp32"][0]["captured"]["seconds"]
    ok = {"name": "operator", "status": "ok", "captured": {"seconds": 3 * seconds}}
    wrong = {"name": "operator", "status": "wrong", "reason": "error 1"}
    eager = {"name": "composition", "status": "ok", "not_captured": "a sync", "eager": {}}
    shown = prediction(report)
    assert re.search(r"\| MLP 6-8-3, 20\+4 \| \d.*\d% \|", shown)
    assert "| `dense_correlation`, nT 16384, 4096->4096 | fp16 | 550.0 | 933 | 562 |" in shown
    assert "weighted" not in shown
    folder = tmp_path / "h100"
    write(
        folder / "kernels.json",
        "kernels",
        cases=[
            kernel("normalize", ok),
            kernel("dense-16384", wrong),
            kernel("weighted-sum", failed="out of memory"),
            kernel("batch-norm", eager),
        ],
    )
    dense = predicted["dense-16384", "bf16"][1]["captured"]["seconds"]
    fast = {"name": "operator", "status": "ok", "captured": {"seconds": 1.25 * dense}}
    write(
        folder / "kernels-warpgroups.json",
        "kernels",
        cases=[kernel("dense-16384", fast) | {"precision": "bf16"}],
        command="L2RW_CUDA_WARPGROUPS=1 python -m benchmarks kernels",
    )
    (step,) = report["steps"]
    plain, ours, _ = step["methods"]
    write(
        folder / "step.json",
        "step",
        tf32=True,
        cases=[
            {
                "name": "tiny",
                "methods": [
                    {
                        "name": "plain_union",
                        "status": "ok",
                        "seconds": 2 * plain["eager"]["seconds"],
                    },
                    {
                        "name": "l2rw_ext_cudagraphs",
                        "status": "ok",
                        "seconds": 1.5 * ours["captured"]["seconds"],
                    },
                    {"name": "l2rw_ext", "status": "failed", "reason": "no luck"},
                ],
            }
        ],
    )
    write(folder / "gpu.json", "gpu", phases=[])
    write(folder / "step-cpu.json", "step", device="cpu", tf32=False, cases=[{}])
    assert main([*command, "--measured", str(folder)]) == 0
    rows = [" ".join(re.findall(r"[^│\s]+", line)) for line in capsys.readouterr().out.split("\n")]

    def row(start: str) -> str:
        (found,) = [line for line in rows if line.startswith(start)]
        return found

    assert row("normalize fp32 operator").endswith(" 3.00")
    assert row("dense-16384 fp32 operator").endswith("- - error 1")
    assert row("dense-16384 tf32 operator").endswith("- - not measured")
    assert row("dense-16384 bf16 warpgroups").endswith(" 1.25")
    assert row("weighted-sum fp32 operator").endswith("- - out of memory")
    assert row("batch-norm fp32 composition").endswith("- - a sync")
    assert row("MLP 6-8-3, 20+4 plain, union (eager)").endswith(" 2.00")
    assert row("MLP 6-8-3, 20+4 l2rw_ext (eager)").endswith("- - no luck")
    assert row("MLP 6-8-3, 20+4 l2rw_ext, CUDA graph (captured)").endswith(" 1.50")
    assert row("MLP 6-8-3, 20+4 double backward (eager)").endswith("- - not measured")


def test_bad_arguments_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["roofline", "--device", "b300"])
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert all(device in shown for device in ("b300", *DATA_SHEETS))
    monkeypatch.setattr(roofline, "PREDICTED", tmp_path)
    compare = ["roofline", "--device", "h100", "--measured", str(tmp_path / "none")]
    assert main(compare) == 2
    assert "h100.json" in capsys.readouterr().err
    provenance.write(tmp_path / "h100.json", {"kind": "roofline", "kernels": [], "steps": []})
    assert main(compare) == 2
    assert "no results of a GPU" in capsys.readouterr().err
