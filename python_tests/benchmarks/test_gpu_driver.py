"""``make gpu`` runs its phases in order; one that fails leaves the results of the others."""

from __future__ import annotations

import fcntl
import json
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks print with rich")

from benchmarks import gpu, provenance
from benchmarks.__main__ import main as benchmarks
from benchmarks.gpu import Phase, phases, run_phases
from benchmarks.kernel_cases import KERNEL_CASES
from benchmarks.methods import METHODS
from support.makefile import make
from support.paths import ROOT

FACTS = {"kind": "gpu"}


def python(name: str, code: str, seconds: float = 30, **environment: str) -> Phase:
    return Phase(name, (sys.executable, "-c", code), seconds, environment)


def test_all_phases_run_and_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = [
        python("first", "print('one')"),
        python("broken", "import sys; print('the reason'); sys.exit(3)"),
        Phase("missing", ("no-such-command",), 30),
        python("last", "import os; print(os.environ['L2RW_FAKE'])", L2RW_FAKE="set"),
    ]
    outcomes = run_phases(todo, tmp_path / "folder", FACTS)
    assert [o.status for o in outcomes] == ["passed", "failed", "failed", "passed"]
    log = (tmp_path / "folder" / gpu.LOG).read_text()
    for line in ("=== first: ", "one", "the reason", "No such file", "\nset\n"):
        assert line in log
    report = json.loads((tmp_path / "folder" / gpu.REPORT).read_text())
    assert [p["name"] for p in report["phases"]] == ["first", "broken", "missing", "last"]
    assert all(p["seconds"] >= 0 for p in report["phases"])
    out = capsys.readouterr().out
    assert "  | the reason" in out
    assert "one" not in out


def test_a_phase_out_of_time_is_stopped_with_its_children(tmp_path: Path) -> None:
    """The child holds a lock until it ends; only a lock that was held shows that it was stopped."""
    held = tmp_path / "held"
    inner = (
        f"import fcntl, time; lock = open({str(held) + '.lock'!r}, 'w'); "
        f"fcntl.flock(lock, fcntl.LOCK_EX); open({str(held)!r}, 'w').close(); time.sleep(300)"
    )
    outer = (
        "import subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', {inner!r}]); time.sleep(300)"
    )
    seconds = 0.5
    while not held.exists():
        assert seconds < 100, "the child never started"
        seconds *= 2
        start = time.monotonic()
        slow, after = run_phases(
            [python("slow", outer, seconds), python("after", "print('still')")], tmp_path, FACTS
        )
        assert slow.status == "out of time"
        assert after.status == "passed"
        assert time.monotonic() - start < seconds + 30
    with (tmp_path / "held.lock").open("w") as lock:
        deadline = time.monotonic() + 10
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "the child outlived its phase"
                time.sleep(0.02)


def test_a_phase_inherits_the_time_that_is_left(tmp_path: Path) -> None:
    todo = [python("quick", "", 20), python("long", "import time; time.sleep(1)", 0)]
    assert [o.status for o in run_phases(todo, tmp_path, FACTS)] == ["passed", "passed"]


@pytest.mark.parametrize("prebuilt", [None, Path("/some/where/_ops_cuda.so")])
def test_the_plan(tmp_path: Path, prebuilt: Path | None) -> None:
    plan = phases(tmp_path, prebuilt, workers=8, cores=16)
    assert sum(phase.seconds for phase in plan) < 9 * 60
    inside = phases(provenance.ROOT / "results" / "x", prebuilt, workers=1, cores=1)
    assert str(Path("results", "x", "memory.json")) in inside[-1].command
    named = {phase.name: phase for phase in plan}
    assert list(named) == [
        "build",
        "doctor",
        "tests of CUDA",
        "tests of warpgroups",
        "other tests",
        "kernels",
        "kernels, warpgroups",
        "step, compiled",
        "step",
        "memory",
    ]
    build = named["build"]
    assert "--no-build-isolation" in build.command
    assert "--no-deps" in build.command
    assert "-Ccmake.define.L2RW_CUDA_ARCHITECTURES=90a" in build.command
    expected = {"L2RW_CUDA": "ON"}
    if prebuilt is not None:
        expected = {"L2RW_CUDA": "OFF", "L2RW_PREBUILT_CUDA": str(prebuilt)}
    assert build.environment == expected
    for name in ("tests of CUDA", "other tests"):
        assert named[name].environment == {"L2RW_REQUIRE_CUDA": "1", "OMP_NUM_THREADS": "2"}
        assert named[name].command[-2:] == ("-n", "8")
    for name in ("tests of warpgroups", "kernels, warpgroups"):
        assert named[name].environment["L2RW_CUDA_WARPGROUPS"] == "1"


