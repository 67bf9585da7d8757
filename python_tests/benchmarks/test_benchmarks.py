"""The benchmarks have fixed cases, check methods by the oracle, and record what they measure."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="the benchmarks print with rich")

from benchmarks import memory, operations, pages, provenance, step
from benchmarks.__main__ import main
from benchmarks.architectures import GPT, Autocast, low_rank
from benchmarks.cases import CASES, RHO_RANGE, Case, CaseSpec, left_out, make_case
from benchmarks.expected import oracle
from benchmarks.methods import FIRST_STEPS, METHODS, Method, Outcome, Step, with_plain
from benchmarks.step import run_case

TINY = CASES["tiny"]


def rows(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in entry["methods"]}


@pytest.mark.parametrize("name", ["tiny", "lenet", "mlp-100-10"])
def test_labels_are_drawn_for_half_positive_scores(name: str) -> None:
    case = make_case(CASES[name])
    assert RHO_RANGE[0] <= case.rho <= RHO_RANGE[1]
    truth = oracle(case)
    assert truth.rho == pytest.approx(case.rho, abs=0.02)


@pytest.mark.parametrize("changes", [{"coupled": True}, {"n": 11, "m": 3}])
def test_a_case_is_the_same_each_time(changes: dict[str, Any]) -> None:
    spec = dataclasses.replace(TINY, **changes)
    first, second = make_case(spec), make_case(spec)
    assert torch.equal(first.train[0], second.train[0])
    assert torch.equal(first.train[1], second.train[1])
    assert torch.equal(first.clean[1], second.clean[1])
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp-256-64", 0.81),
        ("mlp-100-10", 0.80),
        ("lenet", 0.98),
        ("gpt-32-2", 1.00),
        ("lora-32-2", 1.00),
    ],
)
def test_operation_counts(name: str, expected: float) -> None:
    spec = CASES[name]
    labels = torch.zeros(spec.n).long(), torch.zeros(spec.m).long(), 0.5
    assert operations.operation_bound(make_case(spec, labels)) == pytest.approx(expected, abs=0.01)


def test_step_report_of_one_case() -> None:
    names = ("plain", "l2rw_ext", "double_backward", "jvp", "finite_difference")
    entry = run_case(TINY, [METHODS[name] for name in names], repeats=3, warmup=1)
    assert {"name", "title", "n", "m", "rho", "operation_bound", "repeats"} <= entry.keys()
    found = rows(entry)
    assert set(found) == {*names, "plain_union"}
    for name, row in found.items():
        assert row["status"] == ("approximate" if name == "finite_difference" else "ok"), row
        assert row["seconds"] > 0
        assert row["ratio"] > 0
        assert row["ratio_n"] == pytest.approx(row["seconds"] / found["plain"]["seconds"])
        assert len(row["ratio_quartiles"]) == len(row["ratio_n_quartiles"]) == 2
    assert found["plain_union"]["ratio"] == 1
    assert found["plain"]["ratio_n"] == 1
    assert found["l2rw_ext"]["engine"] == "layerwise"
    for name in ("l2rw_ext", "double_backward", "jvp"):
        assert max(found[name]["errors"].values()) < 2e-6


def _with_error(scale: float) -> Method:
    def prepare(case: Case) -> Step:
        step = METHODS["double_backward"].prepare(case)

        def off() -> Outcome:
            outcome = step()
            assert outcome.scores is not None
            scores = outcome.scores.clone()
            scores[0] += scale * scores.abs().max()
            return Outcome(scores, outcome.weights)

        return off

    return Method("off", "off", "exact", prepare)


def _with_wrong_gradient(case: Case, method: str = "double_backward") -> Step:
    """A step whose gradient is off by a thousandth."""
    step = METHODS[method].prepare(case)

    def off() -> Outcome:
        outcome = step()
        for p in case.model.parameters():
            assert p.grad is not None
            p.grad *= 1.001
        return outcome

    return off


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        (_with_error(1e-3), "scores"),
        (_with_error(float("nan")), "scores"),
        (Method("off", "off", "exact", _with_wrong_gradient), "gradient"),
    ],
)
def test_a_wrong_method_is_named_and_not_timed(method: Method, wrong: str) -> None:
    row = rows(run_case(TINY, [method], repeats=2, warmup=1))["off"]
    assert row["status"] == "wrong"
    assert wrong in row["reason"]
    assert "seconds" not in row
    assert "ratio" not in row


def test_a_method_that_fails_does_not_stop_the_others() -> None:
    def broken(case: Case) -> Step:
        raise RuntimeError("no such layer\nsecond line")

    entry = run_case(
        TINY, [Method("broken", "broken", "exact", broken), METHODS["plain"]], repeats=2, warmup=1
    )
    assert rows(entry)["broken"]["reason"] == "RuntimeError: no such layer"
    assert rows(entry)["plain"]["status"] == "ok"


def test_a_method_that_is_not_installed_says_so() -> None:
    method = Method("x", "x", "exact", METHODS["plain"].prepare, requires="no_such_module")
    row = rows(run_case(TINY, [method], repeats=2, warmup=1))["x"]
    assert row["status"] == "not installed"
    assert "no_such_module" in row["reason"]


def test_step_command_records_where_numbers_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "folder" / "step.json"
    arguments = ["step", "--case", "tiny", "--methods", "l2rw_ext", "--repeats", "2"]
    assert main([*arguments, "--json", str(path)]) == 0
    assert "MLP 6-8-3" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["kind"] == "step"
    assert report["device"] == "cpu"
    found = rows(report["cases"][0])
    assert set(found) == {"plain", "plain_union", "l2rw_ext"}
    assert all(row["ratio_n"] > 0 for row in found.values())
    for field in ("date", "command", "commit"):
        assert report[field]
    assert {"cpu", "cores", "threads"} <= report["machine"].keys()
    assert {"python", "torch"} <= report["versions"].keys()
    assert report["sources"] == provenance.source_hash("cpu")
    assert provenance.is_current(report)


def test_source_hash_follows_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "a.cpp").write_text("one")
    first = provenance.source_hash("cpu", tmp_path)
    (folder / "notes.txt").write_text("not a source")
    assert provenance.source_hash("cpu", tmp_path) == first
    (folder / "a.cpp").write_text("two")
    second = provenance.source_hash("cpu", tmp_path)
    (folder / "a.cpp").rename(folder / "b.cpp")
    assert len({first, second, provenance.source_hash("cpu", tmp_path)}) == 3


def test_settings_in_the_environment_are_part_of_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in provenance.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert provenance.header("step", "cpu", ["step"])["command"] == "python -m benchmarks step"
    monkeypatch.setenv("L2RW_CPU_ISA", "avx2")
    command = provenance.header("step", "cpu", ["step"])["command"]
    assert command == "L2RW_CPU_ISA=avx2 python -m benchmarks step"


def test_cuda_sources_make_no_number_of_a_cpu_old(tmp_path: Path) -> None:
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    before = [provenance.source_hash(device, tmp_path) for device in ("cpu", "cuda:0")]
    (folder / "a.cu").write_text("kernel")
    after = [provenance.source_hash(device, tmp_path) for device in ("cpu", "cuda:0")]
    assert before[0] == after[0]
    assert before[1] != after[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_measured_in_a_subprocess() -> None:
    spec = CASES["mlp-100-10"]
    entry = memory.run_case(spec, [METHODS["l2rw_ext"], METHODS["double_backward"]])
    found = rows(entry)
    parameters = 4 * 1_863_690
    for name in ("plain_union", "l2rw_ext", "double_backward"):
        assert "failed" not in found[name], found[name]
        # A step makes at least the gradients, which are as large as the parameters.
        assert parameters <= found[name]["later"] < 20 * parameters
    assert found["double_backward"]["ratio"] > 1.3
    assert found["l2rw_ext"]["ratio"] < found["double_backward"]["ratio"]


def test_memory_of_a_compiled_step_is_compared_with_a_compiled_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = {"l2rw_ext_compiled": 3e6, "plain_union_compiled": 2e6}
    monkeypatch.setattr(
        memory, "measure", lambda _, m, **options: {"first": 4e6, "later": held[m.name]}
    )
    found = rows(memory.run_case(TINY, [METHODS["l2rw_ext_compiled"]]))
    assert {name: row["ratio"] for name, row in found.items()} == {
        "l2rw_ext_compiled": 1.5,
        "plain_union_compiled": 1,
    }


def test_report_draws_a_chart_and_says_what_is_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "cpu"
    report = provenance.header("step", "cpu", ["step"])
    report["cases"] = [run_case(TINY, [METHODS["l2rw_ext"]], repeats=2, warmup=1)]
    provenance.write(folder / "step.json", report)
    chart = tmp_path / "charts" / "step.svg"
    arguments = ["report", "--results", str(tmp_path), "--charts", str(chart.parent), "--check"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "of the present sources" in out
    assert "| MLP 6-8-3, 20+4 | 0." in out
    assert "<svg" in chart.read_text()
    provenance.write(folder / "step.json", {**report, "sources": "other"})
    assert main(arguments) == 1
    assert "OLDER than the sources" in capsys.readouterr().out


def test_report_of_another_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import report as reports

    monkeypatch.setattr(reports, "ASSETS", tmp_path / "assets")
    report = provenance.header("step", "cpu", ["step"])
    report["machine"]["gpu"] = "NVIDIA Fake"
    report["cases"] = [run_case(TINY, [METHODS["l2rw_ext"]], repeats=2, warmup=1)]
    provenance.write(tmp_path / "fake" / "step.json", report)
    arguments = ["report", "--results", str(tmp_path), "--device", "fake"]
    assert main(arguments) == 0
    assert "of the present sources" in capsys.readouterr().out
    assert "NVIDIA Fake" in (tmp_path / "assets" / "step-fake.svg").read_text()
    page = tmp_path / "page.md"
    page.write_text("as it was")
    assert main([*arguments, "--fill", str(page)]) == 2
    assert "the pages show the results of cpu, not of fake" in capsys.readouterr().err
    assert page.read_text() == "as it was"


def test_an_unfinished_run_keeps_its_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(spec: CaseSpec, *rest: Any, **options: Any) -> dict[str, Any]:
        if spec.name != "tiny":
            raise KeyboardInterrupt
        return run_case(spec, *rest, **options)

    monkeypatch.setattr(step, "run_case", stopped)
    path = tmp_path / "step.json"
    arguments = ["step", "--case", "tiny", "lenet", "--methods", "plain", "--repeats", "2"]
    assert main([*arguments, "--json", str(path)]) == 130
    report = provenance.read(path)
    assert [entry["name"] for entry in report["cases"]] == ["tiny"]
    assert not report["complete"]


CUDA_GRAPHS = (
    "plain_union_captured",
    "plain_union_reduce_overhead",
    "l2rw_ext_cudagraphs",
    "l2rw_ext_reduce_overhead",
)


def test_a_cuda_graph_needs_cuda() -> None:
    found = rows(run_case(TINY, [METHODS[name] for name in CUDA_GRAPHS], repeats=2, warmup=1))
    for name in CUDA_GRAPHS:
        assert found[name]["status"] == "failed"
        assert "needs a CUDA device" in found[name]["reason"]
    assert found["plain_union"]["ratio"] == 1


def _slower(seconds: float) -> Callable[[Case], Step]:
    """The plain step on the union, and some sleep."""

    def prepare(case: Case) -> Step:
        step = METHODS["plain_union"].prepare(case)

        def late() -> Outcome:
            time.sleep(seconds)
            return step()

        return late

    return prepare


@pytest.mark.parametrize(("eager", "compiled"), [(0.05, 0.0), (0.0, 0.05)])
def test_the_faster_plain_step_is_the_yardstick(eager: float, compiled: float) -> None:
    methods = [
        dataclasses.replace(METHODS[name], prepare=_slower(seconds))
        for name, seconds in (("plain_union", eager), ("plain_union_compiled", compiled))
    ]
    entry = run_case(TINY, [*methods, METHODS["plain"]], repeats=3, warmup=1)
    fast, slow = sorted(methods, key=lambda m: (m.name == "plain_union") == (eager > compiled))
    assert entry["yardstick"] == fast.name
    found = rows(entry)
    assert found[fast.name]["ratio"] == 1
    for name in (slow.name, "plain"):
        assert found[name]["ratio"] == pytest.approx(
            found[name]["seconds"] / found[fast.name]["seconds"]
        )
    assert found[slow.name]["ratio"] > 1


def test_a_step_is_held_against_the_plain_one_that_runs_in_the_same_way() -> None:
    names = ("plain", "plain_compiled", "l2rw_ext", "jvp_compiled")
    methods = [
        dataclasses.replace(METHODS[name], prepare=METHODS[eager].prepare)
        for name, eager in zip(names, ("plain", "plain", "l2rw_ext", "jvp"), strict=True)
    ]
    found = rows(run_case(TINY, methods, repeats=3, warmup=1))
    for name, plain in zip(names, 2 * ("plain", "plain_compiled"), strict=True):
        expected = found[name]["seconds"] / found[plain]["seconds"]
        assert found[name]["ratio_n"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("l2rw_ext_flat", ["plain"]),
        ("l2rw_ext_compiled", ["plain_compiled"]),
        ("l2rw_ext_cudagraphs", []),
    ],
)
def test_plain_steps_are_added_to_the_methods(name: str, plain: list[str]) -> None:
    assert {method.name for method in with_plain([METHODS[name]])} == {name, *plain}


@pytest.mark.parametrize(
    ("name", "other", "wrong"),
    [
        ("plain_union_compiled", "plain", "union gradient"),
        ("plain_compiled", "plain_union", "training gradient"),
    ],
)
def test_a_wrong_plain_step_is_no_yardstick(name: str, other: str, wrong: str) -> None:
    """It has the gradient of the other batch."""
    method = dataclasses.replace(METHODS[name], prepare=METHODS[other].prepare)
    entry = run_case(TINY, [method], repeats=2, warmup=1)
    row = rows(entry)[name]
    assert row["status"] == "wrong"
    assert wrong in row["reason"]
    assert entry["yardstick"] == "plain_union"


def _small_gpt() -> GPT:
    return GPT(vocabulary=12, tokens=6, width=8, layers=1, heads=2)


@pytest.mark.parametrize("name", ["gpt-32-2", "lora-32-2", "gpt-32-2-bf16", "lora-32-2-bf16"])
def test_small_cases_like_those_with_few_clean_examples(name: str) -> None:
    spec = CASES[name]
    if left_out(spec, "cpu"):
        pytest.skip("bfloat16 is emulated on this processor")

    def model() -> nn.Module:
        small: nn.Module = low_rank(_small_gpt(), rank=2) if "lora" in name else _small_gpt()
        return Autocast(small) if spec.bf16 else small

    spec = dataclasses.replace(spec, model=model, input_shape=(6,), classes=12)
    names = ("plain", "l2rw_ext", "double_backward", "jvp", "finite_difference")
    entry = run_case(spec, [METHODS[n] for n in names], repeats=2, warmup=1)
    assert entry["m"] / entry["n"] == 1 / 16
    for row in entry["methods"]:
        assert row["status"] == ("approximate" if row["name"] == "finite_difference" else "ok"), row
    # The oracle is in float64 all the same.
    error = rows(entry)["l2rw_ext"]["errors"]["scores"]
    assert (error > 1e-3) == spec.bf16


def test_only_products_of_low_rank_are_trained() -> None:
    model = low_rank(_small_gpt(), rank=2)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [
        f"blocks.0.{layer}.{part}.weight"
        for layer in ("qkv", "projection", "fc1", "fc2")
        for part in ("down", "up")
    ]


def test_a_case_is_left_out_where_bfloat16_is_emulated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    path = tmp_path / "cpu" / "step-sixteenth.json"
    arguments = ["step", "--case", "tiny", "lora-32-2-bf16", "--methods", "plain", "--repeats", "2"]
    assert main([*arguments, "--json", str(path)]) == 0
    assert "left out: the processor has none of" in " ".join(capsys.readouterr().out.split())
    assert not provenance.read(path)["cases"][1]["methods"]
    assert main(["report", "--results", str(tmp_path)]) == 0
    assert "bfloat16, left out: the processor has none of" in capsys.readouterr().out
    assert left_out(CASES["lora-32-2-bf16"], "cuda") is None


def test_tables_have_both_denominators_where_they_were_recorded() -> None:
    report = provenance.header("step", "cpu", ["step"])
    methods = [METHODS["plain"], METHODS["l2rw_ext"]]
    report["cases"] = [run_case(TINY, methods, repeats=2, warmup=1)]
    (entry,) = report["cases"]
    both = pages.markdown(report)
    over_n = entry["operation_bound"] * 24 / 20
    assert f"| {entry['rho']:.2f} | {over_n:.2f} |" in both
    for row in entry["methods"]:
        del row["ratio_n"]
    assert both.startswith(pages.markdown(report) + "\n\nThe same times over")


def test_limits_are_those_of_the_worst_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarsely(case: Case, seed: int) -> None:
        for p in case.model.parameters():
            p.data *= 1 + 1e-3 * seed

    case = make_case(TINY)
    truth = oracle(case)
    before, usual = copy.deepcopy(case.model), step.error_limits(case, truth)
    monkeypatch.setattr(step, "_round", coarsely)
    limits = step.error_limits(case, truth)
    assert all(limit < 1e-5 for limit in usual.values())
    assert all(limit > 1e-4 for limit in limits.values())
    for p, q in zip(before.parameters(), case.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_plain_step_that_rounds_more_is_a_yardstick() -> None:
    prepare = partial(_with_wrong_gradient, method="plain_union")
    rounds = dataclasses.replace(METHODS["plain_union_compiled"], prepare=prepare)
    row = rows(run_case(TINY, [rounds], repeats=2, warmup=1))["plain_union_compiled"]
    assert row["status"] == "approximate"
    assert row["errors"]["union gradient"] == pytest.approx(1e-3, rel=0.01)
    assert "ratio" in row


def test_the_first_steps_are_timed_apart_and_the_last_of_them_is_checked() -> None:
    """This one is slow at first, and wrong from its third step on, as a wrong graph would be."""

    def prepare(case: Case) -> Step:
        time.sleep(0.02)
        step, wrong = METHODS["l2rw_ext"].prepare(case), _with_wrong_gradient(case)
        calls = iter(range(1000))

        def late() -> Outcome:
            call = next(calls)
            time.sleep(0.05 if call < 2 else 0)
            return step() if call < 2 else wrong()

        return late

    row = rows(run_case(TINY, [Method("off", "off", "exact", prepare)], repeats=2, warmup=1))["off"]
    assert row["status"] == "wrong"
    assert "gradient" in row["reason"]
    assert len(row["first_steps"]) == FIRST_STEPS
    assert row["first_steps"][0] > 0.07
    assert row["first_steps"][1] > 0.05
    assert row["first_seconds"] == pytest.approx(sum(row["first_steps"]))


@pytest.mark.parametrize(
    "name",
    ["plain_compiled", "plain_union_compiled", "jvp_compiled", "double_backward_compiled"],
)
def test_a_compiled_method_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the graph that a backend is given; inductor would take long, and has tests of its own."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    entry = run_case(TINY, [METHODS[name]], repeats=2, warmup=1)
    row = rows(entry)[name]
    assert row["status"] == "ok", row
    assert max(row["errors"].values()) < 2e-6
    assert row["ratio"] > 0
    assert entry["yardstick"] in ("plain_union", "plain_union_compiled")


@pytest.mark.parametrize("name", ["l2rw_ext_flat", "l2rw_ext_compiled"])
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_a_step_of_ours_as_one_graph_is_right(name: str) -> None:
    row = rows(run_case(TINY, [METHODS[name]], repeats=2, warmup=1))[name]
    assert row["status"] == "ok", row
    assert row["engine"] == "layerwise"
    assert max(row["errors"].values()) < 2e-6


@pytest.mark.cuda
def test_steps_from_cuda_graphs_are_right() -> None:
    names = (*CUDA_GRAPHS, "plain_union_compiled", "l2rw_ext", "l2rw_ext_compiled")
    entry = run_case(TINY, [METHODS[n] for n in names], repeats=2, warmup=1, device="cuda")
    found = rows(entry)
    for name in names:
        assert found[name]["status"] == "ok", found[name]
    assert min(row["ratio"] for row in found.values()) <= 1
    assert found[entry["yardstick"]]["ratio"] == 1


def test_profile_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--case", "tiny", "--repeats", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "intercepted calls" in out
    assert "reweighter.py" in out
    assert "aten::addmm" in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["step", "--case", "no-such-case"],
        ["step", "--methods", "no-such-method"],
        ["step", "--repeats", "0"],
        ["step", "--device", "toaster"],
        ["step", "--tf32"],
        ["memory", "--device", "toaster"],
        ["scaling", "--device", "toaster"],
        ["scaling", "--sweep", "no-such-sweep"],
        ["kernels", "--case", "no-such-case"],
        ["kernels", "--device", "toaster"],
        ["kernels", "--precision", "int8"],
        ["kernels", "--case", "small-dense", "--precision", "tf32"],
        ["kernels", "--cache", "cold"],
        ["demo", "--steps", "0"],
        ["demo", "--imbalance", "x"],
        ["demo", "--engine", "steam"],
        ["demo", "--lr", "-1"],
        ["report", "--results", "no/such/folder"],
    ],
)
def test_bad_arguments_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """So they do in every command; the demo names the option."""
    status: object
    try:
        status = main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    error = capsys.readouterr().err
    assert error.strip()
    assert arguments[:1] != ["demo"] or arguments[1] in error


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    shown = capsys.readouterr().out
    for command in ("step", "kernels", "memory", "scaling", "profile", "report", "demo"):
        assert command in shown
