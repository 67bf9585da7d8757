"""``make gpu`` runs its phases in order; one that fails leaves the results of the others."""

from __future__ import annotations

import fcntl
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks print with rich")

from benchmarks import gpu, provenance
from benchmarks.__main__ import main as benchmarks
from benchmarks.cases import CASES
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


def test_a_phase_without_time_does_not_begin(tmp_path: Path) -> None:
    """Those after it may, if they need less."""
    todo = [python("first", "", 30), python("long", "", 600), python("short", "", 20)]
    outcomes = run_phases(todo, tmp_path, FACTS, minutes=0.5)
    assert [o.status for o in outcomes] == ["passed", "not begun", "passed"]
    report = json.loads((tmp_path / gpu.REPORT).read_text())
    assert [p["status"] for p in report["phases"]] == ["passed", "not begun", "passed"]


PREBUILT = {
    "L2RW_PREBUILT_CPU": Path("/some/where/_ops.so"),
    "L2RW_PREBUILT_CUDA": Path("/some/where/_ops_cuda.so"),
}


def plan(folder: Path = Path("results"), **options: Any) -> dict[str, Phase]:
    """The phases on a GPU, by name."""
    options = {"prebuilt": {}, "cores": 16, **options}
    return {phase.name: phase for phase in phases(folder, gpu.ON_GPU, **options)}


def test_the_plan(tmp_path: Path) -> None:
    named = plan(tmp_path, prebuilt=PREBUILT, device="h100-80gb-hbm3")
    seconds = [phase.seconds for phase in named.values()]
    assert list(named) == [
        *("build", "doctor", "kernels agree", "operators", "operators, warpgroups", "steps"),
        *("kernels that decide", "kernels that decide, warpgroups", "kernels"),
        *("step", "step, compiled", "memory", "over predicted"),
        *("memcheck", "memcheck, warpgroups", "racecheck", "racecheck, warpgroups"),
    ]
    assert sum(seconds[:6]) < 4 * 60
    assert sum(seconds[:11]) < 8 * 60
    assert sum(seconds) < 13 * 60
    assert named["over predicted"].command[-3:] == ("h100", "--measured", str(tmp_path))
    assert "over predicted" not in plan(device="rtx-4090")
    files = {name for p in named.values() for name in p.command if name.endswith(".json")}
    assert len(files) + 2 <= 8  # as many as come back, with the log and the report
    inside = plan(provenance.ROOT / "results" / "x")
    assert str(Path("results", "x", "memory.json")) in inside["memory"].command
    for name in ("operators", "steps"):
        assert named[name].environment["L2RW_REQUIRE_CUDA"] == "1"
        assert named[name].environment["OMP_NUM_THREADS"] == "2"
        assert "8" in named[name].command
    for name, phase in named.items():
        assert ("warpgroups" in name) == (phase.environment.get("L2RW_CUDA_WARPGROUPS") == "1")
        examined = name in ("build", "kernels agree", "over predicted")
        assert (phase.environment.get("L2RW_CUDA_KERNELS") == "on") != examined
        assert (phase.command[0] == "compute-sanitizer") == name.endswith("check") or (
            "check," in name
        )


@pytest.mark.parametrize("prebuilt", [{}, PREBUILT])
def test_what_is_carried_is_not_built(prebuilt: dict[str, Path]) -> None:
    build = plan(prebuilt=prebuilt, built_for="120")["build"]
    for option in ("--no-build-isolation", "--no-deps", "--no-index", "--editable"):
        assert option in build.command
    assert "-Ccmake.define.L2RW_CUDA_ARCHITECTURES=120" in build.command
    carried = {name: str(path) for name, path in prebuilt.items()}
    assert build.environment == {"L2RW_CUDA": "OFF" if prebuilt else "ON", **carried}
    assert (build.seconds == 30) == bool(prebuilt)


@pytest.mark.parametrize(
    ("capability", "built"), [((9, 0), "90a"), ((8, 0), "80"), ((12, 0), "120")]
)
def test_the_architecture_of_a_device(capability: tuple[int, int], built: str) -> None:
    assert gpu.architecture(capability) == built


