"""CUDA kernels run where they agreed, and nowhere else; what goes wrong is said once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from l2rw_ext import agreement, doctor
from l2rw_ext.ops import _kernels, _native, trust
from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.ops.formulas import as_results, sample
from support.paths import ROOT

GPU = ("NVIDIA H200, sm_90",)
KERNELS = ["conv_correlation", "dense_correlation", "weighted_sum"]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of three kernels, on a machine with a GPU that nobody has examined."""
    path = tmp_path / "_ops_cuda.so"
    path.write_bytes(b"kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "devices", lambda: GPU)
    monkeypatch.setitem(_native.BUILD_INFO, "cuda_architectures", "80 90a")
    return path


def examiner(
    monkeypatch: pytest.MonkeyPatch, log: Path, each: str = "pass", first: str = "pass"
) -> None:
    """An examiner that writes a line in the log, and runs some code first and for each kernel."""
    code = f"""
import json, os, signal, sys, time
def say(**line):
    print(json.dumps(line), flush=True)
open({str(log)!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
{first}
say(kernels={KERNELS}, devices={list(trust.devices())})
print("something else")
for name in sys.argv[1:] or {KERNELS}:
    {each}
    say(operator=name, reason="")
"""
    monkeypatch.setattr(trust, "_EXAMINER", (sys.executable, "-c", code))


def test_a_verdict_is_made_once(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    examiner(monkeypatch, log)
    agreed = trust.Verdict(tuple(KERNELS), {})
    assert trust.verdict(library) == agreed
    assert trust.verdict(library) == agreed
    assert log.read_text() == "\n"
    assert trust.make(library) == agreed
    assert log.read_text() == "\n\n"


@pytest.mark.parametrize("changed", ["library", "device", "torch"])
def test_a_verdict_holds_for_what_was_examined(
    changed: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    examiner(monkeypatch, log)
    trust.verdict(library)
    if changed == "library":
        library.write_bytes(b"other kernels")
    elif changed == "device":
        monkeypatch.setattr(trust, "devices", lambda: ("NVIDIA A100, sm_80",))
        examiner(monkeypatch, log)
    else:
        monkeypatch.setattr(torch, "__version__", "9.9")
    trust.verdict(library)
    assert log.read_text() == "\n\n"


@pytest.mark.parametrize("content", ["", "[]", '{"agreed": 1, "left_out": 2}', "{"])
def test_a_file_that_says_nothing_is_replaced(
    content: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examiner(monkeypatch, tmp_path / "log")
    found = trust.verdict(library)
    (path,) = (tmp_path / "cache" / "l2rw_ext").glob("*.json")
    path.write_text(content)
    assert trust.verdict(library) == found
    assert json.loads(path.read_text())["agreed"] == KERNELS
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("say(operator=name, reason='relative error 1'); break", "relative error 1"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its process ended with -11"),
        ("sys.exit('no driver')", "its process ended with 1: no driver"),
        ("os._exit(0)", "it was passed over"),
    ],
)
def test_a_kernel_that_fails_is_left_out_and_the_others_are_examined(
    does: str, reason: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    examiner(monkeypatch, log, each=f"if name == 'dense_correlation': {does}")
    found = trust.verdict(library)
    assert found.agreed == ("conv_correlation", "weighted_sum")
    assert found.left_out == {"dense_correlation": reason}
    assert log.read_text().endswith("\nweighted_sum\n")


def test_a_kernel_that_does_not_return_is_left_out_with_all_after_it(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "SECONDS", 3.0)
    sleeps = "if name == 'dense_correlation': time.sleep(60)"
    examiner(monkeypatch, tmp_path / "log", each=sleeps)
    began = time.monotonic()
    found = trust.verdict(library)
    assert time.monotonic() - began < 20
    assert found.agreed == ("conv_correlation",)
    assert found.left_out == {
        "dense_correlation": "no result within 3 s",
        "weighted_sum": "not examined within 3 s",
    }


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("sys.exit('CUDA is busy')", "the check did not start: its process ended with 1: CUDA is"),
        ("os._exit(0)", "the check did not start: it named no kernel"),
        ("say(unjudged='out of memory'); sys.exit()", "out of memory"),
        (
            "say(kernels=[], devices=[]); sys.exit()",
            "the check saw no GPU in the place of NVIDIA H200, sm_90",
        ),
    ],
)
def test_without_a_verdict_nothing_is_kept(
    first: str, message: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    examiner(monkeypatch, log, first=first)
    for _ in range(2):
        with pytest.raises(trust.NoVerdictError, match=message):
            trust.verdict(library)
    assert log.read_text() == "\n\n"


def test_no_folder_no_verdict(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(trust.NoVerdictError, match=r"no verdict can be made and kept: .*cache"):
        trust.verdict(library)


def test_nobody_waits_for_ever(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "SECONDS", 0.2)
    monkeypatch.setattr(trust, "_WAITS", 0.1)
    path = trust._file(library, GPU).with_suffix(".lock")
    path.parent.mkdir(parents=True)
    with path.open("w") as held:
        assert trust._lock(held)
        with pytest.raises(trust.NoVerdictError, match=r"another process holds .*\.lock"):
            trust.verdict(library)


def test_a_check_that_cannot_be_started(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_EXAMINER", ("/no/such/python",))
    with pytest.raises(trust.NoVerdictError, match="No such file or directory: '/no/such/python'"):
        trust.verdict(library)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80", 80, True),
        ("80", 86, True),
        ("80", 90, True),
        ("80", 75, False),
        ("80", 120, True),
        ("90a", 90, True),
        ("90a", 100, False),
        ("100a", 103, False),
    ],
)
def test_which_gpus_can_run_what_was_built(built: str, capability: int, runs: bool) -> None:
    assert trust._runs(built, capability) is runs


def test_another_architecture_is_not_examined(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "devices", lambda: (*GPU, "Tesla T4, sm_75"))
    with pytest.raises(trust.NoVerdictError, match="built for 80 90a, and the GPU is Tesla T4"):
        trust.verdict(library)


def test_a_device_that_passed_the_suite_is_not_examined(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "VERIFIED", frozenset(GPU))
    examiner(monkeypatch, tmp_path / "log")
    assert trust.verdict(library) == trust.Verdict(None)
    assert not (tmp_path / "log").exists()


def test_processes_wait_for_the_one_that_examines(library: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"""
import sys
sys.path[:0] = {[str(ROOT / "python_tests"), str(ROOT)]!r}
from pathlib import Path
import pytest
from ops.test_trust import GPU, examiner
from l2rw_ext.ops import _native, trust
trust.devices = lambda: GPU
_native.BUILD_INFO["cuda_architectures"] = "80 90a"
examiner(pytest.MonkeyPatch(), Path({str(log)!r}), each="time.sleep(0.3)")
print(trust.verdict(Path({str(library)!r})).agreed)
"""
    command = (sys.executable, "-c", code)
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {process.communicate(timeout=60)[0] for process in processes} == {f"{tuple(KERNELS)}\n"}
    assert log.read_text() == "\n"


@pytest.fixture
def undecided(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has loaded no kernel yet, and whose CUDA is in use."""
    if _native.libraries()[1].loaded:
        pytest.skip("the kernels are loaded")
    kernels = torch.library.Library("l2rw_ext", "IMPL", "CUDA")

    def load() -> None:
        """The kernels that it registers return what no composition does."""
        for name in KERNELS:
            kernels.impl(name, lambda *arguments: torch.tensor([0.125]))

    monkeypatch.setattr(_native, "find_cuda", lambda: _native.Library("", library, False, ""))
    monkeypatch.setattr(_native, "load_cuda", load)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_kernels, "decided", False)
    monkeypatch.setattr(_kernels, "outcome", "")
    composed = set(_kernels.COMPOSED)
    yield
    _kernels._registered._destroy()
    kernels._destroy()
    _kernels._registered = torch.library.Library("l2rw_ext", "IMPL", "CUDA")
    for name, composition in _kernels._ALL.items():
        _kernels.register(name, composition)
    assert composed == _kernels.COMPOSED


def use_twice() -> None:
    """Any operator decides."""
    for _ in range(2):
        OPERATORS["normalize_weights"](torch.ones(2))


def on_cuda(name: str) -> Tensor:
    """What runs on tensors with the dispatch key of CUDA, by the first of its results."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return as_results(OPERATORS[name].compiled.redispatch(key, *sample(name)))[0]


@pytest.mark.usefixtures("undecided")
def test_kernels_that_agree_replace_compositions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = "if name == 'weighted_sum': say(operator=name, reason='it is wrong'); break"
    examiner(monkeypatch, tmp_path / "log", each=fails)
    assert all(on_cuda(name).numel() > 1 for name in KERNELS)
    with pytest.warns(UserWarning, match=r"not used: weighted_sum \(it is wrong\)") as said:
        use_twice()
    assert len(said) == 1
    assert said[0].filename == __file__
    assert _kernels.decided
    replaced = {name for name in OPERATORS if on_cuda(name).tolist() == [0.125]}
    assert replaced == {"conv_correlation", "dense_correlation"}
    assert set(OPERATORS) - replaced == _kernels.COMPOSED
    assert _kernels.outcome == (
        "auto, some CUDA kernels of this package are not used: weighted_sum (it is wrong) on "
        "NVIDIA H200, sm_90"
    )


@pytest.mark.usefixtures("undecided")
def test_without_a_verdict_compositions_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examiner(monkeypatch, tmp_path / "log", first="sys.exit('CUDA is busy')")
    with pytest.warns(UserWarning, match="no CUDA kernel of this package is used") as said:
        use_twice()
    assert len(said) == 1
    assert all(on_cuda(name).numel() > 1 for name in KERNELS)
    assert set(OPERATORS) == _kernels.COMPOSED


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize("why", ["CUDA is not in use", "a graph is captured"])
def test_nothing_is_decided_too_early(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "CUDA is not in use":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    else:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(trust, "verdict", lambda path: pytest.fail("it asked"))
    OPERATORS["normalize_weights"](torch.ones(2))
    assert not _kernels.decided


@pytest.mark.usefixtures("undecided")
def test_a_compiled_function_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "verdict", lambda path: pytest.fail("it asked"))

    def doubled(u: Tensor) -> Tensor:
        return 2 * OPERATORS["normalize_weights"](u)

    compiled = torch.compile(doubled, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [1, 1]
    assert not _kernels.decided


@pytest.mark.parametrize("setting", trust.MODES)
def test_the_setting_is_shown(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (sys.executable, "-m", "l2rw_ext.doctor")
    monkeypatch.setenv("L2RW_CUDA_KERNELS", setting)
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"\nCUDA kernels        {setting}" in shown


def test_another_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2RW_CUDA_KERNELS", "yes")
    with pytest.raises(ValueError, match="L2RW_CUDA_KERNELS=yes: expected auto, on or off"):
        trust.mode()


# What an examiner does


def test_every_kernel_is_examined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here on the CPU, where every operator agrees but one."""
    wrong = "relative error 1.0e+00, allowed 1e-12"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: (9, 0))
    monkeypatch.setattr(agreement, "COMPOSED", set(OPERATORS) - set(KERNELS))
    monkeypatch.setattr(
        agreement, "disagreement", lambda name, device: wrong if name == KERNELS[1] else ""
    )
    agreement.main([])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["devices"] == list(GPU)
    assert [line["reason"] for line in lines[1:]] == ["", wrong, ""]
    assert {line["operator"] for line in lines[1:]} == set(lines[0]["kernels"]) == set(KERNELS)
    agreement.main(["weighted_sum"])
    assert '"operator": "weighted_sum"' in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("CUDA error: x\nmore"), {"reason": "RuntimeError: CUDA error: x"}),
        (torch.OutOfMemoryError("no room"), {"unjudged": "OutOfMemoryError: no room"}),
    ],
)
def test_an_examiner_ends_after_an_error(
    error: Exception,
    line: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(name: str, device: str) -> str:
        raise error

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: (9, 0))
    monkeypatch.setattr(agreement, "disagreement", fail)
    agreement.main(["weighted_sum", "dense_correlation"])
    _, said = map(json.loads, capsys.readouterr().out.splitlines())
    said.pop("operator", None)
    assert said == line


@pytest.mark.parametrize("name", OPERATORS)
def test_large_arguments_agree(name: str) -> None:
    """On this processor, with room for the rounding of another."""
    for what, error, tolerance in agreement.check_large(name, "cpu"):
        assert error <= tolerance / 4, what


@pytest.mark.parametrize("large", [False, True])
def test_one_wrong_number_is_enough(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the last tile's: half of the size that the result's numbers have."""
    operator = OPERATORS["linear_weighted_gradient"]

    def off(*arguments: object) -> tuple[Tensor, ...]:
        results = as_results(operator(*arguments))
        results[0][-1, -1] += 0.5 * results[0].double().square().mean().sqrt()
        return results

    monkeypatch.setitem(OPERATORS, "linear_weighted_gradient", off)
    check = agreement.check_large if large else agreement.check_small
    wrong = [error > tolerance for _, error, tolerance in check("linear_weighted_gradient", "cpu")]
    assert wrong[::2].count(False) <= (1 if large else 0)
    assert agreement.disagreement("linear_weighted_gradient", "cpu")


def test_doctor_makes_the_verdict_anew(
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = tmp_path / "log"
    fails = "if name == 'weighted_sum': say(operator=name, reason='it is wrong'); break"
    examiner(monkeypatch, log, each=fails)
    found = _native.Library("_ops_cuda.so", library, False, "")
    monkeypatch.setattr(_native, "find_cuda", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doctor.main(["--kernels"]) == 1
    assert "weighted_sum                left out: it is wrong" in capsys.readouterr().out
    examiner(monkeypatch, log)
    assert doctor.main(["--kernels"]) == 0
    shown = capsys.readouterr().out
    assert "weighted_sum                agrees" in shown
    assert "left out" not in shown
    examiner(monkeypatch, log, first="sys.exit('CUDA is busy')")
    assert doctor.main(["--kernels"]) == 1
    assert "were not checked: the check did not start" in capsys.readouterr().out


def test_only_the_dispatcher_knows_the_verdict() -> None:
    """Neither forms of layers nor collectives may depend on it, for ranks may differ in it."""
    package = ROOT / "l2rw_ext"
    asks = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "COMPOSED" in path.read_text() or "trust" in path.read_text()
    }
    assert asks == {"agreement.py", "doctor.py", "ops/_kernels.py"}