def test_the_plan_under_sanitizers() -> None:
    build, *tools = gpu.sanitizer_phases(None)
    assert build == phases(Path("results"), None, workers=1, cores=1)[0]
    assert [phase.name for phase in tools] == [
        "memcheck",
        "memcheck, warpgroups",
        "racecheck",
        "racecheck, warpgroups",
    ]
    assert build.seconds + sum(phase.seconds for phase in tools) < 9 * 60
    for phase in tools:
        tool = phase.name.split(",")[0]
        assert phase.command[:3] == ("compute-sanitizer", "--tool", tool)
        assert ("L2RW_CUDA_WARPGROUPS" in phase.environment) == ("warpgroups" in phase.name)
        assert "python_tests/cuda/test_cuda_ops.py" in phase.command


def test_one_process_tests_without_xdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.test_workers(16) == 1
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    assert gpu.test_workers(16) == 8
    assert gpu.test_workers(1) == 1
    for phase in phases(tmp_path, None, workers=1, cores=16):
        assert "-n" not in phase.command


def test_the_commands_of_the_plan_are_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is refused only because there is no such device."""
    ran = 0
    for phase in phases(tmp_path, None, workers=1, cores=2):
        if phase.command[2] != "benchmarks":
            continue
        arguments = ["cuda:99" if a == "cuda" else a for a in phase.command[3:]]
        assert benchmarks(arguments) == 2
        assert "--device cuda:99" in capsys.readouterr().err
        ran += 1
    assert ran == 5


def test_make_gpu_paper_builds_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = ("PYTHON=python", "MINUTES=3", f"DATA={tmp_path}")
    shown = make("-n", "-C", str(ROOT), "gpu-paper", *variables).stdout
    build, paper = (
        shlex.split(line) for line in shown.replace("\\\n", " ").splitlines() if "python" in line
    )
    assert build[1:] == ["-m", "benchmarks.gpu", "--build"]
    assert paper[1:3] == ["-m", "benchmarks"]
    assert paper[paper.index("--minutes") + 1] == "3"
    assert benchmarks([*paper[3:], "--device", "cuda:99"]) == 2
    assert "--device cuda:99" in capsys.readouterr().err
    called: list[tuple[str, ...]] = []

    def call(command: tuple[str, ...], env: dict[str, str]) -> int:
        assert env["L2RW_CUDA"] == "ON"
        called.append(command)
        return 7

    monkeypatch.delenv("L2RW_PREBUILT_CUDA", raising=False)
    monkeypatch.setattr(gpu, "check_gpu", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu.subprocess, "call", call)
    assert gpu.main(["--build"]) == 7
    assert called == [phases(tmp_path, None, workers=1, cores=1)[0].command]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA", "gpu"),
    ],
)
def test_the_folder_of_a_device(name: str, folder: str) -> None:
    assert gpu.device_folder(name) == folder


def test_without_a_gpu_or_a_library_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("L2RW_PREBUILT_CUDA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.main(["--sanitize"]) == 2
    assert "no compute-sanitizer on PATH" in capsys.readouterr().err
    assert gpu.main([]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    assert gpu.main(["--prebuilt", str(tmp_path / "none.so")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert gpu.main([]) == 2
    assert "builds for sm_90a alone, and NVIDIA B200 is sm_100" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "status"), [("", 0), ("import sys; sys.exit(1)", 1)])
def test_the_whole_run(
    code: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = tmp_path / "_ops_cuda.so"
    library.touch()
    given: list[Path | None] = []

    def fake(folder: Path, prebuilt: Path | None, workers: int, cores: int) -> list[Phase]:
        given.append(prebuilt)
        return [python("only", code)]

    monkeypatch.setenv("L2RW_PREBUILT_CUDA", str(library))
    monkeypatch.setattr(gpu, "check_gpu", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu, "phases", fake)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(provenance, "machine", lambda device: {"gpu": "NVIDIA H200"})
    assert gpu.main([]) == status
    assert given == [library]
    report = provenance.read(tmp_path / "h200" / gpu.REPORT)
    assert report["command"] == "make gpu"
    assert provenance.is_current(report)
    assert f"takes {library}" in capsys.readouterr().out
    assert benchmarks(["report", "--results", str(tmp_path), "--device", "h200"]) == 0
    assert "| only |" in capsys.readouterr().out


def test_the_plan_measures_what_exists(tmp_path: Path) -> None:
    from benchmarks.cases import CASES

    known = {*CASES, *METHODS, *KERNEL_CASES}
    for phase in phases(tmp_path, None, workers=1, cores=2):
        words = phase.command
        for option in ("--case", "--methods"):
            if option in words:
                first = words.index(option) + 1
                assert words[first] in known
