"""Reports what this installation consists of and whether it computes the right numbers.

``python -m l2rw_ext.doctor`` prints versions, the operator libraries (with the reason if one is not
loaded), CUDA architectures, which CUDA kernels run, instruction set and threads. It checks every
operator and a small :class:`~l2rw_ext.Reweighter` step against plain float64 torch in about a
second; on a GPU it also checks operators on arguments that fill it. With ``--kernels`` it checks
the CUDA kernels anew, whatever an earlier check found, and keeps the verdict by which later
processes choose them (``L2RW_CUDA_KERNELS``). It exits with status 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Reweighter, reference
from .agreement import TOLERANCES, Checked, check_large, check_small, first_line
from .ops import _kernels, _native, trust
from .ops._operator import OPERATORS
from .reference import relative_error
from .reweighter import EngineName

__all__ = ["main"]


def _installation() -> Iterator[tuple[str, str]]:
    info = _native.BUILD_INFO
    if torch.cuda.is_available():
        torch.cuda.init()
        _kernels.decide()
    yield "l2rw_ext", f"{info['version']} ({info['compiler']}, torch {info['torch_version']})"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    for library in _native.libraries():
        reason = library.reason or f"L2RW_CUDA_KERNELS is {_kernels.outcome}"
        state = f"loaded from {library.path}" if library.loaded else f"not loaded: {reason}"
        yield library.name, state
    if info["cuda_version"]:
        built = f"{info['cuda_architectures']} with CUDA {info['cuda_version']}"
    else:
        built = "none: built without CUDA"
    yield "CUDA architectures", built
    kernels = [name for name in OPERATORS if name not in _kernels.COMPOSED]
    yield "CUDA kernels", _kernels.outcome
    yield "CUDA operators", f"{', '.join(kernels) or 'none'}; all others composed of torch's"
    if torch.cuda.is_available():
        yield "CUDA device", torch.cuda.get_device_name()
        if os.environ.get("L2RW_CUDA_WARPGROUPS") == "1":
            yield "CUDA warpgroups", "asked for; compute capability 9.0 has them"
    isa = _native.instruction_set()
    yield "instruction set", f"{isa}, compiled for {info['instruction_sets']}"
    yield "threads", str(torch.get_num_threads())


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _check_operator(name: str) -> Iterator[Checked]:
    for device in _devices():
        yield from check_small(name, device)
        if device != "cpu":
            yield from check_large(name, device)


def _check_reweighter(engine: EngineName) -> Iterator[Checked]:
    """A step of a small convolutional model against single gradients, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),  # before batch norm a bias has no gradient
            nn.GroupNorm(2, 4) if engine == "layerwise" else nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 36, 3),
        ).double()
        batch = torch.randn(6, 1, 6, 6).double(), torch.tensor([0, 1, 2, 0, 1, 2])
        clean = torch.randn(3, 1, 6, 6).double(), torch.tensor([0, 1, 2])

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    scores = reference.single_gradient_scores(model, losses, batch, clean)
    weights = reference.weights_from_scores(scores)
    gradients = reference.weighted_gradient(model, losses, batch, weights)
    for device in _devices():
        moved = copy.deepcopy(model).to(device)
        here, clean_here = ([x.to(device) for x in part] for part in (batch, clean))
        step = Reweighter(moved, losses, engine=engine).backward(here, clean_here)
        label = f"{device}, float64"
        yield f"{label}, scores", relative_error(step.scores, scores), TOLERANCES[torch.float64]
        yield (
            f"{label}, weights",
            relative_error(step.weights, weights),
            TOLERANCES[torch.float64],
        )
        errors = [
            relative_error(parameter.grad, gradient)
            for parameter, gradient in zip(moved.parameters(), gradients.values(), strict=True)
            if parameter.grad is not None and gradient is not None
        ]
        complete = len(errors) == len(gradients)
        yield (
            f"{label}, gradient",
            max(errors) if complete else float("nan"),
            TOLERANCES[torch.float64],
        )


def _self_check() -> tuple[int, list[str]]:
    """The number of results checked, and one line for each that was wrong."""
    checks: dict[str, Callable[[], Iterator[Checked]]] = {
        name: functools.partial(_check_operator, name) for name in OPERATORS
    }
    engines: tuple[EngineName, ...] = ("layerwise", "forward", "double_backward")
    for engine in engines:
        checks[f"engine {engine}"] = functools.partial(_check_reweighter, engine)
    checked = 0
    failures = []
    for name, check in checks.items():
        try:
            for what, error, tolerance in check():
                checked += 1
                if not error <= tolerance:  # a NaN fails
                    failures.append(
                        f"{name} ({what}): relative error {error:.1e}, allowed {tolerance:.0e}"
                    )
        except Exception as error:
            failures.append(f"{name}: {first_line(error)}")
    return checked, failures


def _examine_kernels() -> int:
    """Check the CUDA kernels anew and print the verdict; 0 if all agree, 1 if not."""
    library = _native.find_cuda()
    try:
        if library.path is None or library.reason:
            raise trust.NoVerdictError(library.reason)
        if not torch.cuda.is_available():
            raise trust.NoVerdictError("torch sees no GPU")
        verdict = trust.make(library.path)
    except trust.NoVerdictError as error:
        print(f"CUDA kernels were not checked: {error}")
        return 1
    for name in verdict.agreed or ():
        print(f"{name:28}agrees")
    for name, reason in verdict.left_out.items():
        print(f"{name:28}left out: {reason}")
    return 1 if verdict.left_out else 0


def main(arguments: Sequence[str] = ()) -> int:
    """Print the report, or the verdict on kernels; 0 if all is well, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m l2rw_ext.doctor", description=__doc__)
    parser.add_argument("--kernels", action="store_true", help="check the CUDA kernels anew")
    if parser.parse_args(arguments).kernels:
        return _examine_kernels()
    try:
        for subject, value in _installation():
            print(f"{subject:20}{value}")
        started = time.perf_counter()
        checked, failures = _self_check()
        seconds = time.perf_counter() - started
    except Exception as error:
        print(f"l2rw_ext.doctor could not finish: {first_line(error)}")
        return 1
    verdict = "FAILED" if failures else "passed"
    print(f"{'self-check':20}{verdict}: {checked} results in {seconds:.2f} s")
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
