"""Reports what this installation consists of and whether it computes the right numbers.

``python -m l2rw_ext.doctor`` prints versions, the operator libraries (with the reason if one is not
loaded), CUDA architectures, instruction set and threads. It checks every operator and a small
:class:`~l2rw_ext.Reweighter` step against plain float64 torch in about a second; on a GPU it also
checks products that fill the GPU. It exits with status 1 if something is wrong.
"""

from __future__ import annotations

import copy
import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import Reweighter, reference
from .devices import float32_products
from .ops import _native
from .ops._operator import OPERATORS
from .ops.formulas import FORMULAS, Draw, as_results, sample
from .reference import relative_error
from .reweighter import EngineName

__all__ = ["main"]

# What was checked, its relative error, and the error allowed.
Checked = tuple[str, float, float]

# Of a whole result in the L2 norm, by its dtype: sums of a few dozen terms, and whole models in
# float64.
_TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
# For sums of thousands of terms with either sign.
_TOLERANCE_LARGE = 1e-4
_TOLERANCE_TF32 = 5e-3


def _installation() -> Iterator[tuple[str, str]]:
    info = _native.BUILD_INFO
    yield "l2rw_ext", f"{info['version']} ({info['compiler']}, torch {info['torch_version']})"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    for library in _native.LIBRARIES:
        state = f"loaded from {library.path}" if library.loaded else f"not loaded: {library.reason}"
        yield library.name, state
    if info["cuda_version"]:
        built = f"{info['cuda_architectures']} with CUDA {info['cuda_version']}"
    else:
        built = "none: built without CUDA"
    yield "CUDA architectures", built
    kernels = [name for name, operator in OPERATORS.items() if not operator.composed]
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


def _to(device: str, argument: Any) -> Any:
    return argument.to(device) if isinstance(argument, Tensor) else argument


def _check_operator(name: str) -> Iterator[Checked]:
    """Check all results of small arguments in every dtype."""
    for device in _devices():
        for dtype in _TOLERANCES:
            arguments = sample(name, dtype)
            moved = pytree.tree_map(functools.partial(_to, device), arguments)
            with float32_products(False):
                results = as_results(OPERATORS[name](*moved))
            for result, exact in zip(results, FORMULAS[name].exact(arguments), strict=True):
                error = relative_error(result, exact)
                yield f"{device}, {str(dtype)[6:]}", error, _TOLERANCES[result.dtype]


def _check_large_products(device: str) -> Iterator[Checked]:
    """Check scores of large products, which run on every processor of a GPU."""
    for name, formula in FORMULAS.items():
        if formula.large is None:
            continue
        for dtype, tf32 in (
            (torch.float32, False),
            (torch.float32, True),
            (torch.bfloat16, False),
            (torch.float16, False),
        ):
            arguments = formula.large(Draw(dtype, device))
            with float32_products(tf32):
                result = OPERATORS[name](*arguments)
            error = relative_error(result, *formula.exact(arguments))
            label = f"{device}, {'TF32' if tf32 else str(dtype)[6:]}, {name}"
            yield label, error, _TOLERANCE_TF32 if tf32 else _TOLERANCE_LARGE


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
        yield f"{label}, scores", relative_error(step.scores, scores), _TOLERANCES[torch.float64]
        yield (
            f"{label}, weights",
            relative_error(step.weights, weights),
            _TOLERANCES[torch.float64],
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
            _TOLERANCES[torch.float64],
        )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _self_check() -> tuple[int, list[str]]:
    """The number of results checked, and one line for each that was wrong."""
    checks: dict[str, Callable[[], Iterator[Checked]]] = {
        name: functools.partial(_check_operator, name) for name in OPERATORS
    }
    engines: tuple[EngineName, ...] = ("layerwise", "forward", "double_backward")
    for engine in engines:
        checks[f"engine {engine}"] = functools.partial(_check_reweighter, engine)
    if torch.cuda.is_available():
        checks["large products"] = functools.partial(_check_large_products, "cuda")
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
            failures.append(f"{name}: {_first_line(error)}")
    return checked, failures


def main() -> int:
    """Print the report; 0 if all is well, 1 if not."""
    try:
        for subject, value in _installation():
            print(f"{subject:20}{value}")
        started = time.perf_counter()
        checked, failures = _self_check()
        seconds = time.perf_counter() - started
    except Exception as error:
        print(f"l2rw_ext.doctor could not finish: {_first_line(error)}")
        return 1
    verdict = "FAILED" if failures else "passed"
    print(f"{'self-check':20}{verdict}: {checked} results in {seconds:.2f} s")
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
