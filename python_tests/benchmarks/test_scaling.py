"""``python -m benchmarks scaling`` measures every size of a sweep; ``report`` shows the ratios."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the benchmarks print with rich")

from benchmarks import memory, pages, provenance, step
from benchmarks.__main__ import main
from benchmarks.cases import make_case
from benchmarks.scaling import SWEEPS


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_grows_in_one_size_alone(name: str) -> None:
    sweep = SWEEPS[name]
    specs = [sweep.case(value) for value in sweep.values]
    assert list(sweep.values) == sorted(sweep.values)
    sizes = []
    for spec in specs:
        model = spec.model()
        parameters = sum(p.numel() for p in model.parameters())
        sizes.append((spec.n, spec.m, len(list(model.modules())), parameters, spec.input_shape))
    changing = {
        "n": {0, 1},
        "share": {1},
        "depth": {2, 3},
        "width": {3},
        "length": {3, 4},
    }[name]
    for k in range(5):
        assert len({size[k] for size in sizes}) == (len(specs) if k in changing else 1)


def test_the_smallest_cases_have_half_positive_scores() -> None:
    for sweep in SWEEPS.values():
        assert 0.45 <= make_case(sweep.case(sweep.values[0])).rho <= 0.55


def test_scaling_command_records_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a memory that is not measured, for which each method needs a process."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(memory, "measure", lambda *rest, **options: {"first": 3e6, "later": 2e6})
    path = tmp_path / "cpu" / "scaling.json"
    arguments = ["scaling", "--quick", "--sweep", "n", "--repeats", "2", "--json", str(path)]
    assert main(arguments) == 0
    report = provenance.read(path)
    assert report["complete"]
    assert [entry["value"] for entry in report["cases"]] == [32, 64]
    (growing,) = (pages.growth(entries) for entries in pages.sweeps(report).values())
    for name in ("plain_union", "l2rw_ext"):
        for value in (32, 64):
            assert min(growing[name][value].values()) > 0
            assert set(growing[name][value]) == {"seconds", "bytes", "time", "memory"}
    for entry in report["cases"]:
        assert all(row["status"] == "ok" for row in entry["step"]["methods"])
    capsys.readouterr()
    assert main(["report", "--results", str(tmp_path), "--charts", str(tmp_path)]) == 0
    assert "| n, with m = n/4: 32, 64 | l2rw_ext | " in capsys.readouterr().out
    assert "<svg" in (tmp_path / "scaling.svg").read_text()
    page = pages.parts({"scaling": report})["scaling"]
    assert "](assets/scaling.svg)" in page
    assert pages.scaling_table(report) in page


@pytest.mark.parametrize(("status", "expected"), [("ok", 0), ("wrong", 1), ("failed", 1)])
def test_a_wrong_answer_of_ours_ends_with_1(
    status: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"name": "l2rw_ext", "label": "l2rw_ext", "kind": "exact", "status": status}
    monkeypatch.setattr(step, "run_case", lambda *rest, **options: {"methods": [row]})
    monkeypatch.setattr(memory, "run_case", lambda *rest, **options: {"methods": []})
    assert main(["scaling", "--quick", "--sweep", "n"]) == expected
