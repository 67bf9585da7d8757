"""``benchmarks kernels`` has cases for every operator, counts right, and times no wrong result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="the benchmarks print with rich")

from benchmarks import kernels, provenance
from benchmarks.__main__ import main
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.exact import Errors, errors, limits
from benchmarks.kernel_cases import KERNEL_CASES, PRECISIONS, default_kernel_cases
from benchmarks.operator_counts import byte_count, operation_count, results_like
from benchmarks.timing import Captured, interleaved
from l2rw_ext.devices import float32_products
from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.ops.formulas import FORMULAS

SMALL = default_kernel_cases("cpu")
CEILINGS = Ceilings(dict.fromkeys(PRECISIONS, 1e12), 1e11)


def test_every_operator_has_cases_on_every_device() -> None:
    for device in ("cpu", "cuda"):
        covered = {KERNEL_CASES[name].operator for name in default_kernel_cases(device)}
        assert covered == set(OPERATORS)


def test_every_precision_is_known() -> None:
    for case in KERNEL_CASES.values():
        assert set(case.precisions) <= set(PRECISIONS), case.name


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_arguments_fit_their_operator(name: str) -> None:
    case = KERNEL_CASES[name]
    for precision in case.precisions:
        arguments = case.draw(precision, "meta")
        results = results_like(case.operator, arguments)
        assert byte_count(case.operator, arguments, results) > 0
        assert operation_count(case.operator, arguments) > 0


@pytest.mark.parametrize(
    ("name", "operations", "moved"),
    [
        # 2 (i + o) + 3 for each of n m pairs; four matrices of 256 x 4096, and u in float32.
        ("factored-256", 256 * 256 * (2 * 8192 + 3), 4 * 256 * 4096 * 2 + 256 * 4),
        (
            "factored-mlp",
            256 * 64 * (2 * (784 + 4 * 1024 + 10) + 3 * 3),
            (256 + 64) * (784 + 4 * 1024 + 10) * 2 + 256 * 4,
        ),
        (
            "dense-16384",
            16384 * 4096 * (2 * 4096 + 3),
            (2 * 16384 * 4096 + 4096 * 4096 + 4096) * 2 + 64 * 4,
        ),
        (
            "resnet32-16-32-32",
            100 * 256 * 32 * (2 * 16 * 9 + 3),
            (100 * 16 * 1024 + 100 * 32 * 256 + 32 * 16 * 9 + 32) * 2 + 100 * 4,
        ),
        # Half of the examples have a weight.
        ("weighted-sum", 50 * 2 * 576 * 512, (50 * 576 * 512 + 100) * 2 + 576 * 512 * 4),
        (
            "linear-weighted",
            128 * 64 * 1024 * (2 * 1024 + 2),
            (2 * 128 * 64 * 1024 + 256) * 2 + (1024 * 1024 + 1024) * 4,
        ),
        # No more rows are read than there are positions.
        (
            "embedding",
            2 * 16384 * 1024,
            16384 * 8 + 2 * 16384 * 1024 * 2 + 64 * 4,
        ),
    ],
)
def test_counts(name: str, operations: int, moved: int) -> None:
    case = KERNEL_CASES[name]
    arguments = case.draw("bf16", "meta")
    results = results_like(case.operator, arguments)
    assert operation_count(case.operator, arguments) == operations
    assert byte_count(case.operator, arguments, results) == moved


@pytest.mark.parametrize("name", SMALL)
def test_a_case_is_checked_and_timed(name: str) -> None:
    case = KERNEL_CASES[name]
    for precision in case.precisions:
        entry = kernels.run_case(case, precision, CEILINGS, repeats=2, warmup=1)
        assert not kernels.wrong(entry)
        assert entry["kernel"]
        others = ["layers apart"] if case.operator == "factored_correlations" else []
        names = [row["name"] for row in entry["candidates"]]
        assert names == ["operator", *others, "composition"]
        for row in entry["candidates"]:
            assert row["status"] == "ok", row
            assert row["eager"]["seconds"] > 0
            assert "captured" not in row
        assert entry["ratios"]["composition"]["eager"] > 0
        assert entry["floor_seconds"] == max(
            entry["operations"] / 1e12, entry["bytes"] / CEILINGS.bytes
        )


def test_narrow_arguments_are_not_all_the_same_number() -> None:
    z = KERNEL_CASES["small-dense"].draw("bf16", "cpu")[0]
    assert z.dtype == torch.bfloat16
    assert z.unique().numel() > 100


@pytest.mark.parametrize("change", [1.001, float("nan"), float("inf")])
def test_a_wrong_operator_is_named_and_not_timed(
    change: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OPERATORS["dense_correlation"]

    def off(*arguments: Any) -> Tensor:
        u = right(*arguments)
        u[1] *= change
        return u

    off.composition = right.composition
    monkeypatch.setitem(OPERATORS, "dense_correlation", off)
    entry = kernels.run_case(KERNEL_CASES["small-dense"], "fp32", CEILINGS, repeats=1, warmup=1)
    assert kernels.wrong(entry)
    operator, composition = entry["candidates"]
    assert operator["status"] == "wrong"
    assert "allowed" in operator["reason"]
    assert "eager" not in operator
    assert composition["status"] == "ok"
    assert composition["eager"]["seconds"] > 0
    assert entry["ratios"] == {}


def test_a_missing_tile_of_a_large_sum_is_wrong() -> None:
    """Against the sum over absolute values it is less than rounding."""
    exact_sum, terms = torch.tensor([1e4]).double(), torch.tensor([1e9]).double()
    (found,) = errors((torch.tensor([1e4 - 10]),), (exact_sum,), (terms,))
    (limit,) = limits("fp32", [torch.float32])
    assert found.of_sum < limit.of_sum
    assert not found.within(limit)
    assert not Errors(float("nan"), 0.0).within(limit)


def test_results_of_another_shape_are_an_error() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"shapes \[\(2,\)\], expected \[\(3,\)\]"):
        errors((one,), (torch.ones(3),), (torch.ones(3),))


def test_an_operator_that_fails_does_not_stop_the_composition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    candidate = kernels.Candidate("operator", partial(torch.mm, torch.ones(2), torch.ones(2)), [])
    kernels.check(candidate, (), ())
    assert candidate.status == "failed"
    assert "RuntimeError" in candidate.reason

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory\nsecond line")

    monkeypatch.setattr(kernels, "run_case", broken)
    entry = kernels.run_safely(KERNEL_CASES["small-dense"], "fp32", CEILINGS, device="cpu")
    assert entry["failed"] == "RuntimeError: out of memory"
    assert kernels.wrong(entry)


class _Graph:
    """Stands for a CUDA graph of ``call`` whose replays write ``result``, or leave it as it is."""

    def __init__(self, call: Callable[[], Tensor], result: Tensor, writes: bool) -> None:
        self.call, self.result, self.writes = call, result, writes

    def replay(self) -> None:
        if self.writes:
            self.result.copy_(self.call())


@pytest.mark.parametrize("writes", [True, False])
def test_a_replay_that_writes_nothing_is_wrong(
    writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = KERNEL_CASES["small-dense"]
    arguments = case.draw("fp32", "cpu")
    (candidate, _) = kernels.candidates(case, "fp32", arguments, "cpu")

    def capture(call: Callable[[], Tensor]) -> Captured[Tensor]:
        result = call()
        graph: Any = _Graph(call, result, writes)
        return Captured(graph, result)

    monkeypatch.setattr(kernels, "capture", capture)
    formula = FORMULAS[case.operator]
    expected, bounds = formula.exact(arguments), formula.magnitudes(arguments)
    kernels.check_captured(candidate, expected, bounds)
    assert candidate.status == ("ok" if writes else "wrong")
    assert writes or candidate.reason.startswith("replayed from a graph")


def test_a_call_that_cannot_be_captured_is_timed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    case = KERNEL_CASES["small-dense"]
    (candidate, _) = kernels.candidates(case, "fp32", case.draw("fp32", "cpu"), "cpu")

    def refused(call: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(kernels, "capture", refused)
    kernels.check_captured(candidate, (), ())
    assert candidate.timed
    assert "not permitted" in candidate.not_captured


@pytest.mark.parametrize("name", ["small-dense", "small-conv"])
def test_the_library_candidate_computes_the_same(name: str) -> None:
    case = KERNEL_CASES[name]
    arguments = case.draw("fp32", "cpu")
    call = kernels.library_call(case, arguments, kernels.example_dots)
    assert call is not None
    (expected,) = FORMULAS[case.operator].exact(arguments)
    torch.testing.assert_close(call().double(), expected, rtol=1e-4, atol=1e-4)
    none = kernels.library_call(KERNEL_CASES["small-normalize"], (), kernels.example_dots)
    assert none is None


def test_products_of_float32_are_as_they_were() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for tf32 in (True, False):
        with float32_products(tf32):
            assert torch.backends.cudnn.allow_tf32 is tf32
            assert (torch.get_float32_matmul_precision() == "highest") is not tf32
        assert (
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
        ) == before


def test_ceilings_are_rates() -> None:
    ceilings = measure_ceilings("cpu", ("fp32",))
    assert ceilings.operations["fp32"] > 1e8
    assert ceilings.bytes > 1e7
    assert ceilings.floor("fp32", 0, int(ceilings.bytes)) == pytest.approx(1)


def test_calls_take_turns() -> None:
    order: list[str] = []
    times = interleaved({name: partial(order.append, name) for name in "abc"}, repeats=3, warmup=0)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert all(len(seconds) == 3 for seconds in times.values())


def test_kernels_command_records_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu" / "kernels.json"
    arguments = ["kernels", "--case", "small-dense", "--precision", "fp32", "--repeats", "2"]
    assert main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["kind"] == "kernels"
    assert report["cache"] == "warm"
    assert report["complete"]
    assert report["ceilings"]["operations"]["fp32"] > 0
    assert provenance.is_current(report)
    capsys.readouterr()
    assert main(["report", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| `dense_correlation`, n 16, T 65, 192->192 | fp32 |" in out
    assert "INCOMPLETE" not in out
    provenance.write(path, {**report, "complete": False})
    main(["report", "--results", str(tmp_path)])
    assert "INCOMPLETE" in capsys.readouterr().out


@pytest.mark.cuda
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_a_case_on_cuda(name: str, cache: str) -> None:
    case = dataclasses.replace(KERNEL_CASES[name], precisions=("bf16", "fp32", "tf32"))
    for precision in case.precisions:
        entry = kernels.run_case(
            case, precision, CEILINGS, device="cuda", repeats=2, warmup=1, cache=cache
        )
        for row in entry["candidates"]:
            assert row["status"] == "ok", row
            assert row["eager"]["seconds"] > 0
            assert row["captured"]["seconds"] > 0, row
            assert row["workspace_bytes"] >= 0
