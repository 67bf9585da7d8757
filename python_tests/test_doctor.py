"""The doctor tells a healthy installation from a broken one, and never shows a traceback."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from l2rw_ext import _C, agreement, doctor
from l2rw_ext.ops import _native
from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.ops.formulas import as_results, sample


def run(
    *options: str, folder: pathlib.Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-m", "l2rw_ext.doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=folder,
        check=False,
    )


@pytest.mark.parametrize("isa", _native.BUILD_INFO["instruction_sets"].split())
def test_every_instruction_set_computes_the_same(isa: str) -> None:
    """No warning is shown: forward mode loads TorchScript, of which torch warns."""
    result = run("-W", "always:`torch.jit", L2RW_CPU_ISA=isa)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    line = next(line for line in result.stdout.splitlines() if line.startswith("instruction set"))
    levels = _native.BUILD_INFO["instruction_sets"].split()
    # A processor without the instruction set runs the best one below it.
    assert line.split()[2].rstrip(",") in levels[: levels.index(isa) + 1]
    assert isa != "baseline" or "baseline," in line


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    report = capsys.readouterr().out
    for word in (
        _native.BUILD_INFO["version"],
        torch.__version__,
        "_ops.so             loaded from",
        "_ops_cuda.so        ",
        "CUDA architectures  ",
        "CUDA operators      ",
        f"threads             {torch.get_num_threads()}",
        "self-check          passed",
    ):
        assert word in report
    assert _native.libraries()[1].reason in report


@pytest.mark.parametrize("name", OPERATORS)
def test_one_wrong_number_is_enough(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any result; off by a thousandth of the size that the result's numbers have."""
    operator = OPERATORS[name]
    count = len(as_results(operator(*sample(name))))
    for wrong in range(count):
        changed: list[bool] = []  # by call: without optional arguments a result may hold nothing

        def off(
            *arguments: Any, wrong: int = wrong, changed: list[bool] = changed
        ) -> tuple[Tensor, ...]:
            results = as_results(operator(*arguments))
            result = results[wrong]
            changed.append(bool(result.any()))
            if changed[-1]:
                result[(0,) * result.dim()] += 1e-3 * result.double().square().mean().sqrt()
            return results

        monkeypatch.setitem(OPERATORS, name, off)
        for k, (what, error, tolerance) in enumerate(agreement.check_small(name, "cpu")):
            if what in ("cpu, float64", "cpu, float32"):
                assert (error > tolerance) == (changed[k // count] and k % count == wrong)
        assert any(changed)


def test_wrong_numbers_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unchanged(u: Tensor) -> Tensor:
        return u

    monkeypatch.setitem(OPERATORS, "normalize_weights", unchanged)
    assert doctor.main() == 1
    report = capsys.readouterr().out
    assert "self-check          FAILED" in report
    assert "normalize_weights (cpu, float64): relative error" in report


def test_exceptions_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> Iterator[doctor.Checked]:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "_check_reweighter", broken)
    assert doctor.main() == 1
    report = capsys.readouterr().out
    for engine in ("layerwise", "forward", "double_backward"):
        assert f"engine {engine}: RuntimeError: first line\n" in report
    assert "second line" not in report

    monkeypatch.setattr(doctor, "_installation", broken)
    assert doctor.main() == 1
    assert "l2rw_ext.doctor could not finish: RuntimeError: first line" in capsys.readouterr().out


def test_incomplete_installation_is_one_line(tmp_path: pathlib.Path) -> None:
    package = tmp_path / "l2rw_ext"
    shutil.copytree(
        pathlib.Path(doctor.__file__).parent, package, ignore=shutil.ignore_patterns("*.so")
    )
    packages = str(pathlib.Path(torch.__file__).parent.parent)

    def only_line() -> str:
        # -S: an editable install's import hook would come first.
        result = run("-S", folder=tmp_path, PYTHONPATH=packages)
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        return line

    assert "in a checkout, type pip install --no-build-isolation -e ." in only_line()
    (compiled,) = pathlib.Path(_C.__file__).parent.glob("_C.*.so")
    shutil.copy(compiled, package)
    assert "l2rw_ext is not completely installed" in only_line()


def test_nan_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (agreement, doctor):
        monkeypatch.setattr(module, "relative_error", lambda found, exact: float("nan"))
    checked, failures = doctor._self_check()
    assert len(failures) == checked