def test_one_process_tests_without_xdist(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(gpu.importlib.util, "find_spec", lambda name: None)
        assert gpu.test_workers(16) == 1
        assert all("-n" not in phase.command for phase in plan().values())
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    assert gpu.test_workers(16) == 8
    assert gpu.test_workers(1) == 1


def test_the_commands_of_the_plan_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is refused only because there is no such device."""
    ran = 0
    for phase in plan().values():
        if phase.command[2] != "benchmarks" or "roofline" in phase.command:
            continue
        arguments = ["cuda:99" if a == "cuda" else a for a in phase.command[3:]]
        assert benchmarks(arguments) == 2
        assert "--device cuda:99" in capsys.readouterr().err
        ran += 1
    assert ran == 6


def test_make_gpu_paper_builds_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = ("PYTHON=python", "MINUTES=3", f"DATA={tmp_path}")
    shown = make("-n", "-C", str(ROOT), "gpu-paper", *variables).stdout
    build, paper = (
        shlex.split(line) for line in shown.replace("\\\n", " ").splitlines() if "python" in line
    )
    results = ["--results", "build/gpu-paper"]  # not where `make gpu` records
    assert build[1:] == ["-m", "benchmarks.gpu", "--phases", "build", *results]
    assert paper[1:3] == ["-m", "benchmarks"]
    assert paper[paper.index("--minutes") + 1] == "3"
    assert benchmarks([*paper[3:], "--device", "cuda:99"]) == 2
    assert "--device cuda:99" in capsys.readouterr().err


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
    for name in PREBUILT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "sees no CUDA device; --dry-run does without one" in capsys.readouterr().err
    assert gpu.main(["--dry-run", "--phases", "build", "paint"]) == 2
    assert "--phases paint: known are build, doctor, " in capsys.readouterr().err
    monkeypatch.setenv("L2RW_PREBUILT_CPU", str(tmp_path / "none.so"))
    assert gpu.main(["--dry-run"]) == 2
    assert "L2RW_PREBUILT_CPU=" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "status"), [("", 0), ("import sys; sys.exit(1)", 1)])
def test_the_whole_run(
    code: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = tmp_path / "_ops_cuda.so"
    library.write_bytes(bytes(2**20))
    given: dict[str, Any] = {}

    def fake(folder: Path, plan: gpu.Plan, **options: Any) -> list[Phase]:
        given.update(options, on=plan.device)
        return [python("only", code), python("other", "raise ValueError")]

    monkeypatch.delenv("L2RW_PREBUILT_CPU", raising=False)
    monkeypatch.setenv("L2RW_PREBUILT_CUDA", str(library))
    monkeypatch.setattr(gpu, "check_gpu", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "phases", fake)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(provenance, "machine", lambda device: {"gpu": "NVIDIA H200"})
    assert gpu.main(["--phases", "only"]) == status
    assert given["prebuilt"] == {"L2RW_PREBUILT_CUDA": library}
    assert (given["built_for"], given["device"], given["on"]) == ("90a", "h200", "cuda")
    report = provenance.read(tmp_path / "h200" / gpu.REPORT)
    assert report["command"] == "make gpu"
    assert provenance.is_current(report)
    (travels,) = re.findall(r"what would travel: (.*) MiB of 60", capsys.readouterr().out)
    assert float(travels) > 1
    assert benchmarks(["report", "--results", str(tmp_path), "--device", "h200"]) == 0
    assert "| only |" in capsys.readouterr().out


def test_a_dry_run_excuses_what_needs_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The phases that take a second; `make gpu ARGS=--dry-run` is for all of them."""
    for name in PREBUILT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu, "carried", lambda prebuilt: 59.0)
    quick = ["--phases", "doctor", "kernels agree", "step", "memory", "racecheck"]
    arguments = ["--dry-run", "--results", str(tmp_path), *quick]
    assert gpu.main(arguments) == 0
    report = provenance.read(tmp_path / gpu.REPORT)
    assert report["command"] == "make gpu ARGS=--dry-run"
    statuses = {phase["name"]: phase["status"] for phase in report["phases"]}
    assert statuses.pop("kernels agree") == "failed"
    assert statuses.pop("racecheck") == "failed"
    assert set(statuses.values()) == {"passed"}
    assert provenance.read(tmp_path / "step.json")["complete"]
    assert "were not checked: " in (tmp_path / gpu.LOG).read_text()
    monkeypatch.setattr(gpu, "carried", lambda prebuilt: 61.0)
    assert gpu.main([*arguments[:3], "--phases", "doctor"]) == 1


@pytest.mark.parametrize("place", [gpu.ON_GPU, gpu.ON_HOST], ids=lambda place: place.device)
def test_the_plan_measures_what_exists(place: gpu.Plan) -> None:
    assert {*place.kernels, *place.rest} <= KERNEL_CASES.keys()
    assert {*place.step, *place.compiled} <= CASES.keys()
    assert {*place.eager, *place.methods} <= METHODS.keys()
